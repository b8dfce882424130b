"""The report of a diff on the terminal: aligned, coloured, short."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from pellucid.show.diff_story import Json, StoryLine, factor, facts, meaning, story

_LABEL = 14  # columns; "not observed" and a gap
_MARKS = {
    "good": ("✓", "green"),
    "declared": ("≈", "yellow"),
    "bad": ("✗", "red"),
    "none": ("–", "dim"),
}
_COLOURS = {
    "identical": "green",
    "within-rounding": "green",
    "explained": "yellow",
    "diverged": "red",
    "not-judged": "dim",
}
_MOST_LINES = 8  # of one kind, unless every tensor is asked for


def show(report: Json, out: Console, *, every: bool) -> None:
    """Print the whole report."""
    for text in _head(report):
        _print(out, text)
    _print(out, Text())
    for line in story(report):
        for text in _story_lines(line, out, every):
            _print(out, text)
    if every:
        _print(out, Text())
        for text in _table(report["tensors"]):
            _print(out, text)
    verdict = report["verdict"]
    _print(out, Text())
    last = Text(f"{verdict.replace('-', ' ').upper()}  ", style=f"bold {_COLOURS[verdict]}")
    _print(out, last.append(meaning(report), style="not bold default"))


def _print(out: Console, text: Text) -> None:
    out.print(text, soft_wrap=True)


def _head(report: Json) -> list[Text]:
    rows = [facts(side) for side in report["sides"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for letter, row in zip("AB", rows, strict=True):
        cells = "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(Text(f"{letter:<4}", style="bold").append(cells.rstrip(), style="not bold"))
    return lines


def _story_lines(line: StoryLine, out: Console, every: bool) -> list[Text]:
    """A line of the story: label, mark, sentence; what belongs to it below, indented."""
    sign, colour = _MARKS.get(line.mark, (" ", "default"))
    strong = line.label == "FIRST"
    more = line.more
    if len(more) > _MOST_LINES and not every:
        left = len(more) - _MOST_LINES + 1
        more = (*more[: _MOST_LINES - 1], f"and {left} more; --all lists them")
    lines = []
    for place, part in enumerate((line.text, *more)):
        for row, piece in enumerate(_wrapped(part, out)):
            text = Text("" if place or row else line.label, style="bold" if strong else "dim")
            text.pad_right(_LABEL - len(text))
            text.append("  " if place or row else f"{sign} ", style=f"not dim {colour}")
            style = f"bold {colour}" if strong and not place else "not dim not bold default"
            lines.append(text.append(piece, style=style))
    return lines


def _wrapped(text: str, out: Console) -> list[str]:
    """Within the terminal; in a pipe a sentence stays on its line."""
    if not out.is_terminal:
        return [text]
    room = max(40, out.width - _LABEL - 2)
    return textwrap.wrap(text, room, break_on_hyphens=False) or [""]


def _table(tensors: Sequence[Json]) -> list[Text]:
    head = ("tensor of B", "verdict", "error of A", "error of B", "of the allowed", "")
    rows = [head, *(_row(row) for row in tensors)]
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    lines = []
    for row in rows:
        name, verdict, *numbers, note = row
        text = Text(name.ljust(widths[0]) + "   ", style="dim" if row is head else "")
        text.append(verdict.ljust(widths[1]), style=_COLOURS.get(verdict, ""))
        for number, width in zip(numbers, widths[2:], strict=True):
            text.append("   " + number.rjust(width))
        lines.append(text.append(f"   {note}" if note else ""))
    return lines


def _row(row: Json) -> tuple[str, ...]:
    unknown = row["verdict"] in ("not-judged", "identical")  # R is made where something differs
    numbers = [_number(row["error_a"]), _number(row["error_b"]), factor(row["ratio"])]
    note = ", ".join(word for word in (row["where"], row["note"]) if word)
    return (row["name"], row["verdict"], *(["–"] * 3 if unknown else numbers), note)


def _number(number: Any) -> str:
    return "∞" if number is None else f"{number:.1e}"
