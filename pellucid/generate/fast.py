"""Decoding steps by the fast way where there is one, and the reason where there is none.

On the CPU that is the decoder in C (`generate/native`). On a GPU it is the model's own code,
compiled and replayed as a CUDA graph (`generate/compiled.py`); compiling takes a while, so only who
asks for it gets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid import trace
from pellucid.generate import native
from pellucid.models import Cache, Model
from pellucid.trace import Trace


class FastSteps:
    """Runs one-token steps of a generation in C, or says that it does not.

    The library is compiled once per machine. Until it is there, and wherever it cannot run a model,
    steps stay with the model's own code, which gives the same logits up to rounding.
    """

    def __init__(self, model: Model, length: int, wanted: bool | None) -> None:
        """length: of the longest row, in tokens; wanted: None where possible, True, or False never.

        ValueError where it is wanted and not possible, with the reason.
        """
        self._model, self._length = model, length
        self._decoder: native.Decoder | None = None
        self._compiled: Any = None
        self._on_gpu = model.norm.weight.device.type == "cuda"
        self._possible = bool(wanted) if self._on_gpu else wanted is not False
        if not self._possible or self._on_gpu:
            return
        problem = native.unsupported(model)
        if wanted and problem:
            raise ValueError(f"the fast engine cannot run this model: {problem}")
        self._possible = problem is None
        if wanted:
            try:
                native.library()
            except native.NotBuilt as reason:
                raise ValueError(f"the fast engine is not available: {reason}") from None

    def step(
        self,
        tokens: Sequence[int],
        cache: Cache,
        starts: Sequence[int],
        recording: native.Recording | None = None,
    ) -> Tensor | None:
        """One token per row after what `cache` holds -> logits (B, V), or None: not this way.

        An open trace is for the model's own code, which names its steps.
        """
        if not self._possible or trace.is_open() or cache.length >= self._length:
            return None
        if self._on_gpu:
            from pellucid.generate.compiled import CompiledSteps  # imports torch's compiler

            if self._compiled is None or self._compiled.cache is not cache:
                self._compiled = CompiledSteps(self._model, cache, self._length)
            return self._compiled.step(tokens, cache, starts)
        if len(tokens) > native.MOST_ROWS:
            return None
        if self._decoder is None:
            made = native.building().ready()
            if made is None:
                return None
            self._decoder = native.Decoder(made, self._model, length=self._length)
        seen = cache.length
        cache.reserve(min(self._length, max(seen + 64, 2 * seen)))
        return self._decoder.step(tokens, cache, starts, recording)


def trace_fast(model: Model, rows: Sequence[Sequence[int]], steps: int) -> Trace:
    """Every tensor of `rows` and of decoding steps after them, the steps as the C decoder computes.

    The rows' own pass is the model's code, step 0. Steps are greedy, or along ``rows.following``
    where rows have it: tokens (B, steps). The C code does not write down attention's scores and
    pattern, so they are not in it. ValueError where the fast engine cannot run the model.
    """
    longest = max(map(len, rows))
    starts = [longest - len(row) for row in rows]
    tokens = torch.tensor(
        [[0] * start + list(row) for start, row in zip(starts, rows, strict=True)]
    )
    cache, dtype = Cache(model.config.n_layers), model.norm.weight.dtype
    engine = FastSteps(model, longest + steps, wanted=True)
    following: Sequence[Sequence[int]] | None = getattr(rows, "following", None)
    with trace.trace(model, fused=True) as seen:
        padding = torch.tensor(starts) if any(starts) else None
        logits = model(tokens, cache=cache, starts=padding)[:, -1]
    for step in range(steps):
        chosen = [row[step] for row in following] if following else logits.argmax(-1).tolist()
        recording, place = native.Recording(), cache.length
        logits = engine.step(chosen, cache, starts, recording)
        assert logits is not None, "a model that was accepted is decoded"
        positions = torch.tensor([[place - start] for start in starts])
        found = {"tokens": torch.tensor(chosen)[:, None]}
        found["positions"] = positions if any(starts) else positions[0]
        computed = recording.named() | {"logits": logits[:, None]}
        found |= {name: value.to(dtype) for name, value in computed.items()}
        for name, value in found.items():
            seen[f"step.{step + 1}.{name}"] = value
    return seen
