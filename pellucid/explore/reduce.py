"""Tables too large to show, cell by cell: each shown cell stands for a tile of numbers."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

How = Literal["absmax", "max", "mean"]


def reduce_tiles(tensor: Tensor, how: str, rows: int, columns: int) -> np.ndarray:
    """The last two axes of a tensor in at most rows × columns tiles, float32.

    how  absmax: the number farthest from 0, with its sign; max; mean

    Numbers that the mask switched off (−inf, or the dtype's lowest) are left out, unless a tile has
    no others; a tile with a NaN in it is NaN. ValueError for another `how` or size.
    """
    if how not in get_args(How):
        raise ValueError(f"reduce is {how!r}: expected {', '.join(get_args(How))}")
    if rows < 1 or columns < 1:
        raise ValueError(f"to is {rows},{columns}: expected two numbers from 1")
    values = tensor.detach().float() if tensor.dtype != torch.float64 else tensor.detach()
    table = np.atleast_2d(values.cpu().numpy())
    lowest = torch.finfo(tensor.dtype if tensor.is_floating_point() else torch.float32).min
    off = table <= lowest
    closed = _tiled(off, np.logical_and, rows, columns) if off.any() else None
    if how == "mean":
        sums = _tiled(np.where(off, 0, table), np.add, rows, columns)
        reduced = sums / np.maximum(_tiled((~off).astype(table.dtype), np.add, rows, columns), 1)
    else:
        high = _tiled(np.where(off, -np.inf, table), np.maximum, rows, columns)
        reduced = high
        if how == "absmax":
            low = _tiled(np.where(off, np.inf, table), np.minimum, rows, columns)
            reduced = np.where(-low > high, low, high)
    if closed is not None:
        first = _tiled(table, np.minimum, rows, columns)
        reduced = np.where(closed, first, reduced)
    return np.ascontiguousarray(reduced.astype(np.float32))


def edges(size: int, parts: int) -> np.ndarray:
    """Where each of at most `parts` tiles of an axis begins; they differ by one at most."""
    return np.arange(min(size, parts)) * size // min(size, parts)


def _tiled(table: np.ndarray, function: np.ufunc, rows: int, columns: int) -> np.ndarray:
    *_, height, width = table.shape
    part = function.reduceat(table, edges(width, columns), axis=-1)
    return function.reduceat(part, edges(height, rows), axis=-2)


def statistics(tensor: Tensor, bins: int = 64) -> dict[str, object]:
    """min, max, mean and rms of the finite numbers, how many are NaN or infinite, a histogram.

    Numbers that the mask switched off count as infinite.
    """
    values = tensor.detach().double().reshape(-1)
    lowest = torch.finfo(tensor.dtype).min if tensor.is_floating_point() else -float("inf")
    nan = int(values.isnan().sum())
    open_ = values[values.isfinite() & (values > lowest)]
    infinite = values.numel() - nan - open_.numel()
    if not open_.numel():
        none = {"min": None, "max": None, "mean": None, "rms": None}
        return {**none, "nan": nan, "inf": infinite, "histogram": {"edges": [], "counts": []}}
    counts, at = np.histogram(open_.cpu().numpy(), bins)
    return {
        "min": float(open_.min()),
        "max": float(open_.max()),
        "mean": float(open_.mean()),
        "rms": float(open_.square().mean().sqrt()),
        "nan": nan,
        "inf": infinite,
        "histogram": {"edges": at.tolist(), "counts": counts.tolist()},
    }
