"""Which values of a matrix may share a scale: rows, columns, blocks, neighbours in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SIZES = (256, 128, 64, 32, 16)
SAMPLED = 16  # groups, and at most WIDEST values of each
WIDEST = 256


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Groups of values.

    kind  "rows", "columns": of the matrix or its transpose; "flat": of the values row after row;
          "blocks": squares of `size`; "tensor": rows that all share one scale
    size  values of a group; 0 for a whole row or column
    """

    kind: Literal["rows", "columns", "flat", "blocks", "tensor"]
    size: int = 0

    def __str__(self) -> str:
        if self.kind == "tensor":
            return "with one scale"
        if self.kind == "blocks":
            return f"in blocks of {self.size} × {self.size}"
        if not self.size:
            return f"by {self.kind}"
        along = {"rows": "", "columns": " along the columns", "flat": " row after row"}[self.kind]
        return f"in groups of {self.size}{along}"

    def groups(self, x: Tensor) -> list[Tensor]:
        """(rows, columns) -> [(groups, values), the shorter last groups of each row]."""
        if self.kind == "blocks":
            n = self.size
            return [block.reshape(1, -1) for row in x.split(n) for block in row.split(n, 1)]
        if self.kind == "flat":
            x = x.reshape(1, -1)
        x = x.T if self.kind == "columns" else x
        size = self.size or x.shape[1]
        whole = x.shape[1] // size * size
        return [x[:, :whole].reshape(-1, size), x[:, whole:]]

    def where(self, group: int, shape: Sequence[int]) -> str:
        """A group by its rows and columns: "[7, 32:64]"."""
        rows, columns = shape
        if self.kind == "blocks":
            row, column = divmod(group, -(-columns // self.size))
            return f"[{row * self.size}:, {column * self.size}:]"
        if self.kind == "flat":
            return f"[{group * self.size // columns}, {group * self.size % columns}:]"
        length = rows if self.kind == "columns" else columns
        size = self.size or length
        each = length // size
        count = each * (columns if self.kind == "columns" else rows)
        line, place = divmod(group, each) if group < count else (group - count, each)
        span = f"{place * size}:{min(length, (place + 1) * size)}"
        return f"[{span}, {line}]" if self.kind == "columns" else f"[{line}, {span}]"

    def sample(self, x: Tensor, like: Tensor) -> Tensor:
        """(rows, columns) -> a few of the groups (at most 16, values), evenly spread.

        Of long lines some values are taken, the extremes of `like` among them.
        """
        if self.kind == "blocks":
            n = self.size
            picked = [x[:n, :n], x[-n:, -n:]]
            return torch.stack([block.reshape(-1)[: 64 * WIDEST] for block in picked])
        if self.kind == "flat":
            flat = x.reshape(-1)
            whole = flat[: len(flat) // self.size * self.size].reshape(-1, self.size)
            return whole[_spread(len(whole))]
        x, like = (x.T, like.T) if self.kind == "columns" else (x, like)
        lines = x[_spread(len(x))]
        if not self.size:
            return _with_ends(lines, like[_spread(len(x))])
        whole = lines[:, : lines.shape[1] // self.size * self.size]
        each = whole.reshape(len(lines), -1, self.size)
        middle = torch.arange(len(lines)) * 7 % each.shape[1]
        return each[torch.arange(len(lines)), middle]


def _with_ends(lines: Tensor, like: Tensor) -> Tensor:
    """Some values of each line, the smallest and largest of `like` too: these say the scale."""
    if lines.shape[1] <= WIDEST:
        return lines
    ends = lines.gather(1, torch.stack((like.argmin(1), like.argmax(1)), 1))
    return torch.cat((lines[:, : WIDEST - 2], ends), 1)


def _spread(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(SAMPLED, count)).round().long()


def layouts(shape: Sequence[int]) -> Iterator[Layout]:
    """Every layout that fits a matrix of this shape, large groups first: they prove the most."""
    rows, columns = shape
    yield Layout(kind="tensor")
    yield Layout(kind="rows")
    if rows >= 16:
        yield Layout(kind="columns")
    for size in SIZES:
        if columns > size:
            yield Layout(kind="rows", size=size)
        if columns % size and rows * columns > size:
            yield Layout(kind="flat", size=size)
        if rows > size:
            yield Layout(kind="columns", size=size)
    if rows >= 128 and columns >= 128:
        yield Layout(kind="blocks", size=128)
