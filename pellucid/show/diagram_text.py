"""The diagram in a terminal: a structure drawn with box characters, or in plain ASCII.

Each cell of the canvas keeps the directions in which lines leave it; the character follows from
them, so that lines that meet or cross join by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from textwrap import wrap

from pellucid.show.diagram import DiagramStep, Structure
from pellucid.show.diagram_layout import Box, Picture, Point, TextSizes, arrange

WIDTH = 100
NARROW = 80  # with narrower boxes, in which counts and facts take more lines

_UP, _RIGHT, _DOWN, _LEFT, _STREAM = 1, 2, 4, 8, 16
_STEPS = {_UP: (0, -1), _RIGHT: (1, 0), _DOWN: (0, 1), _LEFT: (-1, 0)}
_OPPOSITE = {_UP: _DOWN, _RIGHT: _LEFT, _DOWN: _UP, _LEFT: _RIGHT}
# Indexed by the sum of directions; the residual stream runs up and down in heavy lines.
_LIGHT = " ╵╶╰╷│╭├╴╯─┴╮┤┬┼"
_HEAVY = " ╹╶╰╻┃╻┠╴╯─┸╻┨┰╂"
_ASCII = " |-+||++-+-++++++"
_TO_ASCII = str.maketrans("▼◀⊕×→·ᵀ√−∞…", "v<+x>.T/-~.")


@dataclass(frozen=True)
class _Form:
    """How wide the diagram and its boxes are: three beside each other fill it."""

    width: int

    @property
    def inside(self) -> int:
        """Characters between the walls of a box."""
        return (self.width - 16) // 3 - 4

    def lines(self, step: DiagramStep) -> list[str]:
        """Title with the count at the right edge, then the facts; one line where all fits."""
        if not step.parameters:
            joined = "  ".join((step.title, *step.facts))
            if len(joined) <= self.inside:
                return [joined]
            return [step.title, *self._folded(step.facts)]
        count = f"{step.parameters:,}"
        head = [f"{step.title}{count:>{self.inside - len(step.title)}}"]
        if len(head[0]) > self.inside or head[0] == step.title + count:
            head = [step.title, f"{count:>{self.inside}}"]
        return [*head, *self._folded(step.facts)]

    def _folded(self, facts: tuple[str, ...]) -> list[str]:
        if self.width >= WIDTH:
            return list(facts)
        return [line for fact in facts for line in wrap(fact, self.inside)]

    def metrics(self) -> TextSizes:
        """The distances of the drawing."""
        box = self.inside + 4
        return replace(_METRICS, size=lambda step: (box, 2 + len(self.lines(step))))


def text(
    structure: Structure, *, ascii_only: bool = False, width: int = WIDTH
) -> list[list[tuple[str, str]]]:
    """The diagram as lines of (piece, role), no line wider than `WIDTH`, or `NARROW`.

    width  how much room there is; below `WIDTH` the narrow form

    Roles: "line", "stream", "title", "name", "shape", "count", "fact". Joined without the roles the
    pieces are the plain text.
    """
    form = _Form(WIDTH if width >= WIDTH else NARROW)
    picture = arrange(structure, form.metrics())
    canvas = _Canvas(form.width, picture.height + 1, ascii_only)
    _draw_frame(canvas, picture)
    for box in picture.boxes:
        _draw_box(canvas, box, form, entered=picture.entered(box))
    for wire in picture.wires:
        canvas.line(wire)
    for top, bottom in picture.stream:
        canvas.line([(_STREAM_AT, top), (_STREAM_AT, bottom)], stream=True)
    canvas.write(_STREAM_AT, picture.height, "▼", "stream")
    _draw_labels(canvas, picture)
    _draw_shared(canvas, picture)
    return list(canvas.rows())


def plain(structure: Structure, *, ascii_only: bool = False) -> str:
    """The diagram as one string."""
    rows = text(structure, ascii_only=ascii_only)
    return "\n".join("".join(piece for piece, _ in row) for row in rows)


_STREAM_AT, _BRANCH_AT, _SPINE_AT = 5, 8, 3
_METRICS = TextSizes(
    size=lambda step: (0, 0),  # the form's
    spine=lambda width: _SPINE_AT,
    lane_gap=3,
    step_gap=1,
    bend_gap=2,
    add_gap=2,
    stream=_STREAM_AT,
    branch=_BRANCH_AT,
    frame_top=2,
    frame_pad=1,
)


def _draw_frame(canvas: _Canvas, picture: Picture) -> None:
    top, bottom, right = picture.frame_top, picture.frame_bottom, canvas.width - 1
    canvas.line([(0, top), (right, top), (right, bottom), (0, bottom), (0, top)])
    structure = picture.structure
    each = f" {structure.census.block.each:,} parameters each "
    canvas.write(right - 2 - len(each), top, each, "count")
    last = f"layers.{structure.repeats - 1}"
    span = "layers.0" if structure.repeats == 1 else f"layers.0 … {last}"
    canvas.write(_BRANCH_AT, top, f" × {structure.repeats}  {span} ", "title")


def _draw_box(canvas: _Canvas, box: Box, form: _Form, *, entered: bool) -> None:
    right, bottom = box.x + box.width - 1, box.y + box.height - 1
    canvas.line([(box.x, box.y), (right, box.y), (right, bottom), (box.x, bottom), (box.x, box.y)])
    canvas.line([(box.spine, bottom), (box.spine, bottom + 1)])
    if entered:
        canvas.write(box.spine, box.y, "▼", "line")
    step = box.step
    lines = form.lines(step)
    for row, line in enumerate(lines):
        canvas.write(box.x + 2, box.y + 1 + row, _cut(line, form.inside), "fact")
    canvas.write(box.x + 2, box.y + 1, step.title, "title")
    if step.parameters:
        count = f"{step.parameters:,}"
        row = next(row for row, line in enumerate(lines) if line.endswith(count))
        canvas.write(right - 1 - len(count), box.y + 1 + row, count, "count")


def _draw_labels(canvas: _Canvas, picture: Picture) -> None:
    structure, stream = picture.structure, _STREAM_AT
    for box in picture.boxes:
        x, y = box.exit
        _label(canvas, structure, box.step.gives, (x + 2, y))
    _label(canvas, structure, structure.enters, (stream + 2, picture.frame_top + 1))
    for y, name in picture.adds:
        canvas.write(stream, y, "⊕", "stream")
        canvas.write(stream + 1, y, "◀", "line")
        if name:
            _label(canvas, structure, name, (stream + 2, y + 1))
    for tap in picture.taps:
        canvas.write(tap.spine + 2, tap.y, tap.branch.title, "title")
        note = f"  {tap.branch.note}"
        canvas.write(tap.spine + 2 + len(tap.branch.title), tap.y, note, "fact")


def _label(canvas: _Canvas, structure: Structure, name: str, at: Point) -> None:
    x, y = at
    canvas.write(x, y, name, "name")
    x += len(name) + 1
    canvas.write(x, y, _cut("×".join(structure.shape(name)), canvas.room(x, y)), "shape")


def _cut(words: str, room: int) -> str:
    return words if len(words) <= room else words[: room - 1] + "…"


def _draw_shared(canvas: _Canvas, picture: Picture) -> None:
    structure = picture.structure
    x = _STREAM_AT - _SPINE_AT + (canvas.width - 16) // 3 + 3
    shapes = ["×".join(structure.shape(shared.gives)) for shared in structure.shared]
    name_width = max(len(shared.gives) for shared in structure.shared) + 2
    shape_width = max(map(len, shapes)) + 2
    canvas.write(x, 0, "beside the stream", "title")
    for row, (shared, shape) in enumerate(zip(structure.shared, shapes, strict=True), start=1):
        canvas.write(x, row, shared.gives, "name")
        canvas.write(x + name_width, row, shape, "shape")
        start = x + name_width + shape_width
        canvas.write(start, row, _cut(shared.sentence, canvas.width - start), "fact")


class _Canvas:
    """Cells of directions under cells of text."""

    def __init__(self, width: int, height: int, ascii_only: bool) -> None:
        self.ascii_only, self.width = ascii_only, width
        self.directions = [[0] * width for _ in range(height)]
        self.letters: list[list[tuple[str, str] | None]] = [[None] * width for _ in range(height)]

    def line(self, points: list[Point], *, stream: bool = False) -> None:
        """Horizontal and vertical lines from point to point."""
        for (x, y), (end_x, end_y) in pairwise(points):
            across = end_x != x
            forward = (end_x > x) if across else (end_y > y)
            direction = (_RIGHT if forward else _LEFT) if across else (_DOWN if forward else _UP)
            step_x, step_y = _STEPS[direction]
            for _ in range(abs(end_x - x) + abs(end_y - y)):
                self.directions[y][x] |= direction | (_STREAM if stream else 0)
                x, y = x + step_x, y + step_y
                self.directions[y][x] |= _OPPOSITE[direction] | (_STREAM if stream else 0)

    def room(self, x: int, y: int) -> int:
        """Cells from here to the next line or the edge."""
        return next((n for n, line in enumerate(self.directions[y][x:]) if line), self.width - x)

    def write(self, x: int, y: int, words: str, role: str) -> None:
        """Text over whatever is there."""
        if self.ascii_only:
            words = words.translate(_TO_ASCII)
        for place, letter in enumerate(words, start=x):
            self.letters[y][place] = (letter, role)

    def rows(self) -> Iterator[list[tuple[str, str]]]:
        """Lines of (piece, role), without blanks at their ends."""
        for directions, letters in zip(self.directions, self.letters, strict=True):
            cells = [
                letter or self._line_cell(direction)
                for direction, letter in zip(directions, letters, strict=True)
            ]
            while cells and cells[-1][0] == " ":
                cells.pop()
            runs = groupby(cells, key=lambda cell: cell[1])
            yield [("".join(letter for letter, _ in run), role) for role, run in runs]

    def _line_cell(self, directions: int) -> tuple[str, str]:
        around = directions & ~_STREAM
        heavy = bool(directions & _STREAM)
        table = _ASCII if self.ascii_only else _HEAVY if heavy else _LIGHT
        return table[around], "stream" if heavy else "line"
