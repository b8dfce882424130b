"""Colours of values: blue below zero, paper at zero, ochre above; the same in figures and on pages.

Sign is the first thing to read off a tensor, so the scale diverges around 0 and is symmetric: equal
strength means equal magnitude. Masked cells have no colour at all; drawings hatch them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# From most negative over zero to most positive. On dark paper strong values are light.
LIGHT = (
    "#0b2c55", "#1c528f", "#4b88bf", "#9cc3df", "#d9e6ea",
    "#f7f5ef",
    "#f5dfc6", "#eeb483", "#d97b3c", "#ad4a17", "#6b2708",
)  # fmt: skip
DARK = (
    "#d3ecff", "#8cc6f2", "#4b96d1", "#2d6699", "#223f5a",
    "#1d1f24",
    "#4e3421", "#8f4f22", "#d37a33", "#f7b36f", "#ffe9cc",
)  # fmt: skip
NOT_A_NUMBER = "#c2188b"  # never part of the scale: a NaN in a model is a fault to be seen

# One value far out would leave all others without colour: beyond this many times the bulk, clip.
_BULK = 0.995
_FAR = 3.0


@dataclass(frozen=True)
class Scale:
    """Range of the colours, -limit … +limit, and what it leaves out."""

    limit: float  # strongest colour
    extreme: float  # largest magnitude there is
    beyond: int  # values stronger than `limit`
    low: float  # -limit, or 0 where nothing is negative

    def __str__(self) -> str:
        text = f"{self.low:.3g} … {self.limit:.3g}"
        if self.beyond:
            text += f", {self.beyond:,} beyond (up to {self.extreme:.3g})"
        return text


def scale_of(values: np.ndarray) -> Scale:
    """The scale of an array of any shape; infinities and NaN are left out."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return Scale(limit=1.0, extreme=0.0, beyond=0, low=0.0)
    sizes = np.abs(finite)
    extreme = float(sizes.max())
    bulk = float(np.quantile(sizes, _BULK, method="higher"))
    limit = bulk if bulk > 0 and extreme > _FAR * bulk else extreme
    return Scale(
        limit=limit or 1.0,
        extreme=extreme,
        beyond=int((sizes > limit).sum()),
        low=-(limit or 1.0) if finite.min() < 0 else 0.0,
    )
