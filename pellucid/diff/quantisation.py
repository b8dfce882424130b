"""Whether one weight is another quantised, proven level by level.

Two things must hold for every value. The levels are found in the values of B alone: in each group
all of them stand on at most 256 levels, as exactly as they are stored, and the chance that
arbitrary values would do so is below 2^-64 for the tensor. And B is A rounded to these levels: each
of A's values is nearest to the level that B has for it, or beyond the last one (clipped), and the
errors are as large as rounding makes them: levels moved a little are nearest to the old ones too.
Only where the errors of one column were passed on to the next (GPTQ) may levels be others, and then
the errors must show it: their covariance has the determinant of rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from pellucid.diff.layouts_of_groups import Layout, layouts
from pellucid.diff.levels import (
    COARSE,
    FLOAT8,
    FP4,
    IQ4_NL,
    NF4,
    OFFSET,
    SYMMETRIC,
    Codes,
    Placed,
    Uniform,
)
from pellucid.diff.levels_of_one_group import MOST, standing
from pellucid.diff.passed_on_errors import compensated
from pellucid.diff.rounding import BINS, is_even, precision

PROOF = 64.0  # bits: the chance that arbitrary values stand on such levels is below 2^-64
A_GROUP = 8.0  # bits that a group adds before it counts as told
PIECE = 1 << 18  # values looked at in float64 at a time: they stay in the cache
SMALL_HALF = 2.0**-24  # how far apart the smallest scales are that float16 holds
HALF_SCALE = 2.0**-11  # levels may be chosen by a scale that is then stored in float16
FAULTY = 0.25  # share of groups up to which misfits are damage in a quantised tensor
TELLING = 0.25  # steps: a group whose largest error is smaller stood on these levels already
COARSE_PART = 1 / 8  # of a step: rounding of the stored values that still leaves errors even
ON_LEVEL = 4  # bins on either side of 0: values that stood on the same levels before are there
UNEVEN = 0.1  # few levels are far apart: between two of them numbers are not quite uniform
SPREAD = 0.6  # of rounding's RMS error: between codes, which are not evenly spaced
Levels = Uniform | Codes
Explanation = tuple[str, str, Literal["fault", "explained"]]  # cause, finding, kind


@dataclass(kw_only=True)
class Held:
    """What all groups of a tensor say together.

    groups    counted; `off` of them do not stand on levels, `wrong` hold levels that are not A's
    moved     values whose level is not A's nearest
    farthest  largest distance from A, in steps
    first     (index of the group, A's values, B's values, the step) of the first misfit
    """

    levels: Levels
    layout: Layout
    groups: int = 0
    off: int = 0
    wrong: int = 0
    moved: int = 0
    values: int = 0
    bits: float = 0.0
    told: int = 0
    levels_used: float = 1.0
    farthest: float = 0.0
    error: float = 0.0
    largest: float = 0.0  # of A's values in size
    rounding: float = 0.0
    telling: int = 0  # groups with errors of some size, of `seen` groups with any
    seen: int = 0
    errors: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    ratios: list[Tensor] = field(default_factory=list)
    first: tuple[int, Tensor, Tensor, float] | None = None

    @property
    def proven(self) -> bool:
        """All groups stand on levels, and not by chance."""
        return not self.off and self.bits >= PROOF and self.told >= 0.75 * self.groups

    @property
    def spread(self) -> float:
        """RMS error in units of what rounding makes of numbers anywhere between two levels."""
        return (self.error / max(self.rounding, 1e-300)) ** 0.5

    @property
    def rounds(self) -> bool:
        """Whether the errors are those of numbers anywhere between two levels.

        Numbers that stood on levels before, which were moved a little, are nearest to them too.
        """
        if isinstance(self.levels, Codes):
            return self.spread >= SPREAD
        middle = slice(BINS // 2 - ON_LEVEL, BINS // 2 + ON_LEVEL)
        off = torch.cat((self.errors[: middle.start], self.errors[middle.stop :]))
        enough = float(off.sum()) >= FAULTY * float(self.errors.sum())
        return self.telling >= FAULTY * self.seen and enough and is_even(off, UNEVEN)

    def __str__(self) -> str:
        if isinstance(self.levels, Codes):
            return f"{self.levels.label} {self.layout}"
        width = max(1, math.ceil(math.log2(self.levels_used)))
        offset = " with an offset" if self.levels.offset else ""
        return f"int{width}{offset} {self.layout}"


def on_levels(a: Tensor, b: Tensor) -> Held | None:
    """The levels that B's values stand on, with what A's values say about them, or None.

    a, b  (rows, columns), finite. A sample of 16 groups of each layout is looked at first; what is
    returned was counted over all groups.
    """
    if b.ndim != 2 or min(b.shape) < 1 or b.shape[1] < 16:
        return None
    unit = precision(b)
    beside: tuple[float, Levels, Layout] | None = None
    damaged: tuple[float, Held] | None = None
    even = _may_be_even(b, unit)
    for layout in layouts(b.shape):
        mine, theirs = layout.sample(a, b).double(), layout.sample(b, b).double()
        for levels in _levels_of(layout, even):
            placed = _fitting(levels, theirs, unit, _scale(levels, layout, b, len(theirs)))
            if placed is None:
                continue
            share = float((placed.fits & (placed.bits >= A_GROUP)).double().mean())
            if share < 1 - FAULTY:
                continue
            if isinstance(levels, Uniform):
                levels = levels.first([int(span) for span in placed.span[placed.fits].tolist()])
            typical = float(placed.span[placed.fits].median())
            if beside is None or typical < 0.6 * beside[0]:
                beside = typical, levels, layout
            found = Held(levels=levels, layout=layout, largest=float(a.abs().amax()))
            right = _nearest(found, mine, placed, unit)
            if float((right.all(1) & placed.fits).double().mean()) < 1 - FAULTY:
                continue
            held = hold(a, b, levels, layout, unit)
            misfits = (held.off + held.wrong) / held.groups
            if not misfits:
                return held
            if misfits <= FAULTY and (damaged is None or misfits < damaged[0]):
                damaged = misfits, held
    if damaged:
        return damaged[1]
    return hold(a, b, *beside[1:], unit) if beside else None


def _may_be_even(b: Tensor, unit: float) -> set[str]:
    """Along what evenly spaced levels are possible: what stands on them in large groups does so in
    groups of 16 too."""
    found: set[str] = set()
    for kind in ("rows", "columns"):
        if (b if kind == "rows" else b.T).shape[1] < 16:
            continue
        sample = Layout(kind=kind, size=16).sample(b, b).double()
        if any(_fitting(levels, sample, unit, None) for levels in (SYMMETRIC, OFFSET)):
            found |= {kind, "flat"} if kind == "rows" else {kind}
    return found


def _fitting(levels: Levels, sample: Tensor, unit: float, scale: Tensor | None) -> Placed | None:
    """The sample's groups held against the levels, or None where too many do not fit.

    Where the first groups are too many already, the others are not looked at.
    """
    few = math.floor(FAULTY * len(sample)) + 1
    first = levels.place(sample[:few], unit, None if scale is None else scale[:few])
    if not bool(first.fits.any()):
        return None
    placed = levels.place(sample, unit, scale)
    return placed if float(placed.fits.double().mean()) >= 1 - FAULTY else None


def _levels_of(layout: Layout, even: set[str]) -> Sequence[Levels]:
    """The formats that are used with such groups."""
    found: list[Levels] = []
    if layout.kind in even:
        found += [SYMMETRIC, OFFSET]
    if layout.kind in ("rows", "flat"):
        found += {16: [FP4], 32: [NF4, FP4, IQ4_NL]}.get(layout.size, [NF4])
    whole = not layout.size or layout.kind == "blocks"
    if whole or (layout.kind == "rows" and layout.size in (32, 128)):
        found += FLOAT8
    return found


def _scale(levels: Levels, layout: Layout, b: Tensor, groups: int) -> Tensor | None:
    """The largest value of the whole tensor for each group, where there is one scale for it."""
    if layout.kind != "tensor":
        return None
    low, high = b.aminmax()
    return (high if high >= -low else low).double().expand(groups)


def hold(a: Tensor, b: Tensor, levels: Levels, layout: Layout, unit: float) -> Held:
    """Count over all groups which of them stand on levels and hold A's values rounded."""
    held = Held(levels=levels, layout=layout, largest=float(a.abs().amax()))
    if isinstance(levels, Codes):
        held.levels_used = float(len(levels.codes))
    for mine, theirs in zip(layout.groups(a), layout.groups(b), strict=True):
        if not theirs.numel():
            continue
        size = max(1, PIECE // theirs.shape[1])
        for first in range(0, len(theirs), size):
            x, y = (part[first : first + size].double() for part in (mine, theirs))
            placed = levels.place(y, unit, _scale(levels, layout, b, len(y)))
            _count(held, x, y, placed, unit)
    return held


def _count(held: Held, x: Tensor, y: Tensor, placed: Placed, unit: float) -> None:
    right = _nearest(held, x, placed, unit)
    wrong = placed.fits & ~right.all(1)
    if unit > COARSE and isinstance(held.levels, Uniform) and bool(wrong.any()):
        _with_full_range(held, x, y, placed, right, wrong, unit)
        wrong = placed.fits & ~right.all(1)
    bad = (~placed.fits | wrong).nonzero()[:, 0]
    proven = _proven_one_by_one(held, x, y, placed, bad, unit)
    bad = bad[~proven[bad]]
    if held.first is None and len(bad):
        at = int(bad[0])
        held.first = (held.groups + at, x[at], y[at], float(placed.above[at].median()) * 2)
    held.off += int((~placed.fits & ~proven).sum())
    held.wrong += int((wrong & ~proven).sum())
    held.moved += int((~right[placed.fits]).sum())
    held.values += x[placed.fits].numel()
    held.bits += float(placed.bits[placed.fits].sum())
    held.told += int((placed.fits & ((placed.bits >= A_GROUP) | (placed.span == 0))).sum())
    held.groups += len(x)
    width = 2 * torch.minimum(placed.below, placed.above)[placed.fits]
    error = (x - y)[placed.fits]
    seen = (width > 0) & (x[placed.fits] != 0)  # zeros are on every ladder
    held.error += float((error[seen] / width[seen]).pow(2).sum())
    held.rounding += float(seen.sum()) / 12
    if not bool(placed.fits.any()) or not isinstance(held.levels, Uniform):
        return
    level = placed.level[placed.fits]
    held.levels_used = max(held.levels_used, float((level.amax(1) - level.amin(1)).max()) + 1)
    if not bool(seen.any()):
        return
    held.farthest = max(held.farthest, float((error[seen] / width[seen]).abs().max()))
    steps = torch.where(seen, error / width, 0.0)
    told = steps.abs().amax(1) > TELLING
    held.seen, held.telling = held.seen + int(seen.any(1).sum()), held.telling + int(told.sum())
    # Where the type that holds them is nearly as coarse as the levels, values are not anywhere.
    fine = seen & (2 * unit * y[placed.fits].abs() <= COARSE_PART * width)
    held.errors += torch.histc(steps[told][fine[told]], BINS, -0.5, 0.5)


def _proven_one_by_one(
    held: Held, x: Tensor, y: Tensor, placed: Placed, bad: Tensor, unit: float
) -> Tensor:
    """(G) groups of 16-bit values that the search misread, and that exact intervals prove."""
    proven = torch.zeros(len(y), dtype=torch.bool)
    if unit <= COARSE or not 0 < len(bad) <= min(MOST, max(2, len(y) // 50)):
        return proven
    most = int(placed.span[placed.fits].max()) if bool(placed.fits.any()) else 0
    if isinstance(held.levels, Uniform):  # few levels in some groups may be read as many
        most = min(most, _finest(held.levels, unit))
    if most:
        doubt = HALF_SCALE + float((SMALL_HALF / 2 / _step(placed)[bad]).amax())
        proven[bad] = standing(held.levels, x[bad], y[bad], unit, most, doubt)
    return proven


def _finest(levels: Uniform, unit: float) -> int:
    """Steps that values of this roundoff can show: more of them stand on any values."""
    return int((0.25 if levels.offset else 0.55) / unit)


def _with_full_range(
    held: Held, x: Tensor, y: Tensor, placed: Placed, right: Tensor, wrong: Tensor, unit: float
) -> None:
    """Coarse values may stand on 126 steps and on 127: where the first does not hold A's values,
    whole ranges of levels are tried, as B's values allow them."""
    assert isinstance(held.levels, Uniform), "codes have no range"
    for span in (255, 254, 253) if held.levels.offset else (127, 128):
        left = (wrong & ~right.all(1)).nonzero()[:, 0]
        if not len(left):
            return
        other = replace(held.levels, spans=(span,)).place(y[left], unit)
        better = other.fits & _nearest(held, x[left], other, unit).all(1)
        for name, values in vars(placed).items():
            values[left[better]] = getattr(other, name)[better]
        right[left[better]] = True


def _nearest(held: Held, x: Tensor, placed: Placed, unit: float) -> Tensor:
    """(G, n) whether A's value rounds to B's level, with B's scale or with A's own.

    A quantiser may choose levels by the exact scale and store it rounded (float16 in GGUF, eight
    bits in QLoRA). Then all levels of the group are nearest at the scale of A's own largest value.
    """
    slack = 1e-4 * (placed.below + placed.above)
    if unit > COARSE:
        # The step is found from rounded values: less exact than they are, but not exact.
        size = placed.value.abs() + placed.below + placed.above
        offset = isinstance(held.levels, Uniform) and held.levels.offset
        doubt = placed.doubt[:, None] + HALF_SCALE + SMALL_HALF / 2 / _step(placed)
        slack = slack + doubt * (size + 0.3 * offset * size.amax(1, keepdim=True))
    right = _between(x - placed.value, placed.below + slack, placed.above + slack)
    if not placed.span.any():
        return right
    flat = placed.span[:, None] == 0  # all values of the group are equal: no step is seen
    if bool(flat.any()):
        typical = (placed.below + placed.above)[placed.span > 0].median()
        right = torch.where(flat, (x - placed.value).abs() <= typical / 2, right)
    again = (placed.fits & ~right.all(1)).nonzero()[:, 0]
    if not len(again):
        return right
    value, a = placed.value[again], x[again]
    high = _extreme(value.abs(), a.abs())
    base_a, base_b = torch.zeros_like(a[:, :1]), torch.zeros_like(a[:, :1])
    if isinstance(held.levels, Uniform) and held.levels.offset:
        low, high = _extreme(-value, -a), _extreme(value, a)
        base_a, base_b = a.gather(1, low), value.gather(1, low)
    ratio = (a.gather(1, high) - base_a) / (value.gather(1, high) - base_b)
    if isinstance(held.levels, Codes):  # an eighth bit of the largest scale of the tensor
        stored = value.gather(1, high).abs().clamp(min=1e-300)
        allowed = (held.largest / 254 / stored).clamp(min=0.05)
    else:
        allowed = (SMALL_HALF / _step(placed)[again]).clamp(min=2.0**-8)
    own = base_a + (value - base_b) * ratio
    low_edge, high_edge = (placed.below + slack)[again], (placed.above + slack)[again]
    fits = _between(a - own, low_edge * ratio, high_edge * ratio)
    fits &= (ratio - 1).abs() <= allowed
    if bool((base_a != 0).any()):
        step = (placed.below + placed.above)[again].amin(1, keepdim=True)
        fits &= (base_a - base_b).abs() <= step / 8
    whole = fits.all(1)
    held.ratios.append(ratio[whole, 0] - 1)
    right[again] |= whole[:, None]
    return right


def _step(placed: Placed) -> Tensor:
    """(G, 1) the smallest distance of two levels."""
    return (placed.below + placed.above).amin(1, keepdim=True).clamp(min=1e-300)


def _extreme(value: Tensor, a: Tensor) -> Tensor:
    """(G, 1) place of the largest value; of several equal ones, where A has the largest."""
    largest = value.amax(1, keepdim=True)
    at_end = value >= largest - 1e-6 * largest.abs()
    return torch.where(at_end, a, -float("inf")).argmax(1, keepdim=True)


def _between(off: Tensor, below: Tensor, above: Tensor) -> Tensor:
    return (off <= above) & (off >= -below)


def one_sided(held: Held, unit: float) -> float | None:
    """Mean ratio of A's scales to B's, less one, where it is more than chance.

    Scales that were only rounded are as often too large as too small. Scales read from 16-bit
    values are known to their roundoff `unit`, no better: they are read only where the levels do
    not fit without. Those of codes may stand on a grid of eight bits themselves, and A's on another
    (bfloat16): then single ratios, not only their mean, must lie on one side, and of all groups.
    """
    if not held.ratios:
        return None
    ratios = torch.cat(held.ratios)
    if len(ratios) < (FAULTY * held.groups if isinstance(held.levels, Codes) else 8):
        return None  # a factor moves every group
    mean, spread = float(ratios.mean()), float(ratios.std())
    known = unit if unit > COARSE else 1e-7
    if isinstance(held.levels, Codes):
        known = max(known, spread)
    return mean if abs(mean) > 5 * spread / len(ratios) ** 0.5 + known else None


def _steps(b: Tensor, held: Held) -> Tensor | None:
    """The step (rows, columns) at each value, where groups lie along the rows."""
    if held.layout.kind != "rows" or not isinstance(held.levels, Uniform):
        return None
    found = []
    for theirs in held.layout.groups(b):
        if theirs.numel():
            placed = held.levels.place(theirs.double(), precision(b))
            step = (placed.below + placed.above).amin(1, keepdim=True)
            found.append(step.expand(theirs.shape).reshape(len(b), -1))
    whole = torch.cat(found, 1)
    return torch.where(whole > 0, whole, whole[whole > 0].median()) if whole.any() else None


def quantised(a: Tensor, b: Tensor) -> Explanation | None:
    """(cause, finding, kind) where B stands on levels: A rounded, damaged, or other weights.

    None where it does not: then nothing is said and nothing excused.
    """
    held = on_levels(a, b)
    if held is None or held.bits < PROOF:
        return None
    misfits = held.off + held.wrong
    if held.proven and not misfits:
        own = on_levels(a, a)  # rounding to as many levels leaves what stands on them as it is
        if own is not None and own.proven and str(own) == str(held):
            finding = f"A stands on {own} already, B on other levels: the scales are not A's"
            return "quantised with other scales", finding, "fault"
        if not held.rounds:
            finding = (
                f"B stands on {held} with errors of {held.spread:.2f} times rounding's: A stood on"
                " levels already, and these are others"
            )
            return "quantised with other scales", finding, "fault"
        ratio = one_sided(held, precision(b))
        if ratio is None:
            return "quantised weights", f"B's values are A's in {held}", "explained"
        scale = 1 / (1 + ratio)
        return "quantised and scaled", f"B's values are A's in {held}, times {scale:.6g}", "fault"
    if misfits <= FAULTY * held.groups and held.groups >= 8:
        return _damaged(held, b.shape)
    if not held.proven:
        return None
    share = f"{100 * held.moved / max(1, held.values):.2g} % of the values are on another level"
    cost = f"the error is {held.spread:.2f} times rounding's"
    step = _steps(b, held)
    if step is not None and compensated(a, b, step, held.spread, held.farthest):
        finding = f"B's values are A's in {held}, errors passed on as GPTQ does: {share}, {cost}"
        return "quantised weights", finding, "explained"
    slope = float((a.double() * b.double()).sum() / a.double().pow(2).sum())
    scaled = f"; B is about {slope:.4g} times A" if abs(slope - 1) > 0.02 else ""
    finding = f"B stands on {held}, but not on A's levels: {share}, {cost}{scaled}"
    return "quantised from other weights", finding, "fault"


def _damaged(held: Held, shape: torch.Size) -> Explanation:
    """A few groups of a quantised tensor that are not as the others."""
    assert held.first is not None, "there are misfits"
    index, mine, theirs, step = held.first
    where = held.layout.where(index, shape)
    count = f"{held.off + held.wrong} group(s) are not A's numbers rounded"
    error = theirs - mine
    mean, slope = float(error.mean()), float(mine @ theirs / mine.pow(2).sum().clamp(min=1e-300))
    cause, how = "quantised group with wrong values", ""
    if abs(mean) > 0.4 * step and float((error - mean).abs().max()) < 1.1 * step:
        cause, how = "quantised group with a wrong zero point", f", moved by {mean:.3g}"
    elif abs(slope - 1) > 0.05 and float((theirs - slope * mine).abs().max()) < 1.1 * step:
        cause, how = "quantised group with a wrong scale", f", times {slope:.3g}"
    return cause, f"{held}, but {count}; the first at {where}{how}", "fault"
