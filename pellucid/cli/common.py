"""What the verbs share: the arguments that choose a model, JSON output, the console."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from pellucid.language_model import LanguageModel

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``-m MODEL`` and how to run it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", default="demo", help="folder, owner/name, demo or demo-gpt2 (default demo)"
    )
    group.add_argument("--adapter", metavar="DIR", help="a LoRA adapter to merge into it")
    group.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default cpu)")
    group.add_argument(
        "--dialect", help="whose rounding: meta, hf, notebook (default: the layout's)"
    )
    group.add_argument(
        "--stream-weights",
        action="store_true",
        help="read each block from the disk when it runs: for a model larger than memory",
    )


def add_shape_argument(parser: argparse.ArgumentParser) -> None:
    """MODEL where only the config counts: also a config file, or the name of a known shape."""
    from pellucid.families.shapes import SHAPES

    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        metavar="MODEL",
        help="folder, config.json, params.json, owner/name, demo (default), demo-gpt2, or a shape: "
        + ", ".join(SHAPES),
    )


def load_model(arguments: argparse.Namespace) -> LanguageModel:
    """The language model that `add_model_arguments` describe."""
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


def print_json(value: Any) -> None:
    """One JSON object on stdout and nothing else."""
    json.dump(value, sys.stdout, ensure_ascii=False, allow_nan=True)
    sys.stdout.write("\n")


def console(*, stderr: bool = False) -> Console:
    """A console that writes plain text into a pipe and colours on a terminal."""
    piped = not (sys.stderr if stderr else sys.stdout).isatty()
    width = 120 if piped and "COLUMNS" not in os.environ else None  # rich would take 80 and fold
    return Console(stderr=stderr, highlight=False, soft_wrap=piped, width=width)


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
