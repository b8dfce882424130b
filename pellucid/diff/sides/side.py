"""The two sides of a diff: whatever can say what it computed, and maybe from which weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pellucid import graph
from pellucid.devices import check_room
from pellucid.models import Cache
from pellucid.models.quantised import FullWeights, is_quantised
from pellucid.numerics import ROUNDINGS, Dialect, dialect
from pellucid.prompts import padded
from pellucid.trace import Trace, set_step, trace
from pellucid.trace_plan import run_bytes

Batch = Sequence[Sequence[int]]  # token ids; rows of different length are padded on the left
Run = Callable[[Batch, int], Trace]


@dataclass(kw_only=True)
class Side:
    """One implementation of a model, or what it left behind.

    config, dialect, weights   None where a side cannot say (a trace file, a foreign engine)
    encode     text -> token ids, or None
    run        (rows of token ids, decoding steps) -> what was observed; None for a recording
    recorded   the observations of a side that cannot be run
    specials   name -> id of the special tokens, where there is a tokenizer
    explained  what is declared to differ, for example "int8 weights"; widens nothing, names it
    types      parameter -> the GGUF type that its file declares
    blocks     parameter -> its bytes in that file, (rows, bytes of a row)
    coarse     its products round more than its dtype does (matrices of few bits may round their
               inputs too): then single bits say nothing
    """

    label: str
    dtype: torch.dtype
    config: Any = None
    dialect: Dialect | None = None
    weights: Mapping[str, Tensor] | None = None
    encode: Callable[[str], list[int]] | None = None
    run: Run | None = None
    recorded: Trace | None = None
    bos_id: int | None = None
    specials: Mapping[str, int] | None = None
    explained: str = ""
    types: Mapping[str, str] = field(default_factory=dict)
    blocks: Callable[[str], Tensor] | None = None
    coarse: bool = False

    def weight(self, name: str) -> Tensor | None:
        """A parameter as stored, or None."""
        return None if self.weights is None else self.weights.get(name)

    def observe(self, rows: Batch, steps: int) -> Trace:
        """What this side computes for the rows; a recording must be of the same tokens."""
        if self.run is not None:
            return self.run(rows, steps)
        if self.recorded is None:
            raise ValueError(f"{self.label} can neither be run nor was it recorded")
        own = recorded_rows(self.recorded)
        if own is not None and own != [list(row) for row in rows]:
            raise ValueError(
                f"{self.label} is a trace of other tokens: it holds {_short(own)}, the run is of "
                f"{_short(rows)}; record it again on this prompt, or give the prompt it was made of"
            )
        return self.recorded


def recorded_rows(seen: Trace) -> list[list[int]] | None:
    """Token ids of the first pass of a trace, or None where it does not hold them."""
    if "tokens" in seen:
        return torch.atleast_2d(seen["tokens"]).tolist()
    stated = seen.meta.get("tokens")
    return [list(stated)] if isinstance(stated, list) else None


def _short(rows: Batch) -> str:
    first = list(rows[0])
    more = " …" if len(first) > 6 else ""
    return f"{len(rows)} × {len(first)} tokens {' '.join(map(str, first[:6]))}{more}"


def from_model(
    model: Any,
    label: str,
    *,
    encode: Callable[[str], list[int]] | None = None,
    bos_id: int | None = None,
    specials: Mapping[str, int] | None = None,
    fused: bool = False,
    copies: int = 1,
) -> Side:
    """A side that runs one of our own models (`pellucid.models`), traced.

    fused   watch the fused attention kernel instead of the named steps
    copies  run every row so many times in one batch, and look at the first: other kernels, the
            same numbers

    ValueError for a model that has no values for some of its weights.
    """

    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{label}: a diff needs the weights in memory: load without stream")

    def run(rows: Batch, steps: int) -> Trace:
        demand_room(model, len(rows) * copies, max(map(len, rows)), steps)
        repeated = [row for _ in range(copies) for row in rows]
        following = getattr(rows, "following", None)
        with trace(model, fused=fused) as seen:
            _run_model(model, repeated, steps, following and following * copies)
        return seen if copies == 1 else _first_rows(seen, len(rows))

    return Side(
        label=label,
        dtype=model.dtype,
        config=model.config,
        dialect=model.dialect,
        weights=FullWeights(model) if is_quantised(model) else dict(model.state_dict()),
        encode=encode,
        run=run,
        bos_id=bos_id,
        specials=specials,
    )


def demand_room(model: Any, rows: int, tokens: int, steps: int) -> None:
    """ValueError where the trace of a pass over rows, and of steps after it, does not fit."""
    need = run_bytes(model.config, rows, tokens, steps, model.dtype.itemsize)
    what = f"a trace of {rows:,} × {tokens:,} tokens and {steps:,} steps"
    check_room(need, model.device, what, "give a shorter prompt, fewer steps or fewer copies")


def _run_model(model: Any, rows: Batch, steps: int, following: Batch | None) -> None:
    """One pass over the rows, then decoding steps with a cache: greedy, or along `following`."""
    device = model.device
    tokens, padding = padded(rows)
    tokens = tokens.to(device)
    padding = None if padding is None else padding.to(device)
    cache = Cache(model.config.n_layers) if steps else None
    for step in range(steps + 1):
        set_step(step)
        logits = model(tokens, cache=cache, starts=padding)
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        if following and step < steps:
            tokens = torch.tensor([[row[step]] for row in following], device=device)


def _first_rows(seen: Trace, rows: int) -> Trace:
    """The first rows of every tensor that has a batch axis."""
    batch = len(seen["tokens"])
    cut = {
        name: tensor[:rows] if len(tensor) == batch and _has_rows(name, tensor) else tensor
        for name, tensor in seen.items()
    }
    return Trace(cut, seen.meta)


def _has_rows(name: str, tensor: Tensor) -> bool:
    """With left padding even positions, masks and tables have an axis for the batch."""
    return graph.has_batch(name) or tensor.ndim > len(graph.dims(name))


def from_trace(seen: Trace, label: str) -> Side:
    """A side that was recorded; its metadata says in which dtype and dialect, if anything does."""
    if not any(graph.known(name) for name in seen):
        raise ValueError(
            f"{label}: none of its {len(seen)} tensors has a known name (the first is "
            f"{next(iter(seen), 'none')!r}); give a name map"
        )
    stated = getattr(torch, str(seen.meta.get("dtype", "")), None)
    held = {tensor.dtype for tensor in seen.values() if tensor.is_floating_point()}
    coarsest = max(held, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    spoken = seen.meta.get("dialect")
    rounding = seen.meta.get("rounding", seen.meta.get("family"))
    return Side(
        label=label,
        dtype=stated if isinstance(stated, torch.dtype) else coarsest,
        dialect=dialect(spoken, rounding) if spoken and rounding in ROUNDINGS else None,
        recorded=seen,
    )
