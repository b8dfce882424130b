"""The diagram as a picture: a structure as one SVG file that needs nothing but itself.

It follows the reader's light or dark setting and uses the fonts at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from pellucid.show.diagram import DiagramStep, Structure
from pellucid.show.diagram_layout import Box, Picture, Point, Tap, TextSizes, arrange

_BOX = 196
_ROUND = 10  # radius of a line's corner
_HEADER = 118  # above the stem: title and sum
_MARGIN = 24
_PANEL = 44  # from a panel's edge to its tap


def _size(step: DiagramStep) -> tuple[int, int]:
    return _BOX, 36 + 17 * len(step.facts)


_METRICS = TextSizes(
    size=_size,
    spine=lambda width: width // 2,
    lane_gap=40,
    step_gap=48,
    bend_gap=72,
    add_gap=92,
    stream=140,
    branch=284,
    frame_top=100,
    frame_pad=56,
)

_STYLE = """
svg { --paper: #ffffff; --ink: #1b2330; --soft: #566174; --line: #8a94a6; --card: #ffffff;
  --edge: #d3d9e3; --frame: #f4f6fa; --panel: #ffffff; --stream: #d9480f; --name: #0b5cad;
  --table: #0f8a75; --norm: #b7791f; --linear: #2f6bd8; --operation: #8a94a6; --input: #d9480f;
  background: var(--paper); }
@media (prefers-color-scheme: dark) { svg { --paper: #10141b; --ink: #e8ecf3; --soft: #a3aec0;
  --line: #76829a; --card: #1c232e; --edge: #364152; --frame: #151a23; --panel: #10141b;
  --stream: #ff8a4c; --name: #7db7ff; --table: #35c2a5; --norm: #e0a84a; --linear: #6b9dff;
  --operation: #76829a; --input: #ff8a4c; } }
text { font-family: Inter, "Segoe UI", system-ui, -apple-system, "Helvetica Neue", Arial,
  "Liberation Sans", sans-serif; font-size: 12.5px; fill: var(--soft); }
.mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 12px; }
.heading { font-size: 26px; font-weight: 650; fill: var(--ink); }
.title { font-size: 14px; font-weight: 600; fill: var(--ink); }
.times { font-size: 24px; font-weight: 700; fill: var(--ink); }
.name { fill: var(--name); }
.count { fill: var(--ink); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; }
.paper { fill: var(--paper); }
.frame { fill: var(--frame); stroke: var(--edge); stroke-width: 1.25; }
.panel { fill: var(--panel); stroke: var(--edge); }
.card { fill: var(--card); stroke: var(--edge); stroke-width: 1.25; }
.wire { fill: none; stroke: var(--line); stroke-width: 1.75; }
.head { fill: var(--line); }
.stream { fill: none; stroke: var(--stream); stroke-width: 5; }
.streamhead { fill: var(--stream); }
.add { fill: var(--card); stroke: var(--stream); stroke-width: 2.5; }
.plus { stroke: var(--stream); stroke-width: 2.5; stroke-linecap: round; }
.table { fill: var(--table); } .norm { fill: var(--norm); } .linear { fill: var(--linear); }
.operation { fill: var(--operation); } .input { fill: var(--input); }
""".strip()

_MARKERS = """
<defs>
<marker id="head" class="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9"
 markerHeight="9" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0.5 10 5 0 9.5z"/></marker>
<marker id="streamhead" class="streamhead" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="15"
 markerHeight="15" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 10 5 0 10z"/></marker>
</defs>
""".strip()


def svg(structure: Structure, title: str) -> str:
    """The diagram as the text of an SVG file."""
    picture = arrange(structure, _METRICS)
    width = picture.width + 2 * _MARGIN
    height = _HEADER + picture.height + 2 * _MARGIN
    label = escape(f"{title}: the flow from tokens to logits", quote=True)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{label}">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{_STYLE}\n</style>",
        _MARKERS,
        f'<rect class="paper" width="{width}" height="{height}"/>',
        *_header(structure, title),
        f'<g transform="translate({_MARGIN} {_HEADER})">',
        *_frame(picture),
        *_stream(picture),
        *(_wire(points) for points in picture.wires),
        *(line for box in picture.boxes for line in _box(structure, box)),
        *_additions(picture),
        *_shared(picture),
        "</g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, words: str, style: str = "") -> str:
    attribute = f' class="{style}"' if style else ""
    return f'<text x="{x:g}" y="{y:g}"{attribute}>{escape(words, quote=False)}</text>'


def _header(structure: Structure, title: str) -> Iterator[str]:
    yield _text(_MARGIN, 44, title, "heading")
    yield _text(_MARGIN, 68, structure.census.written, "count")
    letters = "T tokens in this pass, S tokens seen so far" if structure.sizes["T"] == "T" else ""
    tokens = letters or f"shapes for {int(structure.sizes['T']):,} tokens"
    yield _text(_MARGIN, 88, f"Shapes without the batch: {tokens}." if letters else f"{tokens}.")


def _frame(picture: Picture) -> Iterator[str]:
    """The block, drawn as a sheet on top of others where it stands for several."""
    structure, top = picture.structure, picture.frame_top
    width, height = picture.width, picture.frame_bottom - top
    for sheet in (10, 5, 0) if structure.repeats > 1 else (0,):
        yield (
            f'<rect class="frame" x="{sheet}" y="{top + sheet}" width="{width}" '
            f'height="{height}" rx="14"/>'
        )
    panel_right = width - 16
    times = f"× {structure.repeats}"
    yield _text(_METRICS.branch - 16, top + 36, times, "times")
    last = structure.repeats - 1
    span = "layers.0" if not last else f"layers.0 … layers.{last}"
    yield _text(_METRICS.branch + 20 + 15 * len(times), top + 34, span, "mono name")
    each = f"{structure.census.block.each:,} parameters each"
    yield _text(panel_right, top + 34, each, "count end")
    for tap in picture.taps:
        yield from _panel(tap, panel_right)


def _panel(tap: Tap, right: int) -> Iterator[str]:
    left, top = _METRICS.branch - 16, tap.y - _PANEL
    yield (
        f'<rect class="panel" x="{left}" y="{top}" width="{right - left}" '
        f'height="{tap.bottom + 18 - top}" rx="10"/>'
    )
    yield _text(left + 16, top + 27, tap.branch.title, "title")
    yield _text(right - 16, top + 27, tap.branch.note, "end")


def _stream(picture: Picture) -> Iterator[str]:
    x = _METRICS.stream
    for top, bottom in picture.stream:
        yield f'<path class="stream" d="M{x} {top}V{bottom - 9}" marker-end="url(#streamhead)"/>'
    structure = picture.structure
    yield from _label(structure, structure.enters, (x, picture.frame_top + _METRICS.frame_top - 46))
    for y, name in picture.adds:
        if name:
            yield from _label(structure, name, (x, y + 14))


def _wire(points: list[Point]) -> str:
    """A line with rounded corners and an arrow head."""
    (x, y), *_ = points
    path = f"M{x} {y}"
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        arrive, leave = _towards(corner, before), _towards(corner, after)
        path += f"L{arrive[0]} {arrive[1]}Q{corner[0]} {corner[1]} {leave[0]} {leave[1]}"
    end = points[-1]
    if end[0] == _METRICS.stream:
        end = (end[0] + 13, end[1])  # the sign of the addition has a radius
    return f'<path class="wire" d="{path}L{end[0]} {end[1]}" marker-end="url(#head)"/>'


def _towards(corner: Point, other: Point) -> Point:
    """The point where a line begins to bend on its way from one point to a corner."""
    (x, y), (to_x, to_y) = corner, other
    far = max(abs(to_x - x), abs(to_y - y))
    near = min(_ROUND, far // 2)
    return x + (to_x - x) * near // max(far, 1), y + (to_y - y) * near // max(far, 1)


def _box(structure: Structure, box: Box) -> Iterator[str]:
    step, x, y = box.step, box.x, box.y
    shape = f'width="{box.width}" height="{box.height}" rx="8"'
    yield f'<rect class="card" x="{x}" y="{y}" {shape}/>'
    yield (
        f'<rect class="{step.kind}" x="{x + 7}" y="{y + 9}" width="4" height="{box.height - 18}" '
        'rx="2"/>'
    )
    yield _text(x + 20, y + 23, step.title, "title")
    if step.parameters:
        yield _text(x + box.width - 12, y + 23, f"{step.parameters:,}", "count end")
    for row, fact in enumerate(step.facts):
        yield _text(x + 20, y + 42 + 17 * row, fact)
    yield from _label(structure, step.gives, box.exit)


def _label(structure: Structure, name: str, at: Point) -> Iterator[str]:
    """A tensor's name and shape, right of the line that carries it."""
    x, y = at
    yield _text(x + 11, y + 18, name, "mono name")
    yield _text(x + 11, y + 33, " × ".join(structure.shape(name)), "mono")


def _additions(picture: Picture) -> Iterator[str]:
    x = _METRICS.stream
    for y, _ in picture.adds:
        yield f'<circle class="add" cx="{x}" cy="{y}" r="11"/>'
        yield f'<path class="plus" d="M{x - 5} {y}H{x + 5}M{x} {y - 5}V{y + 5}"/>'


def _shared(picture: Picture) -> Iterator[str]:
    structure = picture.structure
    x = _METRICS.branch + _METRICS.spine(_BOX)
    yield _text(x, 14, "Beside the stream", "title")
    right = max(84, *(8 * len(shared.gives) + 4 for shared in structure.shared))
    for row, shared in enumerate(structure.shared):
        y = 36 + 19 * row
        yield _text(x, y, shared.gives, "mono name")
        yield _text(x + right, y, " × ".join(structure.shape(shared.gives)), "mono")
        yield _text(x + right + 166, y, shared.sentence)
