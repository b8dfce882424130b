"""The logits of a checkpoint over a short prompt, one block in memory at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pellucid.checkpoints.load import Checkpoint
from pellucid.checkpoints.weights import Weights, empty_model
from pellucid.models import Config

_TOKENS = 16


def probe_tokens(config: Config) -> list[int]:
    """Up to 16 token ids, spread evenly over the vocabulary."""
    count = min(_TOKENS, config.context_length)
    return [place * (config.vocab_size - 1) // max(count - 1, 1) for place in range(count)]


def probe_logits(
    checkpoint: Checkpoint, tokens: list[int], dtype: torch.dtype, dialect: str
) -> Tensor:
    """tokens (T) -> logits (T, V): those of `load_model`, bit for bit, without loading the model.

    Embedding, head and final norm stay, a block is there while it computes. Each tensor is copied,
    so that the products do not depend on where in a file it lies.
    """
    model = empty_model(checkpoint.config, dialect).eval()
    weights = checkpoint.weights.reopened()
    outside = [name for name in weights if not name.startswith("layers.")]
    model.load_state_dict(
        {name: _copy(weights, name, dtype) for name in outside}, strict=False, assign=True
    )
    for number, block in enumerate(model.layers):
        prefix = f"layers.{number}."
        inside = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}

        def fill(block: nn.Module, _inputs: Any, inside: dict[str, str] = inside) -> None:
            found = {leaf: _copy(weights, name, dtype) for leaf, name in inside.items()}
            block.load_state_dict(found, assign=True)

        block.register_forward_pre_hook(fill)
        block.register_forward_hook(_empty)
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


def _empty(block: nn.Module, _inputs: Any, _output: Any) -> None:
    block.to_empty(device="meta")


def _copy(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    copy = weights[name].to(dtype, copy=True, memory_format=torch.contiguous_format)
    weights.forget(name)
    return copy
