"""Whether one group can stand on levels that hold A's values, decided exactly.

The search by least squares (`levels`) may miss the step of a group whose values are stored in 16
bits. Here every value is an interval: B's says where its level can be, A's how far from it that
level can be. All are linear in the step s and the offset z, so whether some s and z satisfy them is
a question about the maximum of a concave function of s. No tolerance is widened by this: a value on
another level, or on none, leaves no s and z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.diff.levels import CLIPPED, Codes, Uniform

MOST = 64  # groups that are looked at one by one
_FLOAT32 = 2.0**-22
_STEPS = 40  # of the search for the maximum: it then stands to 4e-9
_NEAR = 0.04  # how far the step may be from what the group's ends say, relative to it
_OWN_SCALE = 0.05  # how far a table's scale may be from the one its levels were chosen by


def standing(
    levels: Uniform | Codes, a: Tensor, b: Tensor, unit: float, most: int, scale: float
) -> Tensor:
    """(G) which groups b (G, n) can be a rounded to such levels, in float64.

    unit   roundoff of the 16-bit type that holds b
    most   steps that the other groups of the tensor have from end to end
    scale  relative error with which a step may have been stored
    """
    if isinstance(levels, Codes):
        found = [_on_codes(levels, x, y, unit) for x, y in zip(a, b, strict=True)]
    else:
        found = [_evenly(levels.offset, x, y, unit, most, scale) for x, y in zip(a, b, strict=True)]
    return torch.tensor(found, dtype=torch.bool)


def _half(b: Tensor, unit: float) -> Tensor:
    """By how much a number that is stored as b may differ from it."""
    place = torch.exp2(b.abs().clamp(min=1e-300).log2().floor())
    return unit * place + _FLOAT32 * b.abs().amax()


def _evenly(offset: bool, a: Tensor, b: Tensor, unit: float, most: int, scale: float) -> bool:
    start = b.amin() if offset else b.new_zeros(())
    extent = float(b.amax() - start) if offset else float(b.abs().amax())
    if extent <= 0:
        return False
    wide = range(max(1, most - 2), most + 2)  # most groups use the whole range
    return any(
        _with_spans(offset, a, b, unit, b.new_tensor(spans), scale)
        for spans in (wide, range(1, wide[0]))
        if len(spans)
    )


def _with_spans(
    offset: bool, a: Tensor, b: Tensor, unit: float, spans: Tensor, scale: float
) -> bool:
    """Whether one of the counts of steps from end to end is possible."""
    start = b.amin() if offset else b.new_zeros(())
    extent = float(b.amax() - start) if offset else float(b.abs().amax())
    half = _half(b, unit)
    # The end itself is rounded: by up to half a step, where the type is nearly as coarse.
    ends = extent + float(half.amax()) * torch.tensor([0.0, -0.5, 0.5, -1.0, 1.0], dtype=b.dtype)
    spans = spans.repeat_interleave(len(ends))
    step = (ends.repeat(len(spans) // len(ends)) / spans)[:, None]
    level = ((b - start) / step).round()  # (spans, n)
    low = (level == level.amin(1, keepdim=True)) if offset else level <= 1 - spans[:, None]
    high = (level == level.amax(1, keepdim=True)) if offset else level >= spans[:, None] - 1
    slack = scale * (b.abs() + b.abs().amax() * offset)
    # z >= least - (level + up) s  and  z <= greatest - (level - down) s
    least = torch.cat(((b - half).expand_as(level), (a - slack).expand_as(level)), 1)
    greatest = torch.cat(((b + half).expand_as(level), (a + slack).expand_as(level)), 1)
    up = torch.cat((level, level + 0.5 + CLIPPED * high), 1)
    down = torch.cat((level, level - 0.5 - CLIPPED * low), 1)

    def room(s: Tensor) -> Tensor:
        """(spans) how much room s leaves for z; negative where there is none."""
        floor, ceiling = (least - up * s).amax(1), (greatest - down * s).amin(1)
        return ceiling - floor if offset else torch.minimum(ceiling, -floor)

    left, right = step * (1 - _NEAR), step * (1 + _NEAR)
    for _ in range(_STEPS):
        third = (right - left) / 3
        near, far = left + third, right - third
        rising = (room(near) < room(far))[:, None]
        left, right = torch.where(rising, near, left), torch.where(rising, right, far)
    return bool((room((left + right) / 2) >= 0).any())


def _on_codes(levels: Codes, a: Tensor, b: Tensor, unit: float) -> bool:
    codes = b.new_tensor(levels.codes)
    middle = (codes[1:] + codes[:-1]) / 2
    ends = b.new_tensor([codes[0] * 4 - codes[1] * 3, codes[-1] * 4 - codes[-2] * 3])
    edges = torch.cat((ends[:1], middle, ends[1:]))
    half, at = _half(b, unit), int(b.abs().argmax())
    for anchor in levels.anchors:
        guess = float(b[at]) / anchor
        if guess == 0:
            return False
        place = torch.bucketize(b / guess, middle)
        own = _between(codes[place], codes[place], b - half, b + half, guess)
        cells = _between(edges[place], edges[place + 1], a, a, guess)
        if own[0] <= own[1] and max(cells[0], own[0] * (1 - _OWN_SCALE)) <= min(
            cells[1], own[1] * (1 + _OWN_SCALE)
        ):
            return True
    return False


def _between(
    low: Tensor, high: Tensor, least: Tensor, most: Tensor, guess: float
) -> tuple[float, float]:
    """Sizes s of a scale with low · s <= most and high · s >= least, of the sign of `guess`."""
    if guess < 0:
        low, high, least, most = low, high, -most, -least
    bounds = [0.0, float("inf")]
    for edge, value, below in ((low, most, True), (high, least, False)):
        for e, v in zip(edge.tolist(), value.tolist(), strict=True):
            if e == 0:
                if (v < 0) if below else (v > 0):
                    return 1.0, 0.0
            elif (e > 0) == below:
                bounds[1] = min(bounds[1], v / e)
            else:
                bounds[0] = max(bounds[0], v / e)
    return bounds[0], bounds[1]
