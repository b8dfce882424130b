"""``pellucid convert SRC DST --to hf|meta|int8|int6|int4``: another layout, or fewer bits."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pellucid.cli.common import DTYPES, console, print_json
from pellucid.cli.quantising import FORMATS, quantise, quantising_arguments

if TYPE_CHECKING:
    from pellucid.checkpoints.convert import Conversion
    from pellucid.checkpoints.proof import Progress

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, in which layout and how split."""
    parser.add_argument("source", metavar="SRC", help="folder, owner/name, demo or demo-gpt2")
    parser.add_argument("destination", metavar="DST", help="a folder that is new or empty")
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "meta", *FORMATS),
        help="hf: config.json and safetensors; meta: params.json and consolidated.*.pth (Llama); "
        "int8, int6, int4: quantised weights, which Pellucid reads",
    )
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--shards", type=int, metavar="N", help="number of weight files (default: 1; hf: by size)"
    )
    split.add_argument(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="hf: no weight file above 500M, 5G … (default 5G)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="from meta to hf: what config.json states (params.json does not say)",
    )
    quantising_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def convert(arguments: argparse.Namespace) -> None:
    """Convert, prove it, and say what was written."""
    if arguments.to in FORMATS:
        quantise(arguments)
        return
    for flag in ("group", "head_bits", "text"):
        if getattr(arguments, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} is for --to int8, int6 and int4")
    from pellucid.checkpoints.convert import convert
    from pellucid.language_model import as_dtype

    with _bar() as progress:
        done = convert(
            arguments.source,
            arguments.destination,
            arguments.to,
            dtype=as_dtype(arguments.dtype),
            shards=arguments.shards,
            max_shard_bytes=arguments.max_shard_size,
            context_length=arguments.context_length,
            progress=progress,
        )
    if arguments.json:
        print_json(dataclasses.asdict(done) | {"bytes": done.bytes})
    else:
        console().print(_report(done), markup=False)


def _report(done: Conversion) -> str:
    """What was written and what proves it, a line each."""
    longest = max(map(len, done.files))
    lines = [f"{done.source} → {done.destination}"]
    lines += [f"  {name:<{longest}}  {size:>15,} bytes" for name, size in done.files.items()]
    left_out = ""
    if done.left_out:
        shown = ", ".join(done.left_out[:3]) + (" …" if len(done.left_out) > 3 else "")
        left_out = f"; {len(done.left_out)} that say nothing new left out ({shown})"
    count = done.tensors
    lines += [
        f"{'written':<15}{done.bytes:,} bytes in {len(done.files)} files",
        f"{'tensors':<15}{count}, {done.dtype}{left_out}",
        f"{'converted back':<15}{count} of {count} tensors bit-equal",
        f"{'sha-256':<15}{done.digest} (source and destination)",
        f"{'logits':<15}equal in every bit on {done.tokens} tokens",
        f"{'tokenizer':<15}{', '.join(done.tokenizer) or 'none'}",
    ]
    return "\n".join([*lines, *(f"{'note':<15}{note}" for note in done.notes)])


def _size(text: str) -> int:
    """A number of bytes: 500M, 5GB, 5000000000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500M or 5G")
    return size


@contextlib.contextmanager
def _bar() -> Iterator[Progress | None]:
    """A progress bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress as Bar

    with Bar(console=console(stderr=True), transient=True) as bar:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield advance
