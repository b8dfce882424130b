"""``pellucid convert SRC DST --to int8|int6|int4``: a half of the bytes, or fewer."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from pellucid.cli.common import console, print_json

if TYPE_CHECKING:
    from pellucid.evaluate.quantise import Quantisation

FORMATS = {"int8": 8, "int6": 6, "int4": 4}


def quantising_arguments(parser: argparse.ArgumentParser) -> None:
    """How to quantise, and on which text to show what it costs."""
    group = parser.add_argument_group("to int8, int6 or int4")
    group.add_argument(
        "--group", type=int, metavar="N", help="weights that share a scale: 32, 64, 128 (64)"
    )
    group.add_argument(
        "--head-bits",
        type=int,
        choices=(8, 6, 4),
        help="of embedding and head (default: 8, and 6 for int4)",
    )
    group.add_argument(
        "--text", nargs="+", metavar="FILE", help="show perplexity and KL divergence on this text"
    )


def quantise(arguments: argparse.Namespace) -> None:
    """Quantise, write, and say what it costs."""
    from pellucid.evaluate.quantise import quantise_checkpoint
    from pellucid.models.quantised import GROUP, Format

    for flag in ("shards", "max_shard_size", "dtype", "context_length"):
        if getattr(arguments, flag) is not None:
            given = "--" + flag.replace("_", "-")
            raise ValueError(f"{given} is for --to hf and --to meta: quantised models are one file")
    how = Format(
        bits=FORMATS[arguments.to],
        group=arguments.group or GROUP,
        head_bits=arguments.head_bits or 0,
    )
    done = quantise_checkpoint(
        arguments.source, arguments.destination, how, text=arguments.text or ()
    )
    if arguments.json:
        print_json(dataclasses.asdict(done))
    else:
        console().print(_report(done), markup=False, highlight=False)


def _report(done: Quantisation) -> str:
    ratio = done.bytes_before / done.bytes_after
    lines = [
        f"{done.source} → {done.destination}",
        f"{'format':<12}{done.format}",
        f"{'bytes':<12}{done.bytes_before:,} → {done.bytes_after:,} ({ratio:.2f} times smaller)",
    ]
    cost = done.cost
    if cost is None:
        lines.append(f"{'cost':<12}not measured: give --text FILE")
        return "\n".join(lines)
    grown = cost.perplexity_after / cost.perplexity_before - 1
    return "\n".join(
        [
            *lines,
            f"{'perplexity':<12}{cost.perplexity_before:.4f} → {cost.perplexity_after:.4f} "
            f"({grown:+.2%}) on {cost.tokens:,} tokens",
            f"{'KL':<12}{cost.kl_mean:.2e} nats a token on average, {cost.kl_max:.2e} at most",
            f"{'top 1':<12}{cost.top1:.2%} of tokens have the same likeliest next one",
        ]
    )
