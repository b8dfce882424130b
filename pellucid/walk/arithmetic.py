"""What several steps of the walk compute in the same way; a step's source shows it below.

Written out here once more, apart from the models', so that either can bear witness against the
other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x, weight, bias):
    """x · weightᵀ + bias, rounded once."""
    return F.linear(x, weight, bias if isinstance(bias, torch.Tensor) else None)


def rms_norm(x, weight, eps, dialect, wide):
    """Root mean square norm of each row (Zhang & Sennrich, 2019)."""
    inside = x.to(x.dtype if dialect.norm == "x" else wide)
    scaled = inside * torch.rsqrt(inside.pow(2).mean(-1, keepdim=True) + eps)
    if dialect.norm_product == "float32":  # the weight first, then the cast
        return (scaled * weight).to(x.dtype)
    return scaled.to(x.dtype) * weight


def part_of_rms_norm(x, mean_square, weight, eps, dialect, wide):
    """Root mean square norm of rows of which x is a part and mean_square knows the whole."""
    scaled = x.to(x.dtype if dialect.norm == "x" else wide) * torch.rsqrt(mean_square + eps)
    if dialect.norm_product == "float32":  # the weight first, then the cast
        return (scaled * weight).to(x.dtype)
    return scaled.to(x.dtype) * weight


def layer_norm(x, weight, bias, eps, wide, dtype):
    """Mean, variance, normalised, scaled and shifted (Ba et al., 2016), in one."""
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normalised * weight + bias).to(dtype)


def one_and(weight, x, dialect, wide):
    """1 + weight, where the norm of x multiplies by that, in the norm's precision."""
    return 1 + weight.to(x.dtype if dialect.norm == "x" else wide)


def turned(number, cis, dialect, dtype):
    """The product with cis, a turn by its angle, in the dialect's rounding."""
    if dialect.rope != "x":
        return number * cis
    # The same product, every operation rounded: (a + ib)(c + is) = (ac - bs) + i(bc + as)
    a, b, c, s = (part.to(dtype) for part in (number.real, number.imag, cis.real, cis.imag))
    return torch.complex((a * c - b * s).to(cis.real.dtype), (b * c + a * s).to(cis.real.dtype))


def side_by_side(x):
    """Components i and i + D/2 as neighbours, (T, D)."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
