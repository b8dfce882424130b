"""Figures of the walk. Each function returns ``(figure, axes)`` and draws into `ax` where given.

No window is ever opened and no global setting touched: figures are made without pyplot, so they
need no closing either. Signed values have colours that diverge around 0 (see `colours`); cells that
may not be looked at are hatched and never coloured; labels show their white space.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from pellucid.show import colours
from pellucid.show.digest import (
    Digest,
    StepDigest,
    digest,
    dtype_name,
    hidden_cells,
    part,
    shape_text,
    ticks,
    visible,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Drawn(NamedTuple):
    """A figure and its axes; a notebook shows the picture."""

    figure: Figure
    axes: Axes

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.figure.savefig(file, format="png", dpi=110, bbox_inches="tight", facecolor="white")
        return file.getvalue()


_INK, _FAINT = "#26241f", "#8b867a"
_MOST_LABELS = 40  # per axis; more would not be readable
_LONGEST_LABEL = 14
_SMALL = 8.0  # points
_QUERY_KEY = "T: query", "S: key"  # what the axes of scores and patterns are


def figure(
    step: StepDigest | Digest, token_strings: Sequence[str] = (), *, ax: Axes | None = None
) -> Drawn | None:
    """The figure of a step, of the kind its `picture` asks for; None for a step without one.

    `token_strings` label every axis that counts the tokens of the prompt.
    """
    shown = digest(step)
    if shown.picture is None or shown.part is None or shown.part.size == 0:
        return None
    told: dict[str, Any] = {"name": shown.address, "shape": shown.shape, "dtype": shown.dtype}
    values = shown.part
    if shown.picture == "rays":
        return rays(values, **told, ax=ax)
    if values.ndim <= 1:
        return bars(values, **told, ax=ax)
    axes_names = shown.dims[-2], shown.dims[-1]
    return heatmap(
        values,
        rows=token_strings if shown.dims[-2] == "T" else (),
        columns=token_strings if shown.dims[-1] in ("T", "S") else (),
        hidden=hidden_cells(shown.name, values),
        axes_names=_QUERY_KEY if axes_names == ("T", "S") else axes_names,
        **told,
        ax=ax,
    )


def save(drawn: Figure, path: str | Path) -> None:
    """Write a figure; the format follows the file's ending (png, svg, pdf)."""
    drawn.savefig(path, dpi=160, bbox_inches="tight", facecolor="white")


def attention(
    values: Tensor | np.ndarray,
    token_strings: Sequence[str],
    *,
    name: str = "attn.pattern",
    ax: Axes | None = None,
) -> Drawn:
    """Scores or pattern (T, S) or (H, T, S): row looks at column, both labelled with tokens.

    `name` decides what is masked: "…masked_scores" where a score says so, "…pattern" the future.
    """
    array = _array(values)
    return heatmap(
        array,
        name=name,
        dtype=dtype_name(values.dtype),
        rows=token_strings,
        columns=token_strings,
        hidden=hidden_cells(name, array),
        axes_names=_QUERY_KEY,
        ax=ax,
    )


def heatmap(
    values: Tensor | np.ndarray,
    *,
    name: str = "",
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    hidden: np.ndarray | None = None,
    axes_names: tuple[str, str] = ("row", "column"),
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    ax: Axes | None = None,
) -> Drawn:
    """Values (R, C) as colours; (N, R, C) as N tiles side by side, one scale for all.

    rows, columns  labels of the axes, for example token strings; numbers where empty
    hidden         cells to hatch instead
    shape, dtype   of the whole tensor, where `values` is a part of it
    """
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap

    array = _array(values)
    told = title(name, shape or array.shape, dtype or dtype_name(values.dtype))
    if shape is not None and tuple(shape) != array.shape:
        told += "\nshown: [" + ", ".join(f":{size}" for size in array.shape) + "]"
    array, is_real = _real(array)
    tiles = array.reshape(-1, *array.shape[-2:])
    kept = ~np.zeros_like(tiles, dtype=bool) if hidden is None or not is_real else ~hidden
    kept = kept.reshape(tiles.shape)
    scale = colours.scale_of(tiles[kept])
    canvas, across = _mosaic(np.where(kept, tiles, np.nan))
    fig, ax = _axes(ax, _size_of(canvas.shape, bool(len(columns))))
    _hatch(ax, tiles.shape, across)
    how: dict[str, Any] = {
        "interpolation": "nearest",
        "aspect": "equal" if _square(canvas.shape) else "auto",
    }
    drawn = ax.imshow(  # what has no value is transparent: the hatch beneath shows through
        np.ma.masked_where(np.isnan(canvas), canvas),
        cmap=LinearSegmentedColormap.from_list("pellucid", colours.LIGHT),
        vmin=-scale.limit,
        vmax=scale.limit,
        zorder=2,
        **how,
    )
    faults = _mosaic(np.where(kept & np.isnan(tiles), 1.0, np.nan))[0]
    if np.nansum(faults):
        fault = ListedColormap([colours.NOT_A_NUMBER])
        ax.imshow(np.ma.masked_where(np.isnan(faults), faults), cmap=fault, zorder=2, **how)
    if len(tiles) == 1:
        _label(ax, "y", rows, tiles.shape[1], axes_names[0])
        _label(ax, "x", columns, tiles.shape[2], axes_names[1])
    else:
        _label_tiles(ax, tiles.shape, across, rows, columns)
        _name_axes(ax, axes_names)
    _title(ax, told)
    bar = fig.colorbar(drawn, ax=ax, fraction=0.045, pad=0.02)
    bar.ax.set_ylim(scale.low, scale.limit)
    bar.ax.tick_params(labelsize=_SMALL, color=_FAINT)
    bar.ax.set_ylabel(f"colours: {scale}", fontsize=_SMALL, color=_FAINT)
    return Drawn(fig, ax)


def rays(
    vectors: Tensor | np.ndarray,
    *,
    position: int = 3,
    name: str = "rope.cis",
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    ax: Axes | None = None,
) -> Drawn:
    """One ray per pair in the complex plane, for the token at `position`.

    vectors  complex (T, D/2), or real pairs (T, D/2, 2); (D/2) and (D/2, 2) are one token's
    The rays of cis have length 1 and pair i has turned by position × frequency i: the first pairs
    have gone round, the last have hardly left the real axis.
    """
    told = title(name, shape or tuple(vectors.shape), dtype or dtype_name(vectors.dtype))
    points = complex_pairs(_array(vectors))
    position = min(position, len(points) - 1)
    ends = points[position]
    radius = float(np.abs(ends).max(initial=0)) or 1.0
    fig, ax = _axes(ax, (5.0, 5.4))
    from matplotlib import colormaps
    from matplotlib.patches import Circle

    ax.add_patch(Circle((0, 0), radius, fill=False, ec=_FAINT, lw=0.6, ls=(0, (4, 3))))
    ax.axhline(0, color=_FAINT, lw=0.5)
    ax.axvline(0, color=_FAINT, lw=0.5)
    tints = colormaps["viridis"](np.linspace(0, 0.92, len(ends)))
    for pair, (end, tint) in enumerate(zip(ends, tints, strict=True)):
        ax.plot([0, end.real], [0, end.imag], color=tint, lw=1.3, solid_capstyle="round")
        ax.plot(end.real, end.imag, "o", color=tint, ms=3)
        if pair in ticks(len(ends), 8):
            out = end / (abs(end) or 1) * (abs(end) + 0.07 * radius)
            ax.text(out.real, out.imag, str(pair), ha="center", va="center", fontsize=_SMALL - 1)
    ax.set_xlim(-1.18 * radius, 1.18 * radius)
    ax.set_ylim(-1.18 * radius, 1.18 * radius)
    ax.set_aspect("equal")
    ax.set_xlabel(
        f"real part: first of the pair;  position {position}, {len(ends)} pairs", fontsize=_SMALL
    )
    ax.set_ylabel("imaginary part: second of the pair", fontsize=_SMALL)
    _title(ax, told)
    return Drawn(fig, ax)


def bars(
    values: Tensor | np.ndarray,
    *,
    name: str = "",
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    ax: Axes | None = None,
) -> Drawn:
    """Values (N) as stems over their index; a logarithmic axis where they span three decades."""
    told = title(name, shape or tuple(values.shape), dtype or dtype_name(values.dtype))
    array = np.atleast_1d(_array(values)).astype(np.float64)
    fig, ax = _axes(ax, (7.0, 2.8))
    places = np.arange(len(array))
    positive = bool((array > 0).all())
    if positive and array.max() > 1e3 * array.min():
        ax.set_yscale("log")
        ax.plot(places, array, "o", ms=3, color=colours.LIGHT[-3])
    else:
        tints = np.where(array < 0, colours.LIGHT[2], colours.LIGHT[-3])
        ax.vlines(places, 0, array, colors=list(tints), lw=max(0.4, min(6.0, 300 / len(array))))
        ax.axhline(0, color=_INK, lw=0.6)
    _label(ax, "x", (), len(array), "index")
    _title(ax, told)
    return Drawn(fig, ax)


def top_tokens(
    texts: Sequence[str],
    probabilities: Sequence[float],
    *,
    name: str = "next token",
    ax: Axes | None = None,
) -> Drawn:
    """The likeliest next tokens, most likely on top, with their probabilities."""
    fig, ax = _axes(ax, (5.0, 0.6 + 0.28 * len(texts)))
    places = np.arange(len(texts))
    ax.barh(places, probabilities, color=colours.LIGHT[-3], height=0.72)
    for place, probability in enumerate(probabilities):
        ax.text(probability, place, f" {probability:.1%}", va="center", fontsize=_SMALL)
    ax.set_yticks(places)
    _set_texts(ax.set_yticklabels([drawable(text) for text in texts], fontsize=_SMALL))
    ax.invert_yaxis()
    ax.set_xlim(0, max(probabilities, default=1.0) * 1.15 or 1.0)
    ax.set_xlabel("probability", fontsize=_SMALL)
    _title(ax, name)
    return Drawn(fig, ax)


def title(name: str, shape: Sequence[int], dtype: str) -> str:
    """``layers.0.attn.scores[0]  (17, 17)  float32``."""
    return f"{name}  {shape_text(shape)}  {dtype}"


def complex_pairs(array: np.ndarray) -> np.ndarray:
    """Complex (T, D/2) of complex or of real pairs, with or without the token axis."""
    if not np.iscomplexobj(array):
        array = array[..., 0] + 1j * array[..., 1]
    return array.reshape(-1, array.shape[-1])


def drawable(text: str) -> str:
    """A token as a label: white space visible, and escapes for what the font has no glyph for."""
    known = _glyphs()
    shown = "".join(
        sign if ord(sign) in known else sign.encode("unicode_escape").decode("ascii")
        for sign in visible(text)
    )
    return shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 1] + "…"


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


# Parts ------------------------------------------------------------------------------------------


def _axes(ax: Axes | None, size: tuple[float, float]) -> Drawn:
    from matplotlib.figure import Figure

    if ax is None:
        fig = Figure(figsize=size, layout="constrained")
        ax = fig.add_subplot()
    else:
        fig = ax.get_figure(root=True)
        assert fig is not None, "an Axes belongs to a Figure"
    for side in ax.spines.values():
        side.set_linewidth(0.6)
        side.set_color(_FAINT)
    ax.tick_params(labelsize=_SMALL, color=_FAINT, labelcolor=_INK)
    return Drawn(fig, ax)


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return part(values, values.numel()) if isinstance(values, Tensor) else np.asarray(values)


def _real(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """Complex (T, N) as its real and imaginary parts, two tiles."""
    if np.iscomplexobj(array):
        return np.stack((np.real(array), np.imag(array))), False
    return array.astype(np.float64), True


def _mosaic(tiles: np.ndarray) -> tuple[np.ndarray, int]:
    """(N, R, C) -> one picture, tiles a cell apart, and how many of them stand in a row."""
    count, rows, columns = tiles.shape
    if count == 1:
        return tiles[0], 1
    across = max(1, min(count, round(sqrt(count * rows / columns)) or 1))
    down = ceil(count / across)
    whole = np.full((down * (rows + 1) - 1, across * (columns + 1) - 1), np.nan)
    for number, tile in enumerate(tiles):
        top, left = _corner(number, tiles.shape, across)
        whole[top : top + rows, left : left + columns] = tile
    return whole, across


def _corner(number: int, shape: Sequence[int], across: int) -> tuple[int, int]:
    return number // across * (shape[1] + 1), number % across * (shape[2] + 1)


def _hatch(ax: Axes, shape: Sequence[int], across: int) -> None:
    """A hatched ground under each tile: it shows wherever a cell has no colour."""
    from matplotlib.patches import Rectangle

    for number in range(shape[0]):
        top, left = _corner(number, shape, across)
        ax.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5),
                shape[2],
                shape[1],
                facecolor="white",
                edgecolor="#c9c5bb",
                hatch="////",
                linewidth=0,
                zorder=1,
            )
        )


def _square(shape: Sequence[int]) -> bool:
    return max(shape) <= 4 * min(shape)


def _size_of(shape: Sequence[int], labelled: bool) -> tuple[float, float]:
    """Inches: cells of a readable size for small tensors, at most a page for large ones."""
    margin = 1.9 if labelled else 1.2
    height, width = (margin + min(6.5, max(1.6, 0.24 * size)) for size in shape)
    return (width + 0.6, height) if _square(shape) else (max(width, 7.0), height)


def _label(ax: Axes, which: str, labels: Sequence[str], count: int, axis_name: str) -> None:
    axis = ax.xaxis if which == "x" else ax.yaxis
    places = list(ticks(count, _MOST_LABELS if labels else 10))
    axis.set_ticks(places)
    axis.set_label_text(axis_name, fontsize=_SMALL, color=_FAINT)
    if not labels:
        return
    texts = [drawable(labels[place]) if place < len(labels) else str(place) for place in places]
    written = axis.set_ticklabels(texts, fontsize=_SMALL)
    _set_texts(written)
    if which == "x":
        for text in written:
            text.set_rotation(60)
            text.set_horizontalalignment("right")
            text.set_rotation_mode("anchor")


def _label_tiles(
    ax: Axes, shape: Sequence[int], across: int, rows: Sequence[str], columns: Sequence[str]
) -> None:
    """The number of each tile, and the tokens along the first tile of each row and column."""
    corners = [_corner(number, shape, across) for number in range(shape[0])]
    for number, (top, left) in enumerate(corners):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        ax.text(
            left, top, str(number), fontsize=_SMALL, color=_INK, va="bottom", zorder=3, bbox=box
        )
    tops, lefts = sorted({top for top, _ in corners}), sorted({left for _, left in corners})
    along = ("y", tops, rows, shape[1]), ("x", lefts, columns, shape[2])
    for which, starts, labels, count in along:
        axis = ax.xaxis if which == "x" else ax.yaxis
        if not labels or count > _MOST_LABELS:
            axis.set_ticks([])
            continue
        _label(ax, which, [*labels[:count], ""] * len(starts), len(starts) * (count + 1) - 1, "")
    for side in ax.spines.values():
        side.set_visible(False)


def _name_axes(ax: Axes, axes_names: tuple[str, str]) -> None:
    ax.set_ylabel(axes_names[0], fontsize=_SMALL, color=_FAINT)
    ax.set_xlabel(axes_names[1], fontsize=_SMALL, color=_FAINT)


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=9, loc="left", family="monospace", color=_INK, parse_math=False)


def _set_texts(written: Sequence[Any]) -> None:
    """Dollar signs in tokens are dollar signs, not mathematics."""
    for text in written:
        text.set_parse_math(False)
