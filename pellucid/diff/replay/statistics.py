"""Is it rounding or a bug? A verdict per tensor without a hand-set tolerance.

Three values of one tensor, all from the same inputs: R, the reference in higher precision; a, side
A's arithmetic in the run's own dtype; b, what side B has. If b is as far from R as a is, b is
rounding. The factors say how much farther still counts as chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TENSOR_FACTOR = 3.0  # error of a whole tensor, in units of A's own
SLICE_FACTOR = 8.0  # error of one token, head or channel: fewer numbers, more chance
STEADY = 8  # weight of the whole tensor's error in that of a slice, in numbers
MASKED = -5e3  # a score this low is switched off: some add −10,000, others write −∞

Verdict = Literal["identical", "within-rounding", "explained", "diverged", "not-judged"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How far a and b are from R, relative to the size of R.

    error_a, error_b   RMS error / RMS of R, over the whole tensor
    ratio              error of b in units of what A's rounding explains; above 1 is beyond it
    where              the worst slice, for example "head 3" or "token 5", or "" for the whole
    """

    verdict: Verdict
    error_a: float
    error_b: float
    ratio: float
    where: str = ""
    note: str = ""


def beyond(note: str, *, where: str = "", error_a: float = 0.0, error_b: float = 1.0) -> Measure:
    """A divergence that no rounding can be: another shape, mask or token, infinities."""
    return Measure(
        verdict="diverged",
        error_a=error_a,
        error_b=error_b,
        ratio=float("inf"),
        where=where,
        note=note,
    )


def equal(note: str = "") -> Measure:
    """Exactly what it should be."""
    return Measure(verdict="identical", error_a=0.0, error_b=0.0, ratio=0.0, note=note)


def not_judged(note: str) -> Measure:
    """Nothing can be said, and why."""
    return Measure(verdict="not-judged", error_a=0.0, error_b=0.0, ratio=0.0, note=note)


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff: the largest relative error of rounding one number to dtype."""
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0


def explained_error(dtype: torch.dtype, inner: int) -> float:
    """Relative error that an operation over `inner` terms may have in any order of summation.

    One unit roundoff of the result's dtype, or what adding up in float32 one term after the other
    makes: its standard deviation is about 0.4 √inner roundoffs (Higham & Mary, 2019), and 2.5 of
    these are allowed. A's own kernel may add in a luckier order, so its error alone is no measure
    for another kernel.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return max(roundoff(dtype), inner**0.5 * roundoff(accumulator))


def rms(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Root of the mean square, over all axes or those of `dim`."""
    squares = x.double().pow(2)
    return (squares.mean() if dim is None else squares.mean(dim=dim)).sqrt()


def measure(
    reference: Tensor,
    a: Tensor,
    b: Tensor,
    dims: tuple[str, ...],
    unit: float,
    *,
    masked: bool = False,
) -> Measure:
    """Hold b against a around the reference; `unit` is an error that rounding always explains.

    All three have the same shape; dims name its axes. With `masked`, scores below `MASKED` are
    switched off: they count as equal where R and b both have one, whichever number it is. A value
    that is not finite where R is has diverged, even where a overflows alike.
    """
    if torch.equal(a, b) and not overflowed(reference, b, masked=masked).any():
        own = float(rms(_finite(a.double() - reference.double())) / _size(reference))
        return Measure(verdict="identical", error_a=own, error_b=own, ratio=0.0)
    exact, near, seen = (value.double() for value in (reference, a, b))
    if masked:
        off = exact <= MASKED
        wrong = off != (seen <= MASKED)
        if wrong.any():
            note = f"{int(wrong.sum()):,} of {wrong.numel():,} scores are masked differently"
            return beyond(note, where=_first(wrong, dims))
        exact, near, seen = (torch.where(off, 0.0, value) for value in (exact, near, seen))
    broken = overflowed(exact, seen)
    if broken.any():
        count = int(broken.sum())
        note = f"{count:,} of {broken.numel():,} values are not finite"
        own = float(rms(_finite(near - exact)) / _size(exact))
        return beyond(note, where=_first(broken, dims), error_a=own, error_b=float("inf"))
    usable = torch.isfinite(exact)
    if not usable.any():
        return not_judged("inputs are not finite")
    exact, near, seen = (torch.where(usable, x, 0.0) for x in (exact, near, seen))
    return _judge(exact, near - exact, seen - exact, dims, unit)


def overflowed(reference: Tensor, seen: Tensor, *, masked: bool = False) -> Tensor:
    """Where a value is infinite or no number although R is finite; scores switched off may be."""
    broken = ~torch.isfinite(seen) & torch.isfinite(reference)
    return broken & (reference > MASKED) if masked else broken


def _judge(
    exact: Tensor, error_a: Tensor, error_b: Tensor, dims: tuple[str, ...], unit: float
) -> Measure:
    size = _size(exact)
    whole_a, whole_b = rms(error_a) / size, rms(error_b) / size
    most = unit * (1 + _concentration(exact))
    worst = float(whole_b / torch.clamp(TENSOR_FACTOR * whole_a, min=float(most)))
    where = ""
    expected = size * torch.clamp(whole_a, min=unit / TENSOR_FACTOR)
    for axis, letter in enumerate(dims):
        if letter == "B" and exact.shape[axis] == 1:
            continue
        rest = tuple(other for other in range(exact.ndim) if other != axis)
        slice_size = rms(exact, rest)
        slice_a = torch.maximum(
            _steadied(rms(error_a, rest), expected, exact.numel()), whole_a * slice_size
        )
        length = exact.numel() // exact.shape[axis]
        factor = SLICE_FACTOR * max(1.0, (STEADY / length) ** 0.5)
        most = unit * (1 + _concentration(exact, rest))
        allowed = torch.maximum(factor * slice_a, most * slice_size)
        ratios = rms(error_b, rest) / allowed.clamp(min=torch.finfo(torch.float64).tiny)
        place = int(ratios.argmax())
        if float(ratios[place]) > max(worst, 1.0):
            worst, where = float(ratios[place]), f"{slice_name(letter)} {place}"
    verdict: Verdict = "diverged" if worst > 1 else "within-rounding"
    return Measure(
        verdict=verdict,
        error_a=float(whole_a),
        error_b=float(whole_b),
        ratio=worst,
        where=where if verdict == "diverged" else "",
    )


def _concentration(exact: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """1/√N for N values that count: 1 where one dwarfs all others, whose roundings do not average.

    Such a value may be off by a whole rounding, by two where the sum was split.
    """
    shares = exact.pow(2)
    dims = tuple(range(exact.ndim)) if dim is None else dim
    total = shares.sum(dims).clamp(min=torch.finfo(torch.float64).tiny)
    return shares.pow(2).sum(dims).sqrt() / total if dims else torch.ones_like(exact)


def _steadied(errors: Tensor, whole: Tensor, elements: int) -> Tensor:
    """A's error of each slice, pulled towards the tensor's (`whole`) as far as the slice is short.

    One number may have no error by luck; a mean over many may be trusted.
    """
    length = elements // len(errors)
    return ((length * errors**2 + STEADY * whole**2) / (length + STEADY)).sqrt()


def _size(exact: Tensor) -> Tensor:
    """RMS of R; a tensor of zeros is measured in absolute terms."""
    size = rms(exact)
    if not size.isfinite():
        finite = exact.double()[torch.isfinite(exact)]
        size = rms(finite) if finite.numel() else torch.tensor(1.0, dtype=torch.float64)
    return size if float(size) > 0 else torch.ones_like(size)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _first(marks: Tensor, dims: tuple[str, ...]) -> str:
    place = marks.nonzero()[0].tolist()
    words = [f"{slice_name(d)} {i}" for d, i in zip(dims, place, strict=True) if d != "B" or i]
    return ", ".join(words)


_WORDS = {"B": "row", "T": "token", "S": "key", "H": "head", "Hkv": "kv head"}


def slice_name(letter: str) -> str:
    """What one slice along an axis is called: "T" is a token."""
    return _WORDS.get(letter, "channel")
