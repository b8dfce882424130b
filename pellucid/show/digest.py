"""A step made small: what a figure, a page or a terminal shows of it, without the whole tensor.

A walk through a large model yields tensors one at a time and each may be hundreds of megabytes;
a digest keeps the words, the statistics, a corner of the numbers and a part to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pellucid import graph, names

ELEMENTS = 16_384  # kept for pictures: 128 × 128, or 17 tokens × 963 channels
STRINGS = 512  # kept of a list of strings


class StepDigest(Protocol):
    """A step of the walk, as `pellucid.walk` yields them."""

    @property
    def name(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def formula(self) -> str: ...
    @property
    def value(self) -> Any: ...
    @property
    def dims(self) -> Sequence[str]: ...
    @property
    def source(self) -> str: ...
    @property
    def picture(self) -> str | None: ...
    @property
    def inputs(self) -> Sequence[str]: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> str: ...
    def stats(self) -> Mapping[str, float | None]: ...


@dataclass(frozen=True, kw_only=True)
class Digest:
    """What is shown of one step. `part` is its beginning, as float32, complex or int."""

    name: str
    address: str
    title: str
    sentence: str
    formula: str
    source: str
    inputs: tuple[str, ...]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    stats: Mapping[str, float | None]
    picture: str | None
    corner: str  # the numbers, as text
    part: np.ndarray | None = None
    strings: tuple[str, ...] = ()

    @property
    def cut(self) -> bool:
        """Whether `part` is less than the whole."""
        return self.part is not None and self.part.shape != self.shape

    def cut_to(self, elements: int) -> Digest:
        """The same with at most `elements` values to draw."""
        if self.part is None:
            return self
        return replace(
            self, part=np.ascontiguousarray(self.part[window(self.part.shape, elements)])
        )


def digest(step: StepDigest | Digest, elements: int = ELEMENTS) -> Digest:
    """What is shown of `step`, at most `elements` values of it; a digest stays as it is."""
    if isinstance(step, Digest):
        return step
    value = step.value
    tensor = value if isinstance(value, Tensor) else None
    return Digest(
        name=step.name,
        address=step.address,
        title=step.title,
        sentence=sentence(step),
        formula=step.formula,
        source=step.source,
        inputs=tuple(step.inputs),
        dims=tuple(step.dims),
        shape=tuple(step.shape),
        dtype=step.dtype,
        stats=dict(step.stats()),
        picture=step.picture,
        corner=corner(value) if tensor is not None else "",
        part=None if tensor is None else part(tensor, elements),
        strings=() if tensor is not None else tuple(map(str, value[:STRINGS])),
    )


def sentence(step: StepDigest) -> str:
    """What the tensor is, in the vocabulary's words; "" for what is no name of it."""
    return graph.row(step.name).sentence if graph.known(step.name) else ""


def dtype_name(dtype: Any) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[int]) -> str:
    """``"(17, 128)"``, as Python writes it."""
    return str(tuple(int(size) for size in shape))


def window(shape: Sequence[int], elements: int) -> tuple[slice, ...]:
    """The first of each axis, at most `elements` in all; the longest axes give first."""
    kept = list(shape)
    while prod(kept) > elements:
        longest = max(range(len(kept)), key=kept.__getitem__)
        others = prod(kept) // kept[longest]
        kept[longest] = max(elements // others, -(-kept[longest] // 2))
    return tuple(slice(size) for size in kept)


def part(tensor: Tensor, elements: int = ELEMENTS) -> np.ndarray:
    """The part of a tensor that pictures show, as an array of its own."""
    small = tensor.detach()[window(tensor.shape, elements)]
    if small.is_complex():
        small = small.to(torch.complex64)
    elif small.is_floating_point():
        small = small.to(torch.float32)  # NumPy has no bfloat16
    return small.cpu().numpy().copy()


def hidden_cells(name: str, values: np.ndarray) -> np.ndarray:
    """Which cells (…, T, S) of a score, pattern or mask may not be looked at.

    Scores say so themselves, by -inf or the lowest number of their dtype; a mask by False; in the
    pattern they are the future, where softmax left exactly 0.
    """
    leaf = names.parse(name)[0].rpartition(".")[2]
    if values.dtype == bool:
        return ~values
    if leaf == "pattern":
        rows, columns = values.shape[-2:]
        future = np.arange(columns)[None, :] > np.arange(rows)[:, None] + (columns - rows)
        return future & (values == 0)
    if leaf in ("masked_scores", "mask"):
        return values <= np.finfo(np.float16).min  # the lowest number of any dtype, or -inf
    return np.zeros(values.shape, dtype=bool)


# The numbers as text ----------------------------------------------------------------------------

_ROWS, _EDGE = 3, 3


def corner(tensor: Tensor) -> str:
    """The first three rows and the outer six columns of a tensor, in columns; "…" for the rest."""
    tensor = tensor.detach()
    if tensor.ndim == 0:
        return number_texts(tensor.reshape(1))[0]
    if tensor.numel() == 0:
        return "(empty)"
    lead = tensor.ndim - 2
    table = tensor[(0,) * lead] if lead > 0 else tensor.reshape(-1, tensor.shape[-1])
    rows, columns = table.shape
    shown = min(rows, _ROWS)
    outer = list(range(columns))
    if columns > 2 * _EDGE:
        outer = [*range(_EDGE), *range(columns - _EDGE, columns)]
    texts = number_texts(table[:shown][:, outer].reshape(-1))
    width = max(map(len, texts))
    lines = []
    for row in range(shown):
        cells = [text.rjust(width) for text in texts[row * len(outer) : (row + 1) * len(outer)]]
        if len(cells) < columns:
            cells.insert(_EDGE, "…")
        lines.append("  ".join(cells))
    if rows > shown:
        lines.append(f"⋮ {rows - shown:,} more row{'s' * (rows - shown > 1)}")
    if lead > 0:
        lines.append(f"at [{', '.join('0' * lead)}] of {shape_text(tensor.shape[:lead])}")
    return "\n".join(lines)


def number_texts(numbers: Tensor) -> list[str]:
    """One-dimensional numbers, all in the format that fits them."""
    if numbers.dtype == torch.bool:
        return ["yes" if number else "no" for number in numbers.tolist()]
    if not numbers.is_complex() and not numbers.is_floating_point():
        return [str(number) for number in numbers.tolist()]
    if numbers.is_complex():
        real, imaginary = number_texts(numbers.real), number_texts(numbers.imag.abs())
        signs = ["-" if number < 0 else "+" for number in numbers.imag.tolist()]
        return [f"{a}{s}{b}i" for a, s, b in zip(real, signs, imaginary, strict=True)]
    values = numbers.to(torch.float64).tolist()
    sizes = [abs(value) for value in values if 0 < abs(value) < 3e4]
    plain = not sizes or (max(sizes) >= 1e-3)
    return [_number(value, plain) for value in values]


def _number(value: float, plain: bool) -> str:
    if value != value or abs(value) == float("inf"):
        return f"{value}"
    return f"{value:.4f}" if plain and abs(value) < 3e4 else f"{value:.3e}"


# Token strings as labels -------------------------------------------------------------------------

_SIGNS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}


def visible(text: str, longest: int | None = None) -> str:
    """A token string with its white space to be seen and nothing that acts on the text around it.

    Control, format (right-to-left marks, joiners) and unassigned characters become escapes.
    """
    shown = "".join(_sign(character) for character in text)
    if longest is not None and len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return shown


def _sign(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    # U+200D joins the parts of one emoji and is harmless.
    if character.isprintable() or character == "\u200d":
        return character
    return character.encode("unicode_escape").decode("ascii")


def ticks(count: int, most: int) -> range:
    """Which of `count` places get a label, evenly, so that at most `most` do."""
    return range(0, count, max(1, -(-count // most)))
