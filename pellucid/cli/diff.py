"""``pellucid diff``: where two implementations of one model part, and why."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pellucid.cli.common import DTYPES, console, print_json

EPILOG = """\
A and B: a model folder, owner/name, demo, demo-gpt2; hf:FOLDER runs a folder in transformers; a
trace file (.safetensors, .npz). R, what both are held against, is A's arithmetic at higher
precision: take as A the side you trust.

exit status: 0 the same (identical, within rounding, explained), 1 diverged, 2 trouble"""


def diff_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid diff``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("a", nargs="?", metavar="A", help="the side that is trusted")
    parser.add_argument("b", nargs="?", metavar="B", help="the side in question")
    group = parser.add_argument_group("what to run")
    prompt = group.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="(a short English sentence)")
    prompt.add_argument(
        "--tokens", metavar="IDS", type=_rows, help="token ids: 1,2,3 or rows 1,2;3,4"
    )
    group.add_argument(
        "--steps", type=_count, default=0, metavar="N", help="decoding steps with the KV cache too"
    )
    for side in ("a", "b"):
        title = f"how to run {side.upper()}, where it is a model folder"
        group = parser.add_argument_group(title)
        group.add_argument(f"--dtype-{side}", choices=DTYPES, help="(as stored)")
        group.add_argument(f"--dialect-{side}", metavar="NAME", help="whose rounding: meta, hf …")
    group.add_argument("--fused", action="store_true", help="B's attention in one kernel")
    group.add_argument(
        "--copies", type=_count, default=1, metavar="N", help="each row of B so often in one batch"
    )
    group.add_argument("--fast", action="store_true", help="B decodes in C (with --steps)")
    group = parser.add_argument_group("how to read a recording")
    group.add_argument(
        "--map",
        metavar="MAP",
        help="what foreign names mean: transformers, meta, transformerlens, gguf, litgpt, or a "
        "YAML file (found out)",
    )
    group = parser.add_argument_group("report")
    group.add_argument("--all", action="store_true", help="list every tensor")
    group.add_argument("--json", action="store_true", help="one JSON object instead of text")
    group.add_argument("--html", type=Path, metavar="FILE", help="also one self-contained page")
    group.add_argument(
        "--self-test",
        action="store_true",
        help="seed known faults, in A and B or two random models, and see which are found",
    )


def _rows(text: str) -> list[list[int]]:
    """``"1,2,3;4,5"`` -> [[1, 2, 3], [4, 5]]."""
    try:
        rows = [[int(word) for word in row.replace(",", " ").split()] for row in text.split(";")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"token ids are numbers, not {text!r}") from None
    if not all(rows):
        raise argparse.ArgumentTypeError("a row without token ids")
    return rows


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number from 0 on, not {text!r}")
    return int(text)


def diff(arguments: argparse.Namespace) -> int:
    """Compare, tell, and say by the exit status how it went."""
    if arguments.self_test:
        from pellucid.cli.diff_self_test import self_test

        models = [side for side in (arguments.a, arguments.b) if side is not None]
        with progress_line() as progress:
            return self_test(models, arguments.json, progress)
    if arguments.a is None or arguments.b is None:
        raise ValueError("give two models or trace files: pellucid diff A B")
    page = arguments.html
    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        why = "it is a folder" if page.is_dir() else f"there is no folder {page.parent}"
        raise ValueError(f"--html {page}: {why}; give a file to write")
    try:
        return _compare(arguments)
    except ValueError as error:
        if "\n" not in str(error) or arguments.traceback:
            raise
        proposal = str(error).replace("name_map=", "--map ")  # a YAML file, line by line
        print(f"pellucid diff: {proposal}", file=sys.stderr)
        return 2


def _compare(arguments: argparse.Namespace) -> int:
    from pellucid.diff import diff
    from pellucid.show.diff_maps import Maps
    from pellucid.show.diff_terminal import show

    prompt = arguments.prompt if arguments.tokens is None else arguments.tokens
    maps = Maps() if arguments.html else None
    with progress_line() as progress:
        progress("reading A and B")
        report = diff(
            arguments.a,
            arguments.b,
            prompt,
            steps=arguments.steps,
            dtype_a=arguments.dtype_a,
            dtype_b=arguments.dtype_b,
            dialect_a=arguments.dialect_a,
            dialect_b=arguments.dialect_b,
            fused=arguments.fused,
            copies=arguments.copies,
            fast=arguments.fast,
            name_map=arguments.map,
            progress=progress,
            keep=None if maps is None else maps.keep,
        )
    if maps is not None:
        from pellucid.show.diff_page import page

        arguments.html.write_text(page(report.to_json(), maps.pairs), encoding="utf-8")
    if arguments.json:
        print_json(report.to_json())
    else:
        show(report.to_json(), console(), every=arguments.all)
        if maps is not None:
            console().print(f"page          {arguments.html}", markup=False)
    return report.exit_status


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Where the work stands, in one line that goes away; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    with console(stderr=True).status("") as status:
        yield lambda stage: status.update(f"[dim]{stage}[/dim]")
