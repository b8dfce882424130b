"""Two tensors and their difference, made small enough for a page.

A cell stands for a block of values, and shows the one of them where B is farthest from R: an error
in one number in a million is still a visible cell.

    R and B  (B, H, T, S)  ->  panels, one per row and head  ->  cells (panels, rows, columns)
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor

from pellucid import graph
from pellucid.show.colours import scale_of

CELLS = 6144  # kept of a tensor that diverged: 96 × 64
FEW_CELLS = 2048  # of any other
PANELS = 16
MASKED_BELOW = -5e3  # a score that is switched off, whichever number an implementation writes

# One byte a cell. Values: 0 … 250 for −limit … +limit. Errors, relative to the size of R: 0 for
# none, 1 … 250 for 10^−9 … 10.
ZERO, STRONGEST, NOT_FINITE, NOTHING = 125, 250, 253, 255
SMALLEST_DECADE, DECADES = -9, 10


@dataclass(frozen=True, kw_only=True)
class MapPair:
    """R and B, reduced. reference, seen: (panels, rows, columns), float64, NaN beyond the edge.

    heads    which entries of the leading axes the panels are, as text
    left_out how many more there are, with smaller errors
    block    values per cell, down and across
    size     RMS of R, the unit of the errors
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    heads: tuple[str, ...]
    left_out: int
    block: tuple[int, int]
    reference: Tensor
    seen: Tensor
    size: float
    stats: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """What the page draws: bytes in base64, and how to read them."""
        panels, rows, columns = self.seen.shape
        masked = (self.reference <= MASKED_BELOW) & (self.seen <= MASKED_BELOW)
        masked |= (self.reference == self.seen) & self.seen.isinf()
        held = torch.cat((self.reference[~masked].flatten(), self.seen[~masked].flatten()))
        limit = scale_of(held.numpy()).limit
        return {
            "heads": self.heads,
            "left_out": self.left_out,
            "block": self.block,
            "rows": rows,
            "columns": columns,
            "panels": panels,
            "limit": limit,
            "size": self.size,
            "reference": _packed(_levels(self.reference, masked, limit)),
            "seen": _packed(_levels(self.seen, masked, limit)),
            "error": _packed(_decades(self.reference, self.seen, masked, self.size)),
        }


@dataclass
class Maps:
    """Collects a `MapPair` for every tensor a diff judges; `keep` is what the diff calls."""

    pairs: dict[str, MapPair] = field(default_factory=dict)

    def keep(self, name: str, reference: Tensor, seen: Tensor) -> None:
        """Reduce a pair of tensors and keep it; two shapes that do not broadcast are left out."""
        try:
            reference, seen = torch.broadcast_tensors(reference, seen)
        except RuntimeError:
            return
        if seen.numel():
            dims = graph.dims(name)
            dims = dims if len(dims) == seen.ndim else ("B", "H", *dims[-2:])[-seen.ndim :]
            if graph.known(name) and graph.row(name).leaf == "attn.pattern":
                reference, seen = _without_future(reference, seen)
            self.pairs[name] = reduced(reference, seen, dims, CELLS)


def reduced(reference: Tensor, seen: Tensor, dims: Sequence[str], cells: int) -> MapPair:
    """A pair of at most about `cells` cells."""
    x, y = (_as_panels(tensor) for tensor in (reference, seen))
    heads, chosen = _panels(x, y, dims, seen.shape[:-2])
    left_out = len(x) - len(chosen)
    size = _rms(x)
    stats = {"R": _stats(x), "B": _stats(y)}
    x, y = x[chosen], y[chosen]
    block = _block(x.shape[1], x.shape[2], max(64, cells // len(chosen)))
    x, y = _worst_of_blocks(x, y, block)
    return MapPair(
        dims=tuple(dims),
        shape=tuple(seen.shape),
        heads=heads,
        left_out=left_out,
        block=block,
        reference=x,
        seen=y,
        size=size,
        stats=stats,
    )


def _without_future(reference: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The pattern without what may not be looked at and is not: those cells have no value."""
    tokens, keys = seen.shape[-2:]
    future = torch.ones(tokens, keys, dtype=torch.bool, device=seen.device).triu(keys - tokens + 1)
    off = future & (reference == 0) & (seen == 0)
    return reference.masked_fill(off, float("-inf")), seen.masked_fill(off, float("-inf"))


def smaller(pair: MapPair, cells: int) -> MapPair:
    """The same with fewer cells."""
    panels, rows, columns = pair.seen.shape
    block = _block(rows, columns, max(64, cells // panels))
    if block == (1, 1):
        return pair
    x, y = _worst_of_blocks(pair.reference, pair.seen, block)
    both = (pair.block[0] * block[0], pair.block[1] * block[1])
    return MapPair(**{**pair.__dict__, "reference": x, "seen": y, "block": both})


def _as_panels(tensor: Tensor) -> Tensor:
    """(…, rows, columns) -> (panels, rows, columns) in float64."""
    wide = tensor.detach().to("cpu", torch.float64)
    return torch.atleast_2d(wide).reshape(-1, *torch.atleast_2d(wide).shape[-2:])


def _panels(
    x: Tensor, y: Tensor, dims: Sequence[str], lead: torch.Size
) -> tuple[tuple[str, ...], list[int]]:
    """Labels and places of the panels to show: all, or those that differ most."""
    errors = _error(x, y).flatten(1).amax(1)
    worst = errors.argsort(descending=True)[:PANELS].tolist()
    chosen = sorted(worst)
    words = {"B": "row", "H": "head", "Hkv": "kv head"}
    labels = []
    for place in chosen:
        index = [int(i) for i in torch.unravel_index(torch.tensor(place), lead)] if lead else []
        labels.append(
            ", ".join(
                f"{words.get(letter, letter)} {i}"
                for letter, i, length in zip(dims, index, lead, strict=False)
                if letter != "B" or length > 1
            )
        )
    return tuple(labels), chosen


def _block(rows: int, columns: int, cells: int) -> tuple[int, int]:
    down = across = 1
    while ceil(rows / down) * ceil(columns / across) > cells:
        if rows / down > columns / across:
            down += 1
        else:
            across += 1
    return down, across


def _worst_of_blocks(x: Tensor, y: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of each block the value of x and of y where they differ most."""
    if block == (1, 1):
        return x, y
    (down, across), (panels, rows, columns) = block, x.shape
    edge = (0, -columns % across, 0, -rows % down)
    error = torch.nn.functional.pad(_error(x, y), edge, value=-1.0)
    x, y = (torch.nn.functional.pad(tensor, edge, value=float("nan")) for tensor in (x, y))
    high, wide = x.shape[1] // down, x.shape[2] // across

    def blocks(tensor: Tensor) -> Tensor:
        """(P, rows, columns) -> (P, high, wide, values of a block)."""
        parts = tensor.reshape(panels, high, down, wide, across).transpose(2, 3)
        return parts.reshape(panels, high, wide, down * across)

    place = blocks(error).argmax(-1, keepdim=True)
    return blocks(x).gather(-1, place)[..., 0], blocks(y).gather(-1, place)[..., 0]


def _error(x: Tensor, y: Tensor) -> Tensor:
    """|y − x|; 0 where both are switched off, infinite where only y is not a number."""
    off = ((x <= MASKED_BELOW) & (y <= MASKED_BELOW)) | (x == y)
    error = torch.where(off, 0.0, (y - x).abs())
    return torch.nan_to_num(error, nan=float("inf"), posinf=float("inf"))


def _rms(x: Tensor) -> float:
    finite = x[x.isfinite() & (x > MASKED_BELOW)]
    return float(finite.pow(2).mean().sqrt()) if finite.numel() else 0.0


def _stats(x: Tensor) -> dict[str, float]:
    """min, max, mean and standard deviation of what is finite and not switched off."""
    finite = x[x.isfinite() & (x > MASKED_BELOW)]
    if not finite.numel():
        return {}
    return {
        "min": float(finite.min()),
        "max": float(finite.max()),
        "mean": float(finite.mean()),
        "std": float(finite.std(correction=0)),
        "not finite": int((x.isnan() | (x == float("inf"))).sum()),
    }


def _levels(x: Tensor, masked: Tensor, limit: float) -> Tensor:
    levels = (x / limit).clamp(-1, 1) * ZERO + ZERO
    levels = torch.where(x.isfinite(), levels.round(), float(NOT_FINITE))
    return torch.where(masked, float(NOTHING), levels)


def _decades(x: Tensor, y: Tensor, masked: Tensor, size: float) -> Tensor:
    error = _error(x, y) / (size or 1.0)
    per_decade = STRONGEST / DECADES
    levels = (error.clamp(min=1e-300).log10() - SMALLEST_DECADE) * per_decade
    levels = torch.where(error == 0, 0.0, levels.round().clamp(1, STRONGEST))
    levels = torch.where(error.isfinite(), levels, float(NOT_FINITE))
    return torch.where(masked, float(NOTHING), levels)


def _packed(levels: Tensor) -> str:
    return base64.b64encode(levels.to(torch.uint8).numpy().tobytes()).decode()
