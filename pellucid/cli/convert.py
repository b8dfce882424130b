"""``pellucid convert SRC DST --to hf|meta|gguf|int8|int6|int4``: another layout, or fewer bits."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from pellucid.cli.arguments import DTYPES, MODEL_HELP, add_shared, add_value
from pellucid.cli.output import print_report, progress_bars
from pellucid.cli.types import byte_size

if TYPE_CHECKING:
    from pellucid.checkpoints import Conversion
    from pellucid.evaluate.quantise import Quantisation

BITS = {"int8": 8, "int6": 6, "int4": 4}
_LAYOUT_ONLY = ("shards", "max_shard_size", "dtype", "context_length")
_BITS_ONLY = ("group", "head_bits", "text")


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, in which layout and how split."""
    parser.add_argument("first", nargs="?", metavar="SRC", help=f"model to convert: {MODEL_HELP}")
    parser.add_argument("-m", "--model", help="model to convert, in place of SRC")
    parser.set_defaults(default_model=None)
    parser.add_argument(
        "destination",
        metavar="DST",
        help="folder to write, which must be new or empty; with --to gguf a file",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "meta", "gguf", *BITS),
        help="format to write; hf: config.json and safetensors; meta: params.json and "
        "consolidated.*.pth, for a Llama; gguf: one file, for llama.cpp; int8, int6, int4: "
        "quantised weights, for Pellucid only",
    )
    group = parser.add_argument_group("with --to hf, meta or gguf")
    split = group.add_mutually_exclusive_group()
    split.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="split the weights into N files (default: one for meta; for hf see --max-shard-size)",
    )
    split.add_argument(
        "--max-shard-size",
        type=byte_size,
        metavar="SIZE",
        help="with --to hf: write no weight file larger than SIZE, such as 500M (default: 5G)",
    )
    group.add_argument(
        "--dtype",
        choices=(*DTYPES, "q8_0"),
        help="data type of the weights written, q8_0 (8 bits) with --to gguf only (default: as in "
        "SRC)",
    )
    group.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="from meta to hf: context length to write into config.json, as params.json has none",
    )
    _add_bits_arguments(parser.add_argument_group("with --to int8, int6 or int4"))
    add_shared(parser.add_argument_group("output"), "--json")


def _add_bits_arguments(group: argparse._ArgumentGroup) -> None:
    shared = "number of weights that share a scale, 32, 64 or 128"
    otherwise = "64; with --to int4, 32 that share a scale and an offset"
    add_value(group, "--group", "N", shared, otherwise=otherwise)
    group.add_argument(
        "--head-bits",
        type=int,
        choices=(8, 6, 4),
        help="bits of a weight in the embedding and the head (default: 8; 6 with --to int4)",
    )
    group.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="measure on these text files what quantising costs in perplexity and KL divergence; "
        "of 4,096 tokens or more, the first three quarters are used to round so that it costs less",
    )


def convert(arguments: argparse.Namespace) -> None:
    """Convert or quantise, and print what was written and what proves or costs it."""
    from pellucid.show.convert_terminal import conversion_lines, quantisation_lines

    if arguments.model is None:
        raise ValueError("give a model and the place to write to: pellucid convert SRC DST")
    if arguments.to in BITS:
        why = "is for --to hf, meta and gguf: quantised models are one file"
        _refuse(arguments, _LAYOUT_ONLY, why)
        done = _quantised(arguments)
        print_report(asdict(done), quantisation_lines(done), as_json=arguments.json)
    else:
        _refuse(arguments, _BITS_ONLY, "is for --to int8, int6 and int4")
        done = _converted(arguments)
        values = asdict(done) | {"bytes": done.bytes}
        print_report(values, conversion_lines(done), as_json=arguments.json)


def _quantised(arguments: argparse.Namespace) -> Quantisation:
    from pellucid.evaluate.quantise import quantise_checkpoint
    from pellucid.models.quantised import Format

    how = Format(
        bits=BITS[arguments.to], group=arguments.group or 0, head_bits=arguments.head_bits or 0
    )
    text = arguments.text or ()
    return quantise_checkpoint(arguments.model, arguments.destination, how, text=text)


def _converted(arguments: argparse.Namespace) -> Conversion:
    from pellucid.checkpoints import convert
    from pellucid.devices import as_dtype

    with progress_bars() as progress:
        return convert(
            arguments.model,
            arguments.destination,
            arguments.to,
            dtype="q8_0" if arguments.dtype == "q8_0" else as_dtype(arguments.dtype),
            shards=arguments.shards,
            max_shard_bytes=arguments.max_shard_size,
            context_length=arguments.context_length,
            progress=progress,
        )


def _refuse(arguments: argparse.Namespace, flags: tuple[str, ...], why: str) -> None:
    """ValueError where one of `flags` was given, which mean nothing for this ``--to``."""
    for flag in flags:
        if getattr(arguments, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} {why}")
