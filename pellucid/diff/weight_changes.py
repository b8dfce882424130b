"""What was done to a weight that diverged, in words that help: scaled, shifted, a low-rank change …

Each name is proven on all values: with it the two agree to the precision they are stored in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Change = tuple[str, str]  # cause, finding

LOOSE = ("noise", "other", "unrelated", "low-rank")  # levels, where there are any, tell more
MOST_RANK = 64
LARGE = 1 << 24  # values; of more, the first rows are looked at
FEW = 4  # rows or columns that are named whatever differs in them
NOISE = 0.3  # relative size up to which an unstructured change is called noise


def changed(a: Tensor, b: Tensor, unit: float, head: tuple[int, int] | None = None) -> Change:
    """(cause, finding) for two tensors of one shape that differ.

    a, b  finite; vectors or matrices
    unit  roundoff of the type that holds b
    head  (dimension, length) of a head's share in a projection of attention
    """
    flat = a.ndim != 2
    if flat:
        a, b = a.reshape(-1, 1), b.reshape(-1, 1)
    told = ""
    if a.numel() > LARGE:
        first = int((a != b).any(1).nonzero()[0, 0])
        rows = slice(first, first + max(1, LARGE // a.shape[1]))
        a, b, told = a[rows], b[rows], f", told from row {first} on"
    a, b = a.double(), b.double()
    for cause, finding in _in_part(a, b, unit, head, flat):
        return cause, finding + told
    cause, finding = next(_whole(a, b, unit))
    return cause, finding + told


def _in_part(
    a: Tensor, b: Tensor, unit: float, head: tuple[int, int] | None, flat: bool
) -> Iterator[Change]:
    """A change confined to at most half of the rows or columns, and what it is there."""
    differ = a != b
    for dim, word in ((0, "values" if flat else "rows"), (1, "columns")):
        touched = differ.any(1 - dim).nonzero()[:, 0]
        if len(touched) > a.shape[dim] / 2 or a.shape[dim] == 1:
            continue
        # Values scattered at random reach half of the lines with 1.4 in each: no line is chosen.
        if not flat and len(touched) > FEW and int(differ.sum()) < 2 * len(touched):
            continue
        x, y = a.index_select(dim, touched), b.index_select(dim, touched)
        where = f"{word} {spans(touched.tolist())}"
        if head is not None and head[0] == dim:
            heads = touched.unique() // head[1]
            if len(touched) == len(heads.unique()) * head[1]:
                word, where = "heads", f"heads {spans(heads.unique().tolist())}"
        cause, finding = next(_whole(x, y, unit))
        verb = "scaled" if cause == "scaled weights" else "shifted" if "shift" in cause else "other"
        yield f"{verb} {word}", f"only {where} differ: {finding}"


def _whole(a: Tensor, b: Tensor, unit: float) -> Iterator[Change]:
    """Every known change of all values; the first that agrees is the one, the last always does."""
    tolerance = 2 * unit * torch.maximum(a.abs(), b.abs()) + 1e-300
    scale = float((a * b).sum() / a.pow(2).sum().clamp(min=1e-300))
    if abs(scale - 1) > 2 * unit and _agree(a * scale, b, tolerance):
        yield "scaled weights", f"B's values are A's times {scale:.7g}"
    trust = torch.maximum(a.abs(), b.abs()).clamp(min=1e-12).pow(-2)  # small values say it best
    shift = float((trust * (b - a)).sum() / trust.sum())
    least = 2 * unit * float(a.pow(2).mean().sqrt())  # a smaller amount is lost in rounding
    if abs(shift) > least and _agree(a + shift, b, tolerance + 2 * unit * abs(shift)):
        yield "shifted weights", f"B's values are A's plus {shift:.4g}"
    yield from _by_lines(a, b, tolerance, unit)
    yield from _reordered(a, b)
    if torch.equal(a.flatten().sort().values, b.flatten().sort().values):
        yield "reordered values", "B has A's values in another order (reshaped for transposed?)"
    for places in range(1, 7):
        cut = (a * 10**places).round() / 10**places
        if 10.0**-places > 8 * least and _agree(cut, b, tolerance):
            yield "rounded to decimals", f"B's values are A's, rounded to {places} decimals"
    yield from _low_rank(a, b, unit)
    yield _unstructured(a, b)


def _agree(made: Tensor, b: Tensor, tolerance: Tensor) -> bool:
    return bool(((made - b).abs() <= tolerance).all())


def _by_lines(a: Tensor, b: Tensor, tolerance: Tensor, unit: float) -> Iterator[Change]:
    """Each row, or each column, by a factor or an amount of its own."""
    for dim, word in ((1, "rows"), (0, "columns")):
        if a.shape[dim] < 8:
            continue
        factor = (a * b).sum(dim, keepdim=True) / a.pow(2).sum(dim, keepdim=True).clamp(min=1e-300)
        if float((factor - 1).abs().max()) > 4 * unit and _agree(a * factor, b, tolerance):
            low, high = float(factor.min()), float(factor.max())
            yield f"scaled {word}", f"each of the {word} by its own factor, {low:.4g} to {high:.4g}"
        amount = (b - a).mean(dim, keepdim=True)
        least = 2 * unit * float(a.pow(2).mean().sqrt())
        if float(amount.abs().max()) > least and _agree(
            a + amount, b, tolerance + 2 * unit * amount.abs()
        ):
            low, high = float(amount.min()), float(amount.max())
            yield (
                f"shifted {word}",
                f"each of the {word} by its own amount, {low:.3g} to {high:.3g}",
            )


def _reordered(a: Tensor, b: Tensor) -> Iterator[Change]:
    """A's rows or columns in another order, matched by value."""
    for dim, word in ((0, "rows"), (1, "columns")):
        x, y = (a, b) if dim == 0 else (a.T, b.T)
        if len(x) < 2:
            continue
        probe = torch.linspace(1, 2, x.shape[1], dtype=torch.float64).sin()
        order_a, order_b = (x * probe).sum(1).argsort(), (y * probe).sum(1).argsort()
        if torch.equal(x[order_a], y[order_b]):
            moved = int((order_a != order_b).sum())
            yield f"reordered {word}", f"B's {word} are A's in another order, {moved} moved"


def _low_rank(a: Tensor, b: Tensor, unit: float) -> Iterator[Change]:
    """A difference with all its energy in a few directions, the rest as large as rounding is."""
    delta, most = b - a, min(MOST_RANK, min(a.shape) // 4)
    if most < 1:
        return
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(delta.shape[1], most + 8, generator=random, dtype=torch.float64)
    basis = torch.linalg.qr(delta @ (delta.T @ (delta @ drawn))).Q
    sizes = torch.linalg.svdvals(basis.T @ delta)
    noise = float(unit * torch.maximum(a.abs(), b.abs()).pow(2).mean().sqrt())
    floor = 1.5 * noise * (a.shape[0] ** 0.5 + a.shape[1] ** 0.5)
    rank = int((sizes > floor).sum())
    rest = float(delta.pow(2).sum() - sizes[:rank].pow(2).sum())
    if 0 < rank <= most and rest <= 2 * noise**2 * delta.numel() and float(sizes[0]) > 4 * floor:
        size = float(delta.norm() / a.norm())
        finding = f"B − A has rank {rank}, relative size {size:.2g} (a merged adapter?)"
        yield "low-rank change", finding


def _unstructured(a: Tensor, b: Tensor) -> Change:
    """Noise, or other weights altogether, by the size and the shape of the difference."""
    delta = b - a
    size = float(delta.norm() / a.norm().clamp(min=1e-300))
    count = int((delta != 0).sum())
    where = f"{count:,} of {a.numel():,} values differ, relative RMS {size:.2g}"
    alike = float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))
    if abs(alike) < 0.2 and a.numel() > 64:
        return "unrelated weights", f"{where}; correlation {alike:.2f}"
    if size > NOISE or a.numel() < 64 or abs(_correlation(a, delta)) > 0.3:
        return "other weights", where
    grows = _correlation(a.abs(), delta.abs()) > 0.3
    draws = (delta / a)[a.abs() > 0.1 * a.abs().mean()] if grows else delta.flatten()
    draws = draws - draws.mean()
    kurtosis = float(draws.pow(4).mean() / draws.pow(2).mean().pow(2).clamp(min=1e-300))
    shape = {1.5 < kurtosis < 2.2: "uniform", 2.5 < kurtosis < 3.7: "gaussian"}.get(True)
    if shape is None:
        return "other weights", where
    how = "in proportion to each value" if grows else "the same at all values"
    return "noise", f"{where}: {shape} noise, {how}"


def _correlation(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-300))


def spans(places: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> "0…2, 7"; of many, the first four."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    told = [str(first) if first == last else f"{first}…{last}" for first, last in runs]
    return ", ".join(told[:4]) + (" …" if len(told) > 4 else "")
