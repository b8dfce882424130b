"""Pellucid as an engine: the same `generate_tokens` that a user calls."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pellucid import checkpoints
from pellucid.bench.limits import decode_bytes
from pellucid.generate import Sampling, generate_tokens

_BITS = {"int8": 8, "int4": 4}


def missing(dtype: str, fast: bool) -> str:
    """Why this version cannot run so, or "" where it can."""
    if fast and "fast" not in inspect.signature(generate_tokens).parameters:
        return "this version of Pellucid has no fast engine"
    if dtype in _BITS and find_spec("pellucid.quantise") is None:
        return "this version of Pellucid does not quantise"
    return ""


class Runner:
    """A model of ours; `fast` chooses between the plain passes and the fast engine."""

    def __init__(self, path: Path, threads: int, dtype: str, fast: bool) -> None:
        torch.set_num_threads(threads)
        reason = missing(dtype, fast)
        if reason:
            raise ValueError(reason)
        self._path, self._dtype, self._fast = path, dtype, fast

    def prepare(self) -> dict[str, Any]:
        """Map the checkpoint, quantise where asked."""
        checkpoint = checkpoints.open_checkpoint(self._path)
        plain = self._dtype if self._dtype not in _BITS else "bfloat16"
        self._model = checkpoints.load_model(checkpoint, dtype=getattr(torch, plain))
        if self._dtype in _BITS:
            quantise = import_module("pellucid.quantise").quantise
            self._model = quantise(self._model, bits=_BITS[self._dtype]).eval()
        held = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        sizes = {name: tensor.nbytes for name, tensor in held.items()}
        mode = "generate_tokens(fast=True)" if self._fast else "plain passes, fused attention"
        return {"decode_bytes": decode_bytes(sizes), "settings": mode}

    def prefill(self, rows: Sequence[Sequence[int]], new: int) -> list[int]:
        """Begin a generation; its first step is the prefill."""
        mode: dict[str, Any] = {}
        if "fast" in inspect.signature(generate_tokens).parameters:
            mode["fast"] = self._fast
        self._generation = generate_tokens(
            self._model,
            rows,
            sampling=Sampling(temperature=0.0),
            max_new_tokens=new + 1,
            **mode,
        )
        return _whole(next(self._generation))

    def decode(self, n: int) -> list[list[int]]:
        """`n` steps of the generation."""
        return [_whole(next(self._generation)) for _ in range(n)]

    def close(self) -> None:
        """Nothing is held but memory."""


def _whole(step: Sequence[int | None]) -> list[int]:
    tokens = [token for token in step if token is not None]
    assert len(tokens) == len(step), "a row ended early, though nothing stops it"
    return tokens
