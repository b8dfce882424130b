"""Decoding steps by the fast way where there is one, and the reason where there is none.

On the CPU that is the decoder in C (`generate/native`). On a GPU it is the model's own code,
compiled and replayed as a CUDA graph (`generate/compiled.py`); compiling takes a while, so it is
done only on request.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pellucid import trace
from pellucid.generate import native
from pellucid.generate.paged import PagedCache
from pellucid.models import Cache, Config, Model
from pellucid.models.quantised import is_quantised
from pellucid.trace import Trace

# Tokens of a prompt up to which C is quicker than PyTorch's products of whole matrices.
SHORT = {torch.float32: 16, torch.bfloat16: native.MOST, torch.float16: native.MOST}


class FastSteps:
    """Runs the steps of a generation in C; `step` gives None where it cannot.

    The library is compiled once per machine. Until it is there, and wherever it cannot run a model,
    steps stay with the model's own code, which gives the same logits up to rounding.
    """

    def __init__(self, model: Model, length: int, wanted: bool | None) -> None:
        """length: of the longest row, in tokens; wanted: None where possible, True, or False never.

        ValueError where it is wanted and not possible, with the reason.
        """
        self.model, self.length = model, length
        self._made: ctypes.CDLL | None = None
        self._decoder: native.NativeDecoder | None = None
        self._compiled: Any = None
        self._on_gpu, self._quantised = model.device.type == "cuda", is_quantised(model)
        self._possible = bool(wanted) if self._on_gpu else wanted is not False
        if not self._possible or self._on_gpu:
            return
        problem = native.unsupported(model)
        if wanted and problem:
            raise ValueError(f"the fast engine cannot run this model: {problem}")
        self._possible = problem is None
        if wanted:
            try:
                self._made = native.library()
            except native.NotBuilt as reason:
                raise ValueError(f"the fast engine is not available: {reason}") from None

    def step(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Cache,
        starts: Sequence[int],
        recording: native.Recording | None = None,
    ) -> Tensor | None:
        """Tokens (B, T) after what `cache` holds -> logits (B, V), or None: not this way.

        One token per row is a decoding step. More are a prompt; a long one PyTorch's products of
        whole matrices take in faster, unless the matrices are quantised, which go through it here
        as they are. An open trace is for the model's own code, which names its steps.
        """
        rows, length = len(tokens), len(tokens[0])
        if not self._possible or trace.is_open() or cache.length + length > self.length:
            return None
        if self._on_gpu:
            return (
                self._on_gpu_step(tokens, cache, starts) if length == 1 and cache.length else None
            )
        short = self._quantised or length == 1 or rows * length <= SHORT[self.model.dtype]
        if rows > native.MOST or not short:
            return None
        end = cache.length + length
        if turned_anew(self.model.config, end - min(starts, default=0)):
            return None
        decoder = self._ready_decoder()
        if decoder is None:
            return None
        self._begin(cache, rows, length)
        logits, at_once, begin = None, native.MOST // rows, time.perf_counter()
        for first in range(0, length, at_once):
            some = [row[first : first + at_once] for row in tokens]
            last = first + at_once >= length
            logits = decoder.step(some, cache, starts, recording, wanted=last, end=end)
        self._settle(decoder, time.perf_counter() - begin)
        return logits

    def read(self, tokens: Sequence[int], cache: Cache) -> Tensor:
        """Tokens of one text after what `cache` holds -> logits (1, V), the fast way or not."""
        logits = self.step([tokens], cache, [0])
        if logits is None:
            with torch.no_grad():
                given = torch.tensor([tokens], device=self.model.device)
                logits = self.model(given, cache=cache, last=True)[:, -1]
        return logits

    def wait(self) -> None:
        """Until the library is compiled, where it can be: no pass goes another way because it is
        an early one."""
        if self.in_c and self._made is None:
            with suppress(native.NotBuilt):
                self._made = native.library()

    @property
    def in_c(self) -> bool:
        """Whether steps go through C, as soon as it is compiled."""
        return self._possible and not self._on_gpu

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts of any length go through C as well."""
        return self.in_c and self._quantised

    def reads(self, tokens: int, cache: Cache) -> bool:
        """Whether so many tokens of a prompt can be rows of `step_each`, all or a part of them."""
        if not self.in_c or trace.is_open() or cache.length + tokens > self.length:
            return False
        return self._quantised or 0 < tokens <= SHORT[self.model.dtype]

    def joins(self, cache: Cache) -> bool:
        """Whether the next token after what `cache` holds can be a row of `step_each`."""
        if not self.in_c or trace.is_open():
            return False
        end = cache.length + 1
        return end <= self.length and not turned_anew(self.model.config, end)

    def step_each(
        self,
        tokens: Sequence[Sequence[int]],
        caches: Sequence[Cache],
        wanted: Sequence[int] | None = None,
    ) -> list[Tensor] | None:
        """Tokens after what each of several caches holds -> logits (N, V) of each, or None.

        wanted: N of each, of how many of its last tokens logits are given; None: of one. One pass
        over the weights for all; each row's bits are those it has alone.
        """
        decoder = self._ready_decoder()
        if decoder is None:
            return None
        found, begin = [], time.perf_counter()
        for row, cache in zip(tokens, caches, strict=True):
            self._begin(cache, 1, len(row))
        first = 0
        while first < len(tokens):
            last = first + 1
            while last < len(tokens) and sum(map(len, tokens[first : last + 1])) <= native.MOST:
                last += 1
            counts = [1] * (last - first) if wanted is None else list(wanted[first:last])
            rows, places = [], []
            for row, cache, count in zip(
                tokens[first:last], caches[first:last], counts, strict=True
            ):
                joined = len(row) - count + 1
                rows += [row[:joined], *([one] for one in row[joined:])]
                places += [cache] * count
            found += [some.clone() for some in decoder.step(rows, places).split(counts)]
            first = last
        self._settle(decoder, time.perf_counter() - begin)
        return found

    def step_ahead(self, tokens: Sequence[int], cache: Cache) -> tuple[Tensor, float] | None:
        """Tokens (T) of one text after what its cache holds -> logits (T, V) after each, seconds.

        One pass over the weights; the logits after a token are the bits that a step of it alone
        would give. None where the decoder is not there yet.
        """
        decoder = self._ready_decoder()
        if decoder is None:
            return None
        self._begin(cache, 1, len(tokens))
        begin = time.perf_counter()
        logits = decoder.step([[token] for token in tokens], [cache] * len(tokens))
        seconds = time.perf_counter() - begin
        self._settle(decoder, seconds)
        return logits, seconds

    def _ready_decoder(self) -> native.NativeDecoder | None:
        if self._decoder is None and (made := self._made or native.building().ready()) is not None:
            self._decoder = native.NativeDecoder(made, self.model, length=self.length)
        return self._decoder

    def _settle(self, decoder: native.NativeDecoder, seconds: float) -> None:
        """After a step that took so long: move matrices to large pages where it pays by now."""
        account, left = native.account(self.model), decoder.unsettled
        account.decoded(seconds)
        if left and account.pays(left):
            begin = time.perf_counter()
            moved = left - decoder.settle()
            account.moved(moved, time.perf_counter() - begin)

    def _begin(self, cache: Cache, rows: int, length: int) -> None:
        """Room for `length` more tokens in the cache, also of one that holds nothing yet."""
        if isinstance(cache, PagedCache):
            cache.reserve(cache.length + length)
            return
        config = self.model.config
        room = min(self.length, max(cache.length + length + 64, 2 * cache.length))
        for layer in cache.layers:
            if layer.k is None:
                like = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
                layer.begin(rows, config.n_kv_heads, room, like, config.head_dim)
        cache.reserve(room)

    def _on_gpu_step(
        self, tokens: Sequence[Sequence[int]], cache: Cache, starts: Sequence[int]
    ) -> Tensor:
        from pellucid.generate.compiled import CompiledSteps  # imports torch's compiler

        if self._compiled is None or self._compiled.cache is not cache:
            self._compiled = CompiledSteps(self.model, cache, self.length)
        return self._compiled.step([row[0] for row in tokens], cache, starts)


def decodes_in_c(model: Model, fast: bool | None) -> bool:
    """Whether a model's steps go through C from the first one on; ValueError as for `FastSteps`."""
    if fast is False or trace.is_open() or model.device.type != "cpu":
        return False
    if fast:
        FastSteps(model, 1, True)
    elif native.unsupported(model):
        return False
    return bool(fast) or native.building().ready() is not None


def turned_anew(config: Config, length: int) -> bool:
    """Whether a text of so many tokens is run whole at every step, as C does not.

    Beyond its original context dynamic RoPE has other frequencies for each length.
    """
    ropes = [rope for rope in (config.rope, config.second_rope) if rope and rope.type == "dynamic"]
    return any(length > (rope.original_context or 1) for rope in ropes)


def trace_fast(model: Model, rows: Sequence[Sequence[int]], steps: int) -> Trace:
    """Every tensor of `rows` and of decoding steps after them, the steps as the C decoder computes.

    The rows' own pass is the model's code, step 0. Steps are greedy, or along ``rows.following``
    where rows have it: tokens (B, steps). The C code does not write down attention's scores and
    pattern, so they are not in it. ValueError where the fast engine cannot run the model.
    """
    longest = max(map(len, rows))
    if turned_anew(model.config, longest + steps):
        raise ValueError(
            f"the fast engine cannot trace {longest + steps} tokens of this model: dynamic RoPE "
            "turns every position anew beyond its original context"
        )
    starts = [longest - len(row) for row in rows]
    tokens = torch.tensor(
        [[0] * start + list(row) for start, row in zip(starts, rows, strict=True)]
    )
    cache, dtype = Cache(model.config.n_layers), model.dtype
    engine = FastSteps(model, longest + steps, wanted=True)
    following: Sequence[Sequence[int]] | None = getattr(rows, "following", None)
    with trace.trace(model, fused=True) as seen:
        padding = torch.tensor(starts) if any(starts) else None
        logits = model(tokens, cache=cache, starts=padding)[:, -1]
    for step in range(steps):
        chosen = [row[step] for row in following] if following else logits.argmax(-1).tolist()
        recording, place = native.Recording(), cache.length
        logits = engine.step([[token] for token in chosen], cache, starts, recording)
        assert logits is not None, "a model that was accepted is decoded"
        positions = torch.tensor([[place - start] for start in starts])
        found = {"tokens": torch.tensor(chosen)[:, None]}
        found["positions"] = positions if any(starts) else positions[0]
        computed = recording.named() | {"logits": logits[:, None]}
        found |= {name: value.to(dtype) for name, value in computed.items()}
        for name, value in found.items():
            seen[f"step.{step + 1}.{name}"] = value
    return seen
