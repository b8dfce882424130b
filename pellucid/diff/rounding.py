"""Whether one tensor is another in a coarser type, and how precise the values of one are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

PIECE = 1 << 22  # values looked at in float64 at a time
SPREAD = 0.6  # of rounding's RMS error; less is no rounding of numbers anywhere between the levels


def gives(candidate: Tensor, y: Tensor) -> bool:
    """Equal in y's dtype; a piece at a time, so that no second copy of a large table is made."""
    return all(torch.equal(part.to(held.dtype), held) for _, part, held in pieces(candidate, y))


def pieces(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, rows of x, rows of y), at most about `PIECE` values at a time."""
    rows = max(1, PIECE * len(x) // max(1, x.numel()))
    for first in range(0, len(x), rows):
        yield first, x[first : first + rows], y[first : first + rows]


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def precision(x: Tensor) -> float:
    """Unit roundoff of the coarsest of bfloat16, float16 and x's dtype that holds all of x."""
    for coarse in (torch.bfloat16, torch.float16):
        if x.dtype == coarse or all(_holds(part, coarse) for part in x.flatten().split(PIECE)):
            return torch.finfo(coarse).eps / 2
    return torch.finfo(torch.float32).eps / 2


def _holds(part: Tensor, coarse: torch.dtype) -> bool:
    return bool((part.to(coarse).to(part.dtype) == part).all())


def rounding_spread(fine: Tensor, coarse: Tensor) -> float:
    """RMS of fine − coarse in units of what rounding to the type of `coarse` (16 bits) makes."""
    spacing = {torch.bfloat16: 7, torch.float16: 10}[coarse.dtype]
    error = total = 0.0
    for x, y in zip(fine.flatten().split(PIECE), coarse.flatten().split(PIECE), strict=True):
        x, y = x.double(), y.double()
        kept = (y != 0) & y.isfinite()
        ulp = torch.exp2(y[kept].abs().log2().floor() - spacing)
        error += float(((x[kept] - y[kept]) / ulp).pow(2).sum())
        total += float(kept.sum()) / 12
    return (error / max(total, 1e-300)) ** 0.5


def rounded(x: Tensor, y: Tensor) -> Iterator[tuple[str, str, Literal["explained"], Tensor]]:
    """One side's values in a coarser type, to the nearest or cut off; every value must be it."""
    if x.dtype != y.dtype:
        stored = f"A stored as {dtype_name(x.dtype)}, B as {dtype_name(y.dtype)}"
        yield "other dtype", stored, "explained", x
        if x.shape == y.shape and gives(y.to(x.dtype), x) and _unrounded(y, x):
            yield "other dtype", stored, "explained", y
        if y.dtype in (torch.bfloat16, torch.float16) and x.dtype.itemsize > 2:
            finding = f"{stored}, values cut off instead of rounded"
            yield "other dtype", finding, "explained", _cut_off(x, y.dtype)
        return
    if x.shape != y.shape or x.dtype.itemsize <= 2:
        return
    for coarse in (torch.bfloat16, torch.float16):
        for mine, theirs, words in ((x, y, "B holds A's values"), (y, x, "A holds B's values")):
            if not gives(theirs[:1].to(coarse).to(theirs.dtype), theirs[:1]):
                continue  # the first row tells, before a large table is copied
            for made, how in ((mine.to(coarse), "rounded"), (_cut_off(mine, coarse), "cut off")):
                whole = made.to(x.dtype)
                proven = mine is x or _unrounded(mine, made)
                if whole.isfinite().all() and gives(whole, theirs) and proven:
                    finding = f"{words} {how} through {dtype_name(coarse)}"
                    yield "rounded weights", finding, "explained", y


def _unrounded(fine: Tensor, coarse: Tensor) -> bool:
    """Whether finer values lie anywhere between the coarse ones, not all a little beside them."""
    narrow = coarse.dtype in (torch.bfloat16, torch.float16)
    return not narrow or rounding_spread(fine, coarse) >= SPREAD


def _cut_off(x: Tensor, coarse: torch.dtype) -> Tensor:
    """x in a coarser type, rounded towards zero."""
    near = x.to(coarse)
    beyond = near.to(x.dtype).abs() > x.abs()
    whole = near.view(torch.int16)  # one less in size, whatever the sign
    return torch.where(beyond, whole - 1, whole).view(coarse)
