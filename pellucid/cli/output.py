"""What verbs print with: a console, one JSON object, text as it is written, progress."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console

from pellucid.cli.streams import can_encode

_PIPE_WIDTH = 120  # columns where there is no terminal; rich would take 80 and fold


def print_json(value: Any) -> None:
    """One JSON object on stdout and nothing else; escaped where the encoding is not Unicode."""
    ascii_only = not can_encode("→…█", sys.stdout)
    json.dump(value, sys.stdout, ensure_ascii=ascii_only, allow_nan=True)
    sys.stdout.write("\n")


def print_report(report: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """A report as one JSON object, or the lines that say the same, long ones unfolded."""
    if as_json:
        print_json(report)
        return
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)


def write_text(text: str) -> None:
    """Text on standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def console(*, stderr: bool = False) -> Console:
    """A console that writes plain text into a pipe and colours on a terminal."""
    piped = not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, soft_wrap=piped, width=_width(piped))


def _width(piped: bool) -> int | None:
    """Columns to write in; None: as many as the terminal has. ``COLUMNS=0`` states nothing."""
    stated = os.environ.get("COLUMNS", "")
    if stated.isdecimal() and int(stated) > 0:
        return int(stated)
    if piped:
        return _PIPE_WIDTH
    return shutil.get_terminal_size().columns if stated else None


def shows_progress(out: Console) -> bool:
    """Whether lines that go away can be shown: on a terminal, but not in a cell of a notebook.

    ``!pellucid`` there runs on a terminal of its own, whose every line stays in the cell.
    """
    return out.is_terminal and "JPY_PARENT_PID" not in os.environ


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """What is being done, in one line that goes away; nothing where stderr is no terminal."""
    out = console(stderr=True)
    if not shows_progress(out):
        yield lambda stage: None
        return
    with out.status("") as status:
        yield lambda stage: status.update(f"[dim]{stage}[/dim]")


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """One bar of `progress_bars`: a function of what is done and of all there is to do, or None."""
    with progress_bars(quiet=quiet) as advance:
        yield None if advance is None else partial(advance, what)


@contextmanager
def progress_bars(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each stage while work goes on; gives a function of stage, done and total.

    Gives None in a pipe, or when `quiet`.
    """
    out = console(stderr=True)
    if quiet or not shows_progress(out):
        yield None
        return
    from rich.progress import Progress

    with Progress(console=out, transient=True) as bars:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance
