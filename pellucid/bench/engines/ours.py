"""Pellucid as an engine: the same `generate_tokens` that a user calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pellucid import checkpoints
from pellucid.bench.limits import decode_bytes
from pellucid.generate import Sampling, generate_tokens, native

_QUANTISED = ("int8", "int4")


class Runner:
    """A model of ours; `fast` chooses between the plain passes and the fast engine."""

    def __init__(self, path: Path, threads: int, dtype: str, fast: bool) -> None:
        torch.set_num_threads(threads)
        self._path, self._dtype, self._fast = path, dtype, fast

    def prepare(self) -> dict[str, Any]:
        """Map the checkpoint; a quantised one is a folder of its own, and says so itself."""
        checkpoint = checkpoints.open_checkpoint(self._path)
        stored = None if self._dtype in _QUANTISED else getattr(torch, self._dtype)
        self._model = checkpoints.load_model(checkpoint, dtype=stored)
        held = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        sizes = {name: tensor.nbytes for name, tensor in held.items()}
        mode = "plain passes, fused attention"
        if self._fast:
            mode = f"the decoder in C, {native.instruction_sets()[0]}"
        return {"decode_bytes": decode_bytes(sizes), "settings": mode}

    def settle(self) -> None:
        """What a long-lived process has done sooner or later: weights on large pages."""
        if self._fast:
            native.settle(self._model)

    def prefill(self, rows: Sequence[Sequence[int]], new: int) -> list[int]:
        """Begin a generation; its first step is the prefill."""
        self._generation = generate_tokens(
            self._model,
            rows,
            sampling=Sampling(temperature=0.0),
            max_new_tokens=new + 1,
            fast=self._fast,
            lookup=False,  # random weights repeat themselves: steps are what is measured
        )
        return _whole(next(self._generation))

    def decode(self, n: int) -> list[list[int]]:
        """`n` steps of the generation."""
        return [_whole(next(self._generation)) for _ in range(n)]

    def close(self) -> None:
        """Nothing to release: memory goes with the object."""


def _whole(step: Sequence[int | None]) -> list[int]:
    tokens = [token for token in step if token is not None]
    assert len(tokens) == len(step), "a row ended early, though nothing stops it"
    return tokens
