"""How the weights of a group become whole numbers: the steps between levels, and the rounding.

    weight  ≈  level × scale (+ offset)

A group's scale and offset are chosen among a few by squared error. Rounding takes the nearest
level. Or, where it is known what a matrix is multiplied with, each column's error is made up for by
the columns after it: what counts is the product, not the weight (Frantar et al., GPTQ, 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

OFFSET = {8: 128, 6: 32, 4: 8}  # bits -> what is added to a level where it is stored
_RANGES = (1.0, 0.93, 0.86, 0.79, 0.72)  # of a group's values that its levels span
_DAMPING = 0.01  # of the mean, added to the diagonal of what columns have in common
_FARTHEST = 8.0  # steps that a value may be away from its weight to make up for others' errors
_SLOPE, _SPREAD_OUT = 0.25, 4.0  # of weights over values; variance in steps² that shows a slope
_TOGETHER = 128  # columns whose errors reach the others in one product


def best_scales(weight: Tensor, bits: int) -> Tensor:
    """Scales (…) of groups (…, group): of a few candidates the one with the least squared error.

    With 8 bits the largest weight becomes the largest level. With 6 or 4 bits it becomes −32 or
    −8, which are levels while 32 and 8 are none (so the scale is negative where that weight is
    positive); with 4 bits also a little more or less, since cutting it off may pay.
    """
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))[..., 0]
    if bits == 8:
        return (largest.abs() / 127).to(torch.bfloat16)
    if bits == 6:
        return (largest / -32).to(torch.bfloat16)
    best = error = None
    for level in (-8.0, -8.6, -7.4):
        scales = (largest / level).to(torch.bfloat16)
        off = (to_levels(weight, scales, bits) * scales[..., None] - weight).square().sum(-1)
        if best is None or error is None:
            best, error = scales, off
        else:
            best, error = torch.where(off < error, scales, best), torch.minimum(off, error)
    assert best is not None, "there are candidates"
    return best


def best_steps(weight: Tensor, bits: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets (…) of groups (…, group), in float32, with the least squared error.

    Levels span a group's values, or cut off some at both ends; then scale and offset are fitted to
    them. counts: how much each value's error counts, as `weight` or of its last dimensions.
    """
    counts = counts.expand_as(weight)
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    middle, least = (low + high) / 2, -OFFSET[bits]
    total = counts.sum(-1, keepdim=True)
    mean = (counts * weight).sum(-1, keepdim=True) / total
    scale = torch.zeros_like(mean)
    offset, error = mean, (counts * (weight - mean).square()).sum(-1, keepdim=True)
    for part in _RANGES:
        slope = part * (high - low) / (2**bits - 1)
        shift, levels = middle + slope / 2, weight
        for _ in range(2):  # levels for the steps, then steps for the levels
            tried = torch.where(slope == 0, 1, slope)
            levels = ((weight - shift) / tried).round().clamp(least, -least - 1)
            centre = (counts * levels).sum(-1, keepdim=True) / total
            off = levels - centre
            squares = (counts * off.square()).sum(-1, keepdim=True)
            slope = (counts * off * weight).sum(-1, keepdim=True) / squares.clamp(min=1e-30)
            shift = mean - slope * centre
        wrong = (counts * (levels * slope + shift - weight).square()).sum(-1, keepdim=True)
        better = (wrong < error) & (slope > 0)
        scale, offset = torch.where(better, slope, scale), torch.where(better, shift, offset)
        error = torch.where(better, wrong, error)
    return scale[..., 0], offset[..., 0]


def to_levels(weight: Tensor, scales: Tensor, bits: int, offsets: Tensor | None = None) -> Tensor:
    """weight (…, group), scales (…) -> levels (…, group) as float32; a scale of 0 gives zeros."""
    wide = scales.float()[..., None]
    over = weight if offsets is None else weight - offsets[..., None]
    levels = torch.where(wide == 0, 0, over / torch.where(wide == 0, 1, wide)).round()
    return levels.clamp(max(-OFFSET[bits], -127), OFFSET[bits] - 1)


class Products:
    """What the inputs of a matrix have in common, made ready for rounding its columns in turn.

    factors  (columns, columns) upper triangular: how an error moves to later columns
    counts   (columns) mean square of each input, over that of all
    """

    def __init__(self, sums: Tensor) -> None:
        """sums: (columns, columns), the sum over the inputs x of x xᵀ."""
        diagonal = sums.diagonal().float()
        self.counts = diagonal / diagonal.mean().clamp(min=1e-30) + 1e-6
        self.factors = _factors(sums)


def compensated_levels(
    weight: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, products: Products
) -> Tensor:
    """Levels (rows, columns) that keep a matrix's products rather than its values.

    weight, scales, offsets: (rows, columns) float32; scales and offsets of each value's group.
    Each column's error moves to those after it, as far as they can make up for it.
    """
    left, factors = weight.clone(), products.factors
    levels, columns = torch.empty_like(left), left.shape[1]
    for first in range(0, columns, _TOGETHER):
        end = min(first + _TOGETHER, columns)
        errors = torch.empty(len(left), end - first)
        for place in range(first, end):
            moved = None if offsets is None else offsets[:, place]
            level = to_levels(left[:, place, None], scales[:, place], bits, moved)[:, 0]
            levels[:, place] = level
            value = level * scales[:, place] + (0 if moved is None else moved)
            error = (left[:, place] - value) / factors[place, place]
            left[:, place:end] -= torch.outer(error, factors[place, place:end])
            errors[:, place - first] = error
        left[:, end:] -= errors @ factors[first:end, end:]
    return levels


def near_enough(weight: Tensor, value: Tensor, scales: Tensor) -> Tensor:
    """Whether the values of groups (…, group) are their weights in levels that make up for errors.

    Then no value is farther away than a few steps, the error's mean is below a step, and the
    values are as large as the weights. A damaged scale or offset fails; one level need not.
    """
    step = scales.abs().clamp(min=1e-30)[..., None]
    error = (value - weight) / step
    off = (value - value.mean(-1, keepdim=True)) / step
    size = off.square().sum(-1)
    slope = (off * (weight - weight.mean(-1, keepdim=True)) / step).sum(-1) / size.clamp(min=1e-9)
    alike = ((slope - 1).abs() < _SLOPE) | (size < _SPREAD_OUT * weight.shape[-1])
    near = (error.abs().amax(-1) <= _FARTHEST) & (error.mean(-1).abs() <= 1)
    return (near & alike) | (scales == 0)


def _factors(products: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of `products`, made regular."""
    wide = products.double()
    mean, damping = wide.diagonal().mean().clamp(min=1e-30), _DAMPING
    while True:  # inputs that depend on one another leave no inverse: more damping
        regular = wide + damping * mean * torch.eye(len(wide), dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex(regular)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        damping *= 10
