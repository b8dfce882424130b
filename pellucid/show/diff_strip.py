"""The strip of a diff: one mark per named tensor, one row per layer, drawn as SVG.

ratio    1000 ┤        ▲            error of B ÷ what rounding explains, logarithmic
            1 ┼────────│──────      above the band: diverged
       1/1000 ┤▒▒o▒▒●▒▒│▒▒●▒▒▒      the band: rounding
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from math import log10
from typing import Any

from pellucid import graph, names
from pellucid.show.diff_story import factor

Json = Mapping[str, Any]
SLOT, ROW, GAP, LEFT = 51, 40, 8, 62  # pixels
LETTER = 4.7  # height of one letter of a slanted heading
DECADES = 3  # above and below 1
WORDS = {"within-rounding": "within rounding", "not-judged": "not judged"}


def strips(report: Json) -> Iterator[tuple[int, str]]:
    """(decoding step, SVG) of every pass."""
    judged = {row["name"]: row for row in report["tensors"]}
    everything = [*judged, *(name for name in report["not_observed"] if name not in judged)]
    for step in sorted({names.step_of(name) for name in everything}):
        here = [name for name in everything if names.step_of(name) == step]
        yield step, _strip(here, judged)


def _strip(here: Sequence[str], judged: Mapping[str, Json]) -> str:
    rows = _rows(here)
    width = (
        LEFT + SLOT * max(len(cells) for _, cells in rows) + 5 * GAP
    )  # room for the last heading
    parts, y, headed = [], 0, ()
    for label, cells in rows:
        leaves = tuple(_leaf(name) for name in cells)
        if leaves != headed:
            y += 18 + round(LETTER * max(len(_short(leaf)) for leaf in leaves))
            parts += [_head(leaf, place, y) for place, leaf in enumerate(leaves)]
            headed = leaves
        parts.append(_band(label, len(cells), y))
        parts += [_cell(name, judged.get(name), place, y) for place, name in enumerate(cells)]
        y += ROW + GAP
    return (
        f'<svg class="strip" width="{width}" height="{y}" viewBox="0 0 {width} {y}" role="group" '
        f'aria-label="Every tensor by its error">{"".join(parts)}</svg>'
    )


def _rows(here: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The tensors before the layers, each layer, those after; in the order of the forward pass."""
    order = [row.leaf for row in graph.ROWS]
    found: dict[int | None, dict[str, str]] = {}
    for name in here:
        if graph.known(name):
            found.setdefault(names.layer_of(name), {})[_leaf(name)] = name
    tail = ("final_norm", "logits")
    whole = found.pop(None, {})
    rows = [("", [whole[leaf] for leaf in order if leaf in whole and leaf not in tail])]
    leaves = [leaf for leaf in order if any(leaf in layer for layer in found.values())]
    for layer in sorted(place for place in found if place is not None):
        held = [found[layer].get(leaf) for leaf in leaves]
        rows.append((f"layer {layer}", [name for name in held if name is not None]))
    rows.append(("", [whole[leaf] for leaf in tail if leaf in whole]))
    return [(label, cells) for label, cells in rows if cells]


def _leaf(name: str) -> str:
    return graph.row(name).leaf


def _head(leaf: str, place: int, y: int) -> str:
    x = LEFT + SLOT * place + SLOT // 2
    turned = f"translate({x + 3} {y - 6}) rotate(-42)"
    return f'<text class="head" transform="{turned}">{_short(leaf)}</text>'


def _short(leaf: str) -> str:
    return leaf.removeprefix("attn.").removeprefix("mlp.")


def _band(label: str, count: int, y: int) -> str:
    middle, width = y + ROW // 2, SLOT * count
    return (
        f'<text class="row" x="{LEFT - 10}" y="{middle + 4}">{label}</text>'
        f'<rect class="band" x="{LEFT}" y="{middle}" width="{width}" height="{ROW // 2}"/>'
        f'<line class="one" x1="{LEFT}" x2="{LEFT + width}" y1="{middle}" y2="{middle}"/>'
    )


def _cell(name: str, row: Json | None, place: int, y: int) -> str:
    x = LEFT + SLOT * place
    if row is None:
        told = f"{name}: not observed"
        mark = f'<path class="absent" d="M{x + SLOT // 2 - 4} {y + ROW - 4}h8"/>'
        return f"<g><title>{escape(told)}</title>{mark}</g>"
    verdict = row["verdict"]
    told = f"{name}: {WORDS.get(verdict, verdict)}"
    if verdict not in ("identical", "not-judged"):
        told += f", {factor(row['ratio'])} what rounding explains"
    return (
        f'<a href="#{escape(name)}" data-name="{escape(name)}" class="{verdict}" '
        f'aria-label="{escape(told)}"><title>{escape(told)}</title>'
        f'<rect class="slot" x="{x}" y="{y}" width="{SLOT}" height="{ROW}"/>'
        f"{_mark(row, x + SLOT // 2, y)}</a>"
    )


def _mark(row: Json, x: int, y: int) -> str:
    verdict, bottom = row["verdict"], y + ROW
    if verdict == "not-judged":
        return f'<text class="mark" x="{x}" y="{bottom - 5}">?</text>'
    if verdict == "identical":
        return f'<circle class="mark" cx="{x}" cy="{bottom - 5}" r="2.5"/>'
    top = _height(row["ratio"], y)
    stem = f'<line class="stem" x1="{x}" x2="{x}" y1="{bottom}" y2="{top:.1f}"/>'
    if row["ratio"] is None or row["ratio"] > 10**DECADES:
        return f'{stem}<path class="mark" d="M{x} {y}l6 9h-12z"/>'
    return f'{stem}<circle class="mark" cx="{x}" cy="{top:.1f}" r="4"/>'


def _height(ratio: float | None, y: int) -> float:
    """Where a ratio stands: 1 in the middle of the row, `DECADES` up and down."""
    if ratio is None:
        return y + 6
    decades = max(-DECADES, min(DECADES, log10(ratio) if ratio > 0 else -DECADES))
    return y + ROW / 2 - decades / DECADES * (ROW / 2 - 5)


def diverged_steps(rows: Iterable[Json]) -> set[int]:
    """Decoding steps in which something diverged."""
    return {names.step_of(row["name"]) for row in rows if row["verdict"] == "diverged"}
