"""Bring a foreign tensor into our axes, from a few words that say how its own are laid out.

    T H*D                  (T, H·D): heads side by side, no batch
    B T H D                (B, T, H, D): heads behind the tokens
    B T 2*D/2              (B, T, D): the D/2 numbers twice over
    B T H*D, interleaved   RoPE pair i at components 2i and 2i + 1, as Meta stores them

Letters are those of `pellucid.names`; an axis named by a number is a repetition and is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

LETTERS = ("B", "T", "S", "C", "H", "Hkv", "D", "D/2", "F", "V")
# The same in every pass, so one tensor may say it for all.
FIXED = ("C", "H", "Hkv", "D", "D/2", "F", "V")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Axes of a foreign tensor; each a product of letters or numbers, slowest first."""

    axes: tuple[tuple[str, ...], ...]
    interleaved: bool = False

    def __str__(self) -> str:
        said = " ".join("*".join(factors) for factors in self.axes)
        return f"{said}, interleaved" if self.interleaved else said

    @property
    def letters(self) -> list[str]:
        """Every letter, in the order of the axes."""
        return [factor for axis in self.axes for factor in axis if not factor.isdigit()]


def parse_layout(text: str) -> Layout:
    """``"B T H*D, interleaved"`` as a layout; ValueError for a letter that is none."""
    said, _, flag = text.partition(",")
    if flag.strip() not in ("", "interleaved"):
        raise ValueError(f"layout {text!r}: {flag.strip()!r} is no hint, expected 'interleaved'")
    axes = tuple(tuple(axis.split("*")) for axis in said.split())
    for factor in (factor for axis in axes for factor in axis):
        if factor not in LETTERS and not factor.isdigit():
            raise ValueError(f"layout {text!r}: {factor!r} is none of {' '.join(LETTERS)}")
    return Layout(axes=axes, interleaved=bool(flag))


def learn_sizes(
    sizes: dict[str, int], pairs: Iterable[tuple[Layout, Tensor]], most: int = 4
) -> None:
    """Add to `sizes` what the shapes say: an axis with one unknown letter gives its size."""
    pairs = list(pairs)
    for _ in range(most):  # H gives D, D gives Hkv: each round knows more
        before = len(sizes)
        for layout, x in pairs:
            axes = _axes(layout, x)
            if len(axes) != x.ndim:
                continue
            for axis, length in zip(axes, x.shape, strict=True):
                known = prod(_size(factor, sizes) or 1 for factor in axis)
                unknown = [factor for factor in axis if not _size(factor, sizes)]
                if len(unknown) == 1 and unknown[0] in FIXED and length % known == 0:
                    sizes[unknown[0]] = length // known
        if len(sizes) == before:
            return


def lay_out(x: Tensor, layout: Layout, dims: tuple[str, ...], sizes: Mapping[str, int]) -> Tensor:
    """x in the order of `dims`, a view where that is possible.

    A batch axis that x or `dims` lacks is added or, where its size is 1, dropped. ValueError where
    the shape is not what the layout says.
    """
    axes = _axes(layout, x)
    if x.ndim != len(axes):
        raise ValueError(f"shape {tuple(x.shape)} has not the {len(axes)} axes of '{layout}'")
    for place in reversed(range(len(axes))):
        if len(axes[place]) > 1:
            x = x.unflatten(place, _factors(axes[place], x.shape[place], layout, sizes))
    letters = [factor for axis in axes for factor in axis]
    for place in reversed(range(len(letters))):
        if letters[place].isdigit():
            if bool((x != x.narrow(place, 0, 1)).any()):
                raise ValueError(f"its axis {letters[place]} of '{layout}' holds no repetition")
            x = x.select(place, 0)
            del letters[place]
    for letter, length in zip(letters, x.shape, strict=True):
        if letter in FIXED and letter != "V" and sizes.get(letter, length) != length:
            raise ValueError(f"{letter} of '{layout}' is {length}, expected {sizes[letter]}")
    if "B" in dims and "B" not in letters:
        letters, x = ["B", *letters], x[None]
    extra = [letter for letter in letters if letter not in dims]
    x = x.permute([letters.index(letter) for letter in (*extra, *dims)])
    if extra == ["B"] and len(x) == 1:
        x = x[0]
    if layout.interleaved:
        x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    return x


def _axes(layout: Layout, x: Tensor) -> tuple[tuple[str, ...], ...]:
    """The layout's axes, less the batch that x was recorded without, or with one of size 1."""
    axes = layout.axes
    if x.ndim == len(axes) - 1 and axes[0] == ("B",):
        return axes[1:]
    if x.ndim == len(axes) + 1 and len(x) == 1 and "B" not in layout.letters:
        return (("B",), *axes)
    return axes


def _factors(
    axis: tuple[str, ...], length: int, layout: Layout, sizes: Mapping[str, int]
) -> list[int]:
    found = [_size(factor, sizes) for factor in axis]
    if found.count(None) > 1:
        unknown = " and ".join(f for f, size in zip(axis, found, strict=True) if size is None)
        raise ValueError(
            f"'{layout}': nothing says how large {unknown} are; "
            "put their sizes into the name map, sizes: {H: 32}"
        )
    known = prod(size for size in found if size)
    if length % known or (None not in found and length != known):
        raise ValueError(f"an axis of {length} is not {'*'.join(axis)} of '{layout}', {known}")
    return [size or length // known for size in found]


def _size(factor: str, sizes: Mapping[str, int]) -> int | None:
    return int(factor) if factor.isdigit() else sizes.get(factor)
