"""Activation checkpointing: a block keeps its input only, and runs again when its gradient is due.

Memory of a forward pass falls from everything every block computes to one (B, T, C) tensor per
block, for one more forward pass of the blocks (Chen et al., Training Deep Nets with Sublinear
Memory Cost, 2016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pellucid import trace
from pellucid.models import Model
from pellucid.train.lean_products import LeanProducts


def recompute_blocks(model: Model) -> None:
    """Make every block of `model`, in place, recompute in backward; names of parameters stay."""
    for block in model.layers:
        _recompute(block)


def _recompute(block: nn.Module) -> None:
    forward = block.forward

    def recomputed(*inputs: Any) -> Any:
        if trace.is_open() and torch.is_grad_enabled():
            raise ValueError(
                "a trace with gradients cannot watch a model under activation checkpointing, whose "
                "blocks run twice: switch one of the two off"
            )
        kind = inputs[0].device.type
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(kind):
            return checkpoint(forward, *inputs, use_reentrant=False)
        dtype = torch.get_autocast_dtype(kind)

        def products() -> tuple[LeanProducts, LeanProducts]:
            """Of the pass, and of the pass again: what they save for backward must be the same."""
            return LeanProducts(dtype), LeanProducts(dtype)

        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=products)

    block.forward = recomputed
