"""Whether one tensor is another in a coarser type, and how precise the values of one are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

PIECE = 1 << 22  # values looked at in float64 at a time
BINS = 64  # in which distances from the levels are counted, from −½ to ½
FEW = 4096  # values that may be too few for the distribution to tell
UNEVEN = 0.05  # by how much the distribution of many may be off a uniform one


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


def lies_anywhere(fine: Tensor, coarse: Tensor) -> bool:
    """Whether fine values lie anywhere between the levels of a 16-bit type next to them.

    Numbers that were rounded do: fine − coarse, in units of the last place, is spread evenly from
    −½ to ½. Numbers of the coarse type that were scaled or moved a little do not, though each still
    rounds to the one it came from. How far the two distributions are apart decides (Kolmogorov
    and Smirnov, chance below 10⁻⁶; `UNEVEN` is free: next to powers of two levels are closer).
    Numbers that were coarse once and were trained on lie close to those levels, but up to the
    edge at ±½ where rounding turns, and none beyond it: that says as much (`_fills_both_edges`).
    """
    mantissa, least = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}[coarse.dtype]
    counts = torch.zeros(BINS, dtype=torch.float64)
    for x, y in zip(fine.flatten().split(PIECE), coarse.flatten().split(PIECE), strict=True):
        x, y = x.double(), y.double()
        kept = (y != 0) & y.isfinite()
        ulp = torch.exp2(y[kept].abs().log2().floor().clamp(min=least) - mantissa)
        off = (x[kept] - y[kept]) / ulp * y[kept].sign()  # outwards, wherever zero is
        counts += torch.histc(off, BINS, -0.5, 0.5)
    return is_even(counts) or _fills_both_edges(counts)


def _fills_both_edges(counts: Tensor) -> bool:
    """Whether the last bins say, by a straight line, that more would lie beyond either edge.

    None does, since every fine value rounds to its coarse one. Values moved by less than half a
    place end before the edge; even noise of just that size thins out towards it.
    """
    for last, before in (counts[[0, 1]].tolist(), counts[[-1, -2]].tolist()):
        beyond = 2 * last - before
        if beyond < max(20.0, 6 * (4 * last + before) ** 0.5):
            return False
    return True


def moved_alike(fine: Tensor, coarse: Tensor) -> bool:
    """Whether fine values are coarse ones times one number, or plus one, as float32 shows it."""
    x, y = fine.double().flatten(), coarse.double().flatten()
    x, y = x[y != 0], y[y != 0]
    if len(y) < 4:
        return False
    for off, unit in ((x / y - 1, 1.0), (x - y, float(y.abs().max()))):
        if off.any() and float(off.max() - off.min()) <= 4 * 2.0**-24 * unit:
            return True
    return False


def is_even(counts: Tensor, uneven: float = UNEVEN) -> bool:
    """Whether counts in bins of one width are those of a uniform distribution."""
    total = float(counts.sum())
    if not total:
        return True
    even = torch.arange(1, len(counts) + 1, dtype=torch.float64) / len(counts)
    apart = float((counts.cumsum(0) / total - even).abs().max())
    return apart <= max(2.7 * total**-0.5, uneven)


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
    if x.shape != y.shape:
        return
    if x.dtype == torch.bfloat16:
        yield from _through_float16(x, y)
    if x.dtype.itemsize <= 2:
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


def _through_float16(
    x: Tensor, y: Tensor
) -> Iterator[tuple[str, str, Literal["explained"], Tensor]]:
    """bfloat16 values below 2^-14, of which float16 holds fewer bits, each rounded to it."""
    for mine, theirs, words in ((x, y, "B holds A's values"), (y, x, "A holds B's values")):
        whole = mine.to(torch.float16).to(mine.dtype)
        if whole.isfinite().all() and gives(whole, theirs):
            yield "rounded weights", f"{words} rounded through float16", "explained", y


def _unrounded(fine: Tensor, coarse: Tensor) -> bool:
    narrow = coarse.dtype in (torch.bfloat16, torch.float16)
    few = coarse.numel() <= FEW and moved_alike(fine, coarse)
    return not narrow or (not few and lies_anywhere(fine, coarse))


def rounds_to(fine: Tensor, coarse: Tensor) -> bool:
    """Whether `coarse` is in a 16-bit type, or holds values of one, and is `fine` rounded to it."""
    if fine.shape != coarse.shape or fine.dtype.itemsize <= 2:
        return False
    for dtype in (torch.bfloat16, torch.float16):
        kept = coarse.dtype in (dtype, fine.dtype) and gives(fine.to(dtype), coarse.to(dtype))
        if kept and gives(coarse.to(dtype).to(coarse.dtype), coarse):
            return True
    return False


def _cut_off(x: Tensor, coarse: torch.dtype) -> Tensor:
    """x in a coarser type, rounded towards zero."""
    near = x.to(coarse)
    beyond = near.to(x.dtype).abs() > x.abs()
    whole = near.view(torch.int16)  # one less in size, whatever the sign
    return torch.where(beyond, whole - 1, whole).view(coarse)
