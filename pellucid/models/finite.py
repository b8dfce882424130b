"""Which weight is no number: asked where a result is none, or where weights are rewritten anyway.

Loading does not look: a mapped weight would be read once more for it. One NaN or infinity among the
weights makes logits NaN, and whatever reads logits stops there and says which tensor has it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_AT_ONCE = 1 << 22  # numbers looked at together


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor of any shape is one: neither NaN nor infinite."""
    flat = tensor.detach().reshape(-1)
    if not flat.is_floating_point() or flat.is_meta:
        return True
    return all(bool(some.isfinite().all()) for some in flat.split(_AT_ONCE))


def check_finite(name: str, tensor: Tensor) -> None:
    """ValueError that names a tensor which has a NaN or an infinity in it."""
    if not is_finite(tensor):
        bad = int((~tensor.isfinite()).sum())
        raise ValueError(
            f"{name} has {bad:,} values that are not numbers (NaN, or infinite): the file is "
            "damaged; get it again, or save it again"
        )


@torch.no_grad()
def damaged_weight(model: nn.Module) -> str | None:
    """That the first weight which is no number is none; None where all are numbers."""
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            return f"the weight {name} has NaN or infinity in it: the file is damaged"
    return None


def why_not_finite(model: nn.Module) -> str:
    """Why a model's logits are not numbers: the first weight that is none, else its range."""
    narrow = "the dtype is too narrow for this model; try another dtype"
    return damaged_weight(model) or narrow
