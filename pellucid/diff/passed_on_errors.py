"""Levels other than the nearest, where errors of one column were passed on to the next (GPTQ)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pellucid.diff.rounding import precision

FARTHEST = 4.0  # steps that a compensated value may be away from A's


def compensated(a: Tensor, b: Tensor, step: Tensor, spread: float, farthest: float) -> bool:
    """Whether the errors of later columns make up for those of earlier ones, as GPTQ's do.

    There B − A = −ρ (I + K): ρ, the rounding of each column after its correction, is independent
    with variance step²/12, and K is strictly triangular and the same for all rows. So the
    covariance of the errors over the rows has larger variances than rounding has, but the same
    determinant, and its inverse has a larger trace too. Errors of another origin (other weights
    quantised, an adapter) raise the determinant, and the inverse's trace falls. The bounds are four
    standard deviations of the sample. The first columns are enough, as many as there are rows for.

    step               (rows, columns) the distance of two levels at each value
    spread, farthest   RMS error in units of rounding's, largest error in steps
    """
    rows, columns = a.shape
    count = min(columns, rows // 2, 512)
    if count < 8 or farthest > FARTHEST:
        return False
    if spread < 1.1 or abs(_alike(a, b)) > 0.1 + 2 / a.numel() ** 0.5:
        return False  # errors no larger than rounding's were not passed on, nor were errors like A
    steps, theirs = step[:, :count], b[:, :count].double()
    weight = 1 / steps.pow(2).mean(1, keepdim=True).sqrt()
    error = (theirs - a[:, :count].double()) * weight
    covariance = error.T @ error / rows
    if int(torch.linalg.matrix_rank(covariance)) < count:
        return False
    stored = _spacing(theirs, precision(b))
    expected = ((steps.pow(2) + stored.pow(2)) / 12 * weight.pow(2)).mean(0)
    normal = covariance / (expected[:, None] * expected).sqrt()
    degrees = (rows - torch.arange(count, dtype=torch.float64)) / 2
    correction = float((torch.digamma(degrees) + math.log(2 / rows)).sum())
    fluctuation = float(torch.polygamma(1, degrees).sum())
    excess = float(torch.linalg.slogdet(normal)[1]) - correction
    variances = float(normal.diagonal().log().sum()) + count / rows
    of_correlation = max(fluctuation - 2 * count / rows, 0.0) ** 0.5
    inverse = torch.linalg.inv(normal).diagonal().mean() * (rows - count - 1) / rows
    correlated = variances - excess >= 4 * of_correlation
    alone = excess <= 4 * fluctuation**0.5
    if not (correlated and alone):
        return False
    larger = inverse - 1 >= 0.3 * (normal.diagonal().mean() - 1)  # few rows hardly tell
    return bool(larger) or _column_by_column(a, b, step)


def _column_by_column(a: Tensor, b: Tensor, step: Tensor) -> bool:
    """Whether each of the first columns is A's, corrected by the errors before it, rounded.

    With the same weights of the earlier columns' errors in all rows, every value is within half a
    step; an error of another origin leaves a few values outside, whatever the weights. Values at
    the ends of their group do not count, those were cut off. There are six rows for each weight.
    """
    theirs = b.double()
    errors = theirs - a.double()
    stored = _spacing(theirs, precision(b))
    columns = min(len(a) // 6, 16)
    if columns < 4:
        return False
    for column in range(columns):
        group = step == step[:, column, None]
        low = torch.where(group, theirs, math.inf).amin(1)
        high = torch.where(group, theirs, -math.inf).amax(1)
        inner = (theirs[:, column] > low) & (theirs[:, column] < high)
        if int(inner.sum()) < 4 * columns:
            return False
        unit = step[inner, column]
        bound = 0.52 + stored[inner, column] / unit
        earlier, error = errors[inner, :column] / unit[:, None], errors[inner, column] / unit
        if not _within(earlier, error, bound):
            return False
    return True


def _spacing(values: Tensor, unit: float) -> Tensor:
    """Distance of the numbers that a dtype of this roundoff has around each value."""
    return 2 * unit * torch.exp2(values.abs().clamp(min=1e-30).log2().floor())


def _within(known: Tensor, seen: Tensor, bound: Tensor) -> bool:
    """Whether some weights w leave |seen − known w| within the bound in every row (Lawson, 1961).

    known (N, K), seen and bound (N,). The weighted least squares of the rows that are farthest out.
    """
    weights = torch.ones_like(seen)
    for _ in range(40 if known.shape[1] else 1):
        root = weights.sqrt()[:, None]
        left = seen
        if known.shape[1]:
            fit = torch.linalg.lstsq(known * root, seen[:, None] * root, driver="gelsd").solution
            left = seen - (known @ fit)[:, 0]
        out = left.abs() / bound
        if float(out.max()) <= 1:
            return True
        weights = weights * out
        weights = (weights / weights.mean()).clamp(min=1e-12)
    return False


def _alike(a: Tensor, b: Tensor) -> float:
    """Cosine of A and B − A: far from 0 where B is A scaled."""
    a = a.double()
    error = b.double() - a
    return float((a * error).sum() / (a.norm() * error.norm()).clamp(min=1e-300))
