"""Static HTML for notebooks: tables of tensors and small pictures, with nothing to load or run.

Colours read on light and dark paper alike; a picture is a PNG inside the HTML, one pixel a number.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Sequence
from html import escape

import torch
from torch import Tensor

ROWS = 80  # of a table; the rest is counted
SIDE = 192  # pixels of a picture, at most, each way
_BELOW, _PAPER, _ABOVE = (28, 82, 143), (247, 245, 239), (173, 74, 23)
_STYLE = "font-family:ui-monospace,monospace;font-size:12px;text-align:"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table; numbers stand on the right."""
    every = [list(row) for row in rows]
    lines = [_row("th", head, "left")]
    lines += [_row("td", row) for row in every[:ROWS]]
    left = len(every) - ROWS
    if left > 0:
        lines.append(_row("td", [f"and {left} more"]))
    return f"<table>{''.join(lines)}</table>"


def folded(parts: Iterable[tuple[str, str]]) -> str:
    """Titles that unfold to the HTML beside them."""
    lines = (
        f"<details><summary>{escape(title)}</summary>{inside}</details>" for title, inside in parts
    )
    return "".join(lines)


def _row(kind: str, cells: Sequence[object], align: str = "") -> str:
    def cell(value: object) -> str:
        number = isinstance(value, int | float)
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        style = f"{_STYLE}{align or ('right' if number else 'left')}"
        return f'<{kind} style="{style}">{escape(text)}</{kind}>'

    return f"<tr>{''.join(map(cell, cells))}</tr>"


def summary(tensor: Tensor) -> tuple[str, str, float | str, float | str, float | str]:
    """Shape, dtype, min, max and mean; masked cells (−inf, the dtype's lowest) are left out."""
    shape = " × ".join(map(str, tensor.shape)) or "one number"
    values = tensor.detach().reshape(-1)
    values = values.abs() if values.is_complex() else values
    if values.is_floating_point():
        values = values[values > torch.finfo(values.dtype).min]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not values.numel():
        return shape, dtype, "", "", ""
    wide = values.double()
    return shape, dtype, float(wide.min()), float(wide.max()), float(wide.mean())


def picture(tensor: Tensor, label: str) -> str:
    """The last two axes of a tensor as an image: blue below 0, paper at 0, ochre above.

    The first of leading axes, and the first `SIDE` numbers each way; masked cells are grey.
    """
    values = tensor.detach().double().cpu()
    while values.ndim > 2:
        values = values[0]
    values = torch.atleast_2d(values)[:SIDE, :SIDE]
    open_ = values.isfinite() & (values > -1e30)
    largest = float(values[open_].abs().max()) if open_.any() else 1.0
    strength = (values / (largest or 1.0)).clamp(-1, 1).nan_to_num()[..., None]
    paper, below, above = (torch.tensor(colour).double() for colour in (_PAPER, _BELOW, _ABOVE))
    side = torch.where(strength < 0, below, above)
    colours = paper + strength.abs() * (side - paper)
    colours[~open_] = 160.0
    data = base64.b64encode(_png(colours.round().to(torch.uint8))).decode()
    width = min(480, 8 * values.shape[1])
    return (
        f'<img alt="{escape(label)}: blue below 0, ochre above, strongest {largest:.4g}" '
        f'style="image-rendering:pixelated;width:{width}px" src="data:image/png;base64,{data}">'
    )


def _png(pixels: Tensor) -> bytes:
    """pixels (rows, columns, 3) uint8 -> a PNG file."""
    rows, columns, _ = pixels.shape
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
