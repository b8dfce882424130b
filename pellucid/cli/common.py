"""What the verbs share: the arguments that choose a model, JSON output, the console."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pellucid.cli.streams import can_encode

if TYPE_CHECKING:
    from pellucid.language_model import LanguageModel

DTYPES = ("float32", "bfloat16", "float16", "float64")
MODEL_HELP = "a folder, a GGUF file, owner/name on the Hub, demo (a Llama), demo-gpt2 or smollm2"
_PIPE_WIDTH = 120  # columns where there is no terminal; rich would take 80 and fold


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``-m MODEL`` and how to run it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", default="demo", help=f"model to run: {MODEL_HELP} (default demo)"
    )
    group.add_argument(
        "--adapter", metavar="DIR", help="folder of a LoRA adapter to merge into the model"
    )
    group.add_argument(
        "--dtype", choices=DTYPES, help="data type to compute in (default: that of the weights)"
    )
    group.add_argument(
        "--device", default="cpu", help="device to compute on: cpu, cuda, cuda:1 … (default cpu)"
    )
    group.add_argument(
        "--dialect",
        help="reference implementation whose rounding is followed: meta, hf, notebook (default: "
        "the one that wrote the model's files)",
    )
    group.add_argument(
        "--stream-weights",
        action="store_true",
        help="read each block from the disk when it runs, for a model larger than memory",
    )


def add_shape_argument(parser: argparse.ArgumentParser) -> None:
    """MODEL where only the config counts: also a config file, or the name of a known shape."""
    from pellucid.families.shapes import SHAPES

    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        metavar="MODEL",
        help=f"{MODEL_HELP}, a config.json or params.json, or a published shape: "
        + ", ".join(SHAPES)
        + " (default demo)",
    )


def add_output_arguments(group: argparse._ArgumentGroup, what: str) -> None:
    """``--json`` and ``--html FILE`` for a verb that prints text; `what` the page shows."""
    group.add_argument("--json", action="store_true", help="print one JSON object, no text")
    group.add_argument(
        "--html", type=Path, metavar="FILE", help=f"also write {what} as one HTML page"
    )
    group.add_argument("--force", action="store_true", help="replace files that exist")


def load_model(arguments: argparse.Namespace) -> LanguageModel:
    """The language model that the arguments of `add_model_arguments` describe."""
    from pellucid.language_model import load

    if arguments.adapter and arguments.stream_weights:
        raise ValueError("--adapter changes weights that --stream-weights leaves on the disk")
    lm = load(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        dialect=arguments.dialect,
        stream=arguments.stream_weights,
        adapter=arguments.adapter,
    )
    if arguments.adapter:
        from pellucid.models.adapters import fold

        fold(lm.model)  # merged weights decode faster, in C where that can be done
    return lm


def read_prompt(prompt: str) -> str:
    """The prompt itself; for ``-`` standard input, without the line break that ends it."""
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def print_json(value: Any) -> None:
    """One JSON object on stdout and nothing else; escaped where the encoding is not Unicode."""
    ascii_only = not can_encode("→…█", sys.stdout)
    json.dump(value, sys.stdout, ensure_ascii=ascii_only, allow_nan=True)
    sys.stdout.write("\n")


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


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """What is being done, in one line that goes away; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    with console(stderr=True).status("") as status:
        yield lambda stage: status.update(f"[dim]{stage}[/dim]")


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal while work goes on; in a pipe, or when `quiet`, None.

    Gives a function of what is done and of all there is to do.
    """
    from rich.progress import Progress

    out = console(stderr=True)
    if quiet or not out.is_terminal:
        yield None
        return
    with Progress(console=out, transient=True) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None] | None]:
    """As `progress_bar`, with a bar for each stage; gives a function of stage, done and total."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True) as bar:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield advance
