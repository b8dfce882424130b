"""The proof that a conversion lost nothing: every parameter by digest, and the logits of a prompt.

Both sides are read one tensor at a time, and computed with one block in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.checkpoints.load import Checkpoint
from pellucid.checkpoints.weights import Weights
from pellucid.checkpoints.writers import bytes_of
from pellucid.models import Config, empty_model
from pellucid.models.finite import check_finite

_TOKENS = 16
# stage, done, in all: bytes, but for the logits, which come in two steps
Progress = Callable[[str, int, int], None]
Change = Callable[[str, Tensor], Tensor]


class Reader:
    """Reads the source's parameters in the dtype asked for, and remembers what they were."""

    def __init__(
        self,
        weights: Weights,
        dtypes: Mapping[str, torch.dtype],
        stage: str,
        progress: Progress | None,
        change: Change = lambda name, tensor: tensor,
    ) -> None:
        """`change` makes of a parameter what the layout can hold of it."""
        self._change = change
        self.digests: dict[str, str] = {}
        self._weights, self._dtypes = weights, dtypes
        self._stage, self._progress = stage, progress
        self._last: str | None = None
        self._done = 0
        self._total = sum(
            torch.Size(weights.shape(name)).numel() * dtypes[name].itemsize for name in weights
        )

    def __call__(self, name: str) -> Tensor:
        """The parameter; the one before it is needed no more. ValueError past the dtype's range."""
        self.finish()
        stored = self._weights[name]
        check_finite(name, stored)
        tensor = stored.to(self._dtypes[name])
        if tensor is not stored and (lost := int((tensor.isinf() & ~stored.isinf()).sum())):
            raise ValueError(
                f"{name}: {lost:,} values do not fit {word(tensor.dtype)}, the largest is "
                f"{stored.abs().max().item():.3g}; keep {word(stored.dtype)} or take a wider one"
            )
        tensor = self._change(name, tensor)
        self.digests[name], self._last = _digest(name, tensor), name
        self._done += tensor.nbytes
        if self._progress:
            self._progress(self._stage, self._done, self._total)
        return tensor

    def finish(self) -> None:
        """Hand back the memory of what was read last."""
        if self._last is not None:
            self._weights.forget(self._last)
        self._last = None


class AsWritten(Weights):
    """A checkpoint's weights as a layout holds them that rounds some."""

    def __init__(self, weights: Weights, change: Change) -> None:
        self._weights, self._change = weights, change
        self.forget, self._recipes = weights.forget, weights._recipes

    def __getitem__(self, name: str) -> Tensor:
        return self._change(name, self._weights[name])

    def reopened(self, dtype: torch.dtype | None = None) -> AsWritten:
        """The same through a mapping of its own."""
        return AsWritten(self._weights.reopened(dtype), self._change)


def word(dtype: torch.dtype) -> str:
    """What users call a dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _digest(name: str, tensor: Tensor) -> str:
    """SHA-256 of what a parameter is: its name, dtype, shape, and values row by row."""
    found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    found.update(bytes_of(tensor))
    return found.hexdigest()


def overall(digests: Mapping[str, str]) -> str:
    """One SHA-256 of all parameters, whatever order they are stored in."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def check_tensors(digests: Mapping[str, str], weights: Weights, progress: Progress | None) -> None:
    """ValueError unless every parameter comes back from the files as it was read."""
    again = Reader(weights, {name: weights.dtype(name) for name in weights}, "checking", progress)
    for name in weights:
        again(name)
    again.finish()
    apart = [name for name in digests if again.digests.get(name) != digests[name]]
    if apart or again.digests.keys() != digests.keys():
        raise ValueError(
            f"{len(apart)} of {len(digests)} tensors came back otherwise than they were read: "
            f"{', '.join(apart[:6])}; nothing was kept"
        )


def check_logits(opened: Checkpoint, written: Checkpoint, progress: Progress | None) -> int:
    """ValueError unless both compute the same logits; the length of the prompt."""
    tokens = probe_tokens(opened.config)
    both = []
    for number, checkpoint in enumerate((opened, written)):
        if progress:
            progress("computing logits", number, 2)
        both.append(probe_logits(checkpoint, tokens, written.dtype, opened.dialect))
    if progress:
        progress("computing logits", 2, 2)
    before, after = both
    if bytes_of(before) != bytes_of(after):
        largest = (before - after).abs().max().item()
        raise ValueError(
            f"the logits over {len(tokens)} tokens differ by up to {largest:.3g} although every "
            "tensor is the same; nothing was kept"
        )
    return len(tokens)


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
