"""The arguments of ``pellucid generate`` and ``pellucid chat`` that say how text is written."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pellucid.cli.arguments import add_shared, add_value

if TYPE_CHECKING:
    from pellucid.generate import Sampling


def add_writing_arguments(parser: argparse.ArgumentParser, default_length: str) -> None:
    """How long a text becomes, how its tokens are drawn, and which engine computes them."""
    group = parser.add_argument_group("length")
    group.add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"write at most N tokens (default: {default_length})",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the output before TEXT (repeatable)",
    )
    group.add_argument(
        "--slide",
        action="store_true",
        help="when the model's context is full, drop its oldest tokens and go on, as GPT-2 always "
        "does",
    )
    _add_sampling_arguments(parser.add_argument_group("sampling"))
    add_shared(parser.add_argument_group("engine"), "--engine")


def _add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    likeliest = "divide the logits by T; 0: always take the likeliest token"
    add_value(group, "--temperature", "T", likeliest, kind=float, default=0.8)
    from_all = ": from all"
    most = "draw from the K likeliest tokens only"
    add_value(group, "--top-k", "K", most, default=0, otherwise=from_all)
    fewest = "draw from the fewest likeliest tokens whose probabilities add up to P"
    add_value(group, "--top-p", "P", fewest, kind=float, default=1.0, otherwise=from_all)
    least = "draw from tokens that are at least P times as likely as the likeliest one"
    add_value(group, "--min-p", "P", least, kind=float, default=0.0, otherwise=from_all)
    rarer = "with R above 1, make tokens that occurred before less likely"
    add_value(group, "--repetition-penalty", "R", rarer, kind=float, default=1.0)
    seed = "seed of the random draws: the same seed gives the same text"
    add_value(group, "--seed", "N", seed, otherwise="another each time")


def sampling(arguments: argparse.Namespace) -> Sampling:
    """How tokens are drawn; ValueError for numbers that say nothing."""
    from pellucid.generate import Sampling

    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
