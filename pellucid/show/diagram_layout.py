"""A place for every box and every line of a structure, in characters or in pixels.

           stream   spine of the branch
             ┃        │
    tap      ┠────────╮             A tree is laid out from its leaves up: steps of a series stand
             ┃    ╭───▼───╮         under each other on one spine, lanes side by side. The stream
             ┃    │ box   │         runs straight down at the left; branches leave it to the right
             ┃    ╰───┬───╯         and come back.
    add      ⊕────────╯

x grows to the right, y downwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pellucid.show.diagram import Branch, DiagramStep, Node, Parallel, Series, Structure

Point = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """Sizes of one medium, whole characters or pixels."""

    size: Callable[[DiagramStep], tuple[int, int]]  # width, height of a box
    spine: Callable[[int], int]  # where a line enters something so wide
    lane_gap: int
    step_gap: int  # below a box whose line goes straight on
    bend_gap: int  # below a box whose line turns
    stream: int  # x of the residual stream
    branch: int  # x where branches begin
    add_gap: int  # from an addition to the stream to what follows it
    frame_top: int  # from the frame's edge to the first tap
    frame_pad: int  # right of the branches and below the last addition


@dataclass(frozen=True)
class Box:
    """A step in its place; the line leaves it at (`spine`, `y + height`)."""

    step: DiagramStep
    x: int
    y: int
    width: int
    height: int
    spine: int

    @property
    def exit(self) -> Point:
        """Where its result leaves."""
        return self.spine, self.y + self.height


@dataclass(frozen=True)
class Tap:
    """Where a branch leaves the stream; `spine`, `bottom`, `right` bound what it computes."""

    branch: Branch
    y: int
    spine: int
    bottom: int
    right: int


@dataclass
class Picture:
    """Everything placed. A wire is a line of points; it ends in an arrow head."""

    structure: Structure
    metrics: TextSizes
    boxes: list[Box] = field(default_factory=list)
    wires: list[list[Point]] = field(default_factory=list)
    taps: list[Tap] = field(default_factory=list)
    adds: list[tuple[int, str]] = field(default_factory=list)  # y, the stream's name after it
    frame_top: int = 0
    frame_bottom: int = 0
    width: int = 0
    height: int = 0

    def entered(self, box: Box) -> bool:
        """Whether a line ends at the top of a box."""
        top = (box.spine, box.y)
        return top in (wire[-1] for wire in self.wires) or top in (
            (self.metrics.stream, end) for _, end in self.stream
        )

    @property
    def stream(self) -> list[tuple[int, int]]:
        """The residual stream from y to y, between the boxes that stand on it."""
        x = self.metrics.stream
        on = sorted((box for box in self.boxes if box.spine == x), key=lambda box: box.y)
        below = [box.y for box in on[1:]] + [self.height]
        return [(box.y + box.height, end) for box, end in zip(on, below, strict=True)]


@dataclass
class _Piece:
    """A node laid out at the origin."""

    width: int
    height: int
    boxes: list[Box]
    wires: list[list[Point]]
    entries: list[Point]
    exits: list[Point]

    def moved(self, x: int, y: int) -> _Piece:
        """The same piece somewhere else."""
        return _Piece(
            self.width,
            self.height,
            [
                Box(box.step, box.x + x, box.y + y, box.width, box.height, box.spine + x)
                for box in self.boxes
            ],
            [[(px + x, py + y) for px, py in wire] for wire in self.wires],
            [(px + x, py + y) for px, py in self.entries],
            [(px + x, py + y) for px, py in self.exits],
        )


def arrange(structure: Structure, metrics: TextSizes) -> Picture:
    """Place a whole structure."""
    picture = Picture(structure, metrics)
    y = 0
    for item in structure.stem:
        y = (
            _on_stream(picture, item, y)
            if isinstance(item, DiagramStep)
            else _beside(picture, item, y)
        )
    picture.frame_top = y
    y += metrics.frame_top
    for branch in structure.block:
        y = _branch(picture, branch, y)
    y += metrics.frame_pad - metrics.step_gap
    picture.frame_bottom = y
    y += metrics.step_gap
    for step in structure.tail:
        y = _on_stream(picture, step, y)
    picture.height = y
    picture.width = metrics.frame_pad + max(tap.right for tap in picture.taps)
    return picture


def _on_stream(picture: Picture, step: DiagramStep, y: int) -> int:
    width, height = picture.metrics.size(step)
    x = picture.metrics.stream - picture.metrics.spine(width)
    picture.boxes.append(Box(step, x, y, width, height, picture.metrics.stream))
    return y + height + picture.metrics.step_gap


def _beside(picture: Picture, branch: Branch, y: int) -> int:
    """A branch that reads nothing of the stream stands level with the last box on it."""
    metrics = picture.metrics
    last = picture.boxes[-1]
    x = max(metrics.branch, last.x + last.width + metrics.lane_gap)
    piece = _lay(branch.body, metrics).moved(x, last.y)
    return _join_stream(picture, branch, piece, y)


def _branch(picture: Picture, branch: Branch, y: int) -> int:
    metrics = picture.metrics
    piece = _lay(branch.body, metrics).moved(metrics.branch, y + metrics.step_gap)
    (x, top), *others = piece.entries
    assert not others, "a branch begins with its norm"
    picture.wires.append([(metrics.stream, y), (x, y), (x, top)])
    add = _join_stream(picture, branch, piece, y)
    right = metrics.branch + piece.width
    picture.taps.append(Tap(branch, y, x, picture.adds[-1][0], right))
    return add


def _join_stream(picture: Picture, branch: Branch, piece: _Piece, y: int) -> int:
    metrics = picture.metrics
    (x, bottom), *others = piece.exits
    assert not others, "a branch ends in one sum"
    add = max(y, bottom + metrics.step_gap)
    picture.boxes += piece.boxes
    picture.wires += [*piece.wires, [(x, bottom), (x, add), (metrics.stream, add)]]
    picture.adds.append((add, branch.gives))
    return add + metrics.add_gap


def _lay(node: Node, metrics: TextSizes) -> _Piece:
    if isinstance(node, Series):
        return _lay_series(node, metrics)
    if isinstance(node, Parallel):
        return _lay_parallel(node, metrics)
    width, height = metrics.size(node)
    x = metrics.spine(width)
    return _Piece(width, height, [Box(node, 0, 0, width, height, x)], [], [(x, 0)], [(x, height)])


def _lay_parallel(node: Parallel, metrics: TextSizes) -> _Piece:
    whole = _Piece(-metrics.lane_gap, 0, [], [], [], [])
    for lane in node.lanes:
        piece = _lay(lane, metrics).moved(whole.width + metrics.lane_gap, 0)
        _add(whole, piece)
        whole.width += metrics.lane_gap + piece.width
        whole.height = max(whole.height, piece.height)
        whole.entries += piece.entries
        whole.exits += piece.exits
    return whole


def _lay_series(node: Series, metrics: TextSizes) -> _Piece:
    pieces = [_lay(part, metrics) for part in node.parts]
    width = max(piece.width for piece in pieces)
    whole = _Piece(width, 0, [], [], [], [])
    for piece in pieces:
        straight = len(whole.exits) == len(piece.entries) == 1
        if whole.exits:
            whole.height += metrics.step_gap if straight else metrics.bend_gap
        x = metrics.spine(width) - metrics.spine(piece.width)
        placed = piece.moved(x, whole.height)
        if whole.exits:
            whole.wires += _connect(whole.exits, placed.entries, metrics)
        else:
            whole.entries = placed.entries
        _add(whole, placed)
        whole.exits = placed.exits
        whole.height += piece.height
    return whole


def _add(whole: _Piece, piece: _Piece) -> None:
    whole.boxes += piece.boxes
    whole.wires += piece.wires


def _connect(exits: list[Point], entries: list[Point], metrics: TextSizes) -> list[list[Point]]:
    """One line from every exit to every entry, turning on one level above the entries."""
    level = min(y for _, y in entries) - metrics.bend_gap + metrics.step_gap
    return [
        [(x, y), (end, bottom)] if x == end else [(x, y), (x, level), (end, level), (end, bottom)]
        for x, y in exits
        for end, bottom in entries
    ]
