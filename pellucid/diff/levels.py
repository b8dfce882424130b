"""Whether the values of a group stand on levels, told from the values alone.

Two kinds of levels: whole multiples of a step (from zero, or from any offset), and a table of codes
times a scale (NF4, float8 …). The scale is whatever the group's largest value allows; that all the
others then stand on levels, to the precision in which they are stored, is the proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

MOST_LEVELS = 256
CLIPPED = 1.5  # steps by which a number beyond the last level may be farther off than half a step
PROBE = slice(0, 8)  # the values of a group in which most wrong steps show
FEW_GROUPS = 64
NEARLY = 0.75  # share of a group's values on levels from which a step a little off is tried
MANY, ROOM = 32, 1 << 22  # so many of a group's values where there is room for them
COARSE = 2.0**-20  # a larger roundoff is of float16 or bfloat16: levels themselves are rounded
_FLOAT32 = 2.0**-22  # error of dequantising in float32, relative to the group's largest value


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Groups (G, n) held against one kind of levels.

    fits   (G) every value of the group stands on a level
    span   (G) levels between the group's anchor and its largest value, or codes; 0 where all are
           equal
    level  (G, n) number of the level, or of the code
    value  (G, n) the level's own value
    below, above  (G, n) how far a number may lie on either side of it and still round to it
    doubt  (G) how far the scale may be from the true one, relative to it
    bits   (G) −log2 of the chance that arbitrary values of that size and precision would fit
    """

    fits: Tensor
    span: Tensor
    level: Tensor
    value: Tensor
    below: Tensor
    above: Tensor
    doubt: Tensor
    bits: Tensor

    def rows(self, kept: Tensor) -> Placed:
        """Some of the groups."""
        return Placed(**{name: held[kept] for name, held in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Evenly spaced levels: multiples of the step, or with `offset` from the smallest value on.

    spans  how many steps the largest value may be from zero (from the smallest), in the order
           tried; of several that fit the fewest steps count
    """

    offset: bool
    spans: tuple[int, ...]

    @property
    def label(self) -> str:
        """As a reader would call it."""
        return "evenly spaced levels from an offset" if self.offset else "multiples of a step"

    def first(self, spans: Sequence[int]) -> Uniform:
        """The same levels, these spans tried before the others."""
        ahead = sorted({span for span in spans if span > 0})
        rest = [span for span in self.spans if span not in set(ahead)]
        return replace(self, spans=(*ahead, *rest))

    def place(self, b: Tensor, unit: float, scale: Tensor | None = None) -> Placed:
        """Hold groups b (G, n) in float64 against such levels; unit is their roundoff."""
        size = b.abs().amax(1)
        start = b.amin(1) if self.offset else torch.zeros_like(size)
        extent = b.amax(1) - start if self.offset else size
        width, part = (1.5, 1.0) if self.offset else (1.25, 0.5)
        tolerance = width * unit * b.abs() + _FLOAT32 * part * size[:, None]
        step, zero, span = torch.zeros_like(size), start.clone(), torch.zeros_like(size)
        pending = (extent > 0).nonzero()[:, 0]
        spans = b.new_tensor(self.spans)
        while len(spans) and len(pending):  # many groups: one span after the other, most fit soon
            tried = spans[
                : 1 if len(pending) > FEW_GROUPS else max(1, ROOM // b[:FEW_GROUPS].numel())
            ]
            spans = spans[len(tried) :]
            group, place = self._plausible(b, start, extent, tolerance, pending, tried)
            guess = extent[group] / tried[place]
            s, z, k, good = self._refitted(b[group], tolerance[group], guess, start[group], unit)
            group, place, s, z, k = (held[good] for held in (group, place, s, z, k))
            first = _first_of_each(group)
            group, s, k = group[first], s[first], k[first]
            common = _common_divisor(k - (k.amin(1, keepdim=True) if self.offset else 0))
            step[group], zero[group] = s * common, z[first]
            span[group] = tried[place[first]] / common
            pending = pending[span[pending] == 0]
        fits = torch.ones_like(size, dtype=torch.bool)
        fits[pending] = False
        return self._placed(b, fits, step, zero, span, unit)

    def _plausible(
        self,
        b: Tensor,
        zero: Tensor,
        extent: Tensor,
        tolerance: Tensor,
        pending: Tensor,
        spans: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(groups, places in spans) that fit the first values of a group, groups in order."""
        some = PROBE if len(pending) * len(spans) * MANY > ROOM else slice(0, MANY)
        x = (b[pending, some] - zero[pending, None])[:, None]  # (G, 1, n)
        guess = (extent[pending, None] / spans)[..., None]  # (G, spans, 1)
        k = (x / guess).round()
        ends = tolerance[pending].amax(1)[:, None, None] * (k.abs() / spans[:, None] + self.offset)
        near = (x - k * guess).abs() <= tolerance[pending, some][:, None] + ends
        group, place = near.all(-1).nonzero().unbind(1)
        return pending[group], place

    def _refitted(
        self, b: Tensor, tolerance: Tensor, s: Tensor, z: Tensor, unit: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step and offset from all values of a group, the levels, and whether all stand on them.

        Where the values are coarse, so is the first guess, and others beside it are tried.
        """
        found = self._once(b, tolerance, s, z, unit)
        if unit <= COARSE:
            return found
        step, zero, level, good = found
        on_levels = (b - zero[:, None] - level * step[:, None]).abs() <= tolerance
        hopeful = on_levels.double().mean(1) >= NEARLY
        for grow, move in product((0.0, -0.7, 0.7), (0.0, -0.7, 0.7) if self.offset else (0.0,)):
            left = (hopeful & ~good).nonzero()[:, 0]
            if not len(left):
                break
            moved = z[left] * (1 + move * unit)
            again = self._once(b[left], tolerance[left], s[left] * (1 + grow * unit), moved, unit)
            for held, new in zip(found, again, strict=True):
                held[left] = new
        return found

    def _once(
        self, b: Tensor, tolerance: Tensor, s: Tensor, z: Tensor, unit: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, z = self._refit(b, tolerance, s, z)
        if self.offset:
            s, z = self._refit(b, tolerance, s, z)
        else:
            low, high = _step_bounds(b, (b / s[:, None]).round(), unit)
            s = torch.where(high > 0, (low + high) / 2, s)
        k = ((b - z[:, None]) / s[:, None]).round()
        good = ((b - z[:, None] - k * s[:, None]).abs() <= tolerance).all(1)
        good &= (k.amax(1) - k.amin(1) < MOST_LEVELS) & s.isfinite() & (s > 0)
        return s, z.clone(), k, good

    def _refit(self, b: Tensor, tolerance: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Step and offset by least squares, each value as trusted as it is precise."""
        k = ((b - z[:, None]) / s[:, None]).round()
        weight = tolerance.clamp(min=1e-300).pow(-1)
        weight = (weight / weight.amax(1, keepdim=True)).pow(2)
        if not self.offset:
            return (weight * k * b).sum(1) / (weight * k * k).sum(1), z
        w, wk, wkk = weight.sum(1), (weight * k).sum(1), (weight * k * k).sum(1)
        wb, wkb = (weight * b).sum(1), (weight * k * b).sum(1)
        determinant = (w * wkk - wk * wk).clamp(min=1e-300)
        s = (w * wkb - wk * wb) / determinant
        return s, (wb - s * wk) / w

    def _placed(
        self, b: Tensor, fits: Tensor, step: Tensor, zero: Tensor, span: Tensor, unit: float
    ) -> Placed:
        safe = torch.where(step > 0, step, 1.0)[:, None]
        k = torch.where(step[:, None] > 0, ((b - zero[:, None]) / safe).round(), 0.0)
        half = (step / 2)[:, None].expand_as(b)
        lowest, highest = (
            (k == k.amin(1, keepdim=True), k == k.amax(1, keepdim=True))
            if self.offset
            else (k <= 1 - span[:, None], k >= span[:, None] - 1)
        )
        moved = zero[:, None] + k * step[:, None]
        chance = 2.5 * unit * torch.maximum(moved.abs(), half * 2) + _FLOAT32 * moved.abs().amax(
            1, keepdim=True
        )
        bits = (2 * half / chance.clamp(min=1e-300)).clamp(min=1).log2()
        free = 2 if self.offset else 1
        told = (
            (_of_distinct(bits, k) if unit > COARSE else bits.sum(1))
            - free * bits.amax(1)
            - math.log2(len(self.spans))
        )
        told = torch.where(step > 0, told, 0.0)
        doubt = torch.full_like(step, unit)
        if not self.offset and unit > COARSE:
            low, high = _step_bounds(b, k, unit)
            doubt = ((high - low).abs() / safe[:, 0]).clamp(max=unit)
        return Placed(
            doubt=doubt,
            fits=fits,
            span=span,
            level=k,
            value=moved,
            below=half + CLIPPED * step[:, None] * lowest,
            above=half + CLIPPED * step[:, None] * highest,
            bits=told,
        )


def _step_bounds(b: Tensor, level: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """(G) least and largest step for which level · step rounds to b; 0 and 0 where none is said."""
    size, level = b.abs(), level.abs()
    half = unit * torch.exp2(size.clamp(min=1e-300).log2().floor())  # half a unit in the last place
    said = (level > 0) & (size > 0)
    safe = torch.where(said, level, 1.0)
    low = torch.where(said, (size - half) / safe, 0.0).amax(1)
    high = torch.where(said, (size + half) / safe, float("inf")).amin(1)
    return low, torch.where(high.isfinite(), high, 0.0)


def _first_of_each(group: Tensor) -> Tensor:
    """Where a number stands for the first time: (n) in rising order -> mask (n)."""
    first = torch.ones_like(group, dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    return first


def _of_distinct(bits: Tensor, level: Tensor) -> Tensor:
    """Sum over a group, where a level that was seen before adds no more than one bit."""
    ordered, order = level.sort(1)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    sorted_bits = bits.gather(1, order)
    return torch.where(again, sorted_bits.clamp(max=1), sorted_bits).sum(1)


def _common_divisor(level: Tensor) -> Tensor:
    """Largest whole number that divides all levels of a group: (G, n) -> (G)."""
    whole = level.abs().to(torch.int64)
    found = whole[:, 0].clone()
    for column in whole[:, 1:].unbind(1):
        if bool((found == 1).all()):
            break
        found = torch.gcd(found, column)
    return found.clamp(min=1).to(level.dtype)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A table of codes times a scale.

    codes    in rising order
    anchors  codes that a group's largest value may be
    plain    also try the codes as they are, without a scale
    """

    label: str
    codes: tuple[float, ...]
    anchors: tuple[float, ...]
    plain: bool = False

    def place(self, b: Tensor, unit: float, scale: Tensor | None = None) -> Placed:
        """Hold groups b (G, n) in float64 against the codes.

        scale  (G) where it is known, else the group's largest value says it
        """
        at = b.abs().argmax(1, keepdim=True)
        largest = b.gather(1, at)[:, 0] if scale is None else scale
        scales = [largest / anchor for anchor in self.anchors]
        if self.plain:
            scales.insert(0, torch.ones_like(largest))
        scales = [torch.where(s == 0, 1.0, s) for s in scales]
        best: Placed | None = None
        for s in self._plausible(b, scales, unit):
            found = self._at(b, s, unit)
            if best is None:
                best = found
            else:
                better = (found.fits & ~best.fits).nonzero()[:, 0]
                for name, held in vars(best).items():
                    held[better] = getattr(found, name)[better]
            if bool(best.fits.all()):
                break
        assert best is not None, "a table has anchors"
        return best

    def _plausible(self, b: Tensor, scales: list[Tensor], unit: float) -> list[Tensor]:
        """The scales that fit the first values of any group, or one of them where none does."""
        codes = b.new_tensor(self.codes)
        x = b[None, :, PROBE] / torch.stack(scales)[..., None]
        near = codes[torch.bucketize(x, (codes[1:] + codes[:-1]) / 2)]
        tolerance = 5 * unit * near.abs() + _FLOAT32 * x.abs().amax(-1, keepdim=True) * 64
        alive = ((x - near).abs() <= tolerance).all(-1).any(1).tolist()
        return [s for s, lives in zip(scales, alive, strict=True) if lives] or scales[:1]

    def _at(self, b: Tensor, s: Tensor, unit: float) -> Placed:
        codes = b.new_tensor(self.codes)
        middle = (codes[1:] + codes[:-1]) / 2
        tolerance = 2 * unit * b.abs() + _FLOAT32 * b.abs().amax(1, keepdim=True) / 2
        if unit > COARSE:  # the largest value is rounded too: all of them say the scale better
            k = codes[torch.bucketize(b / s[:, None], middle)]
            s = (k * b).sum(1) / (k * k).sum(1).clamp(min=1e-300)
            s = torch.where(s == 0, 1.0, s)
        place = torch.bucketize(b / s[:, None], middle)
        value = codes[place] * s[:, None]
        ends = torch.cat((codes[:1] - (codes[1] - codes[0]) * 4, codes, codes[-1:] * 1))
        ends[-1] = codes[-1] + (codes[-1] - codes[-2]) * 4  # clipped by up to two steps
        sides = (ends[1:] - ends[:-1]) / 2  # (codes + 1)
        down, up = sides[place] * s.abs()[:, None], sides[place + 1] * s.abs()[:, None]
        below, above = torch.where(s[:, None] > 0, down, up), torch.where(s[:, None] > 0, up, down)
        tiny = b.abs().amax(1, keepdim=True).clamp(min=1e-300) * 2.0**-40
        chance = (4 * unit * value.abs() + _FLOAT32 * value.abs().amax(1, keepdim=True)) + tiny
        bits = (torch.minimum(below, above) * 2 / chance).clamp(min=1).log2()
        told = _of_distinct(bits, place) - bits.amax(1) - math.log2(len(self.anchors) + self.plain)
        return Placed(
            doubt=torch.full_like(s, unit),
            fits=((b - value).abs() <= tolerance).all(1),
            span=torch.full_like(s, len(self.codes)),
            level=place.double(),
            value=value,
            below=below,
            above=above,
            bits=told,
        )


def _float8(mantissa: int, bias: int, largest: float) -> tuple[float, ...]:
    """Every finite number of a float8 type, in rising order, zero once."""
    found = {0.0}
    for exponent in range(1 << (7 - mantissa)):
        for fraction in range(1 << mantissa):
            whole = fraction / (1 << mantissa) + (exponent > 0)
            value = whole * 2.0 ** (max(exponent, 1) - bias)
            if value <= largest:
                found |= {value, -value}
    return tuple(sorted(found))


_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)  # fmt: skip  (QLoRA, Dettmers et al. 2023, appendix E)
_E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4_NL = (
    -127.0,
    -104.0,
    -83.0,
    -65.0,
    -49.0,
    -35.0,
    -22.0,
    -10.0,
    1.0,
    13.0,
    25.0,
    38.0,
    53.0,
    69.0,
    89.0,
    113.0,
)  # fmt: skip  (ggml, kvalues_iq4nl)

SYMMETRIC = Uniform(offset=False, spans=tuple(range(1, 129)))
OFFSET = Uniform(offset=True, spans=tuple(range(1, 256)))
NF4 = Codes(label="NF4", codes=_NF4, anchors=(1.0, -1.0))
FP4 = Codes(label="float4 (e2m1)", codes=_E2M1, anchors=(6.0, 4.0, 3.0, 2.0))
IQ4_NL = Codes(
    label="IQ4_NL", codes=_IQ4_NL, anchors=tuple(code for code in _IQ4_NL if abs(code) > 60)
)
FLOAT8 = (
    Codes(
        label="float8 e4m3",
        codes=_float8(3, 7, 448.0),
        anchors=(448.0, 240.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0),
        plain=True,
    ),
    Codes(
        label="float8 e5m2",
        codes=_float8(2, 15, 57344.0),
        anchors=(57344.0, 49152.0, 40960.0, 32768.0),
        plain=True,
    ),
)
