"""A live transformers model watched with its gradients: one forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pellucid.diff.sides.transformers import ForeignWatch, blocks_of
from pellucid.step_recording import GRADIENT
from pellucid.trace import Trace


class _GradientWatch(ForeignWatch):
    """Also keeps the gradient at everything that is kept.

    What is kept may be a view that was made only to look at, (B, heads, T, D) of what a projection
    gave as (B, T, heads · D): no gradient ever reaches it. So the tensor that it is a view of is
    asked, and its gradient seen through the same window.
    """

    def __init__(self, model: Any, blocks: Any, gpt2: bool) -> None:
        super().__init__(model, blocks, gpt2)
        self.gradients: dict[str, Tensor] = {}

    def keep(self, name: str, tensor: Tensor, instead: bool = False) -> None:
        super().keep(name, tensor, instead)
        if not tensor.requires_grad:
            return
        source = tensor if tensor._base is None else tensor._base
        window = tensor.shape, tensor.stride(), tensor.storage_offset() - source.storage_offset()

        def arrived(gradient: Tensor) -> None:
            if name not in self.gradients:
                whole = torch.empty_strided(
                    source.shape, source.stride(), dtype=gradient.dtype, device=gradient.device
                ).copy_(gradient)
                self.gradients[name] = whole.as_strided(*window).clone()

        source.register_hook(arrived)


@contextmanager
def foreign_pass(model: Any, label: str) -> Iterator[dict[str, Tensor]]:
    """Everything one forward and backward pass inside the context shows, under our names.

    The gradients stand under ``grad.NAME``; the mapping is filled when the context ends.
    """
    watch = _GradientWatch(model, blocks_of(model, label), hasattr(model.base_model, "wpe"))
    found: dict[str, Tensor] = {}
    with watch.hooks():
        yield found
    found |= dict(Trace(watch.trace()))
    found |= {GRADIENT + name: gradient for name, gradient in watch.gradients.items()}
