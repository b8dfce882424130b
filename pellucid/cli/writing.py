"""The arguments of ``pellucid generate`` and ``pellucid chat`` that say how text is written."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pellucid.generate import Sampling

ENGINES = {"auto": None, "fast": True, "plain": False}  # --engine -> `fast`


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
    parser.add_argument_group("engine").add_argument(
        "--engine",
        choices=tuple(ENGINES),
        default="auto",
        help="plain: the model's own PyTorch code; fast: decoding in C, or as CUDA graphs on a "
        "GPU; auto: fast on a CPU once the C code is compiled (default auto)",
    )


def _add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divide the logits by T; 0: always take the likeliest token (default 0.8)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from the K likeliest tokens only (default 0: from all)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the fewest likeliest tokens whose probabilities add up to P (default 1: "
        "from all)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from tokens that are at least P times as likely as the likeliest one (default "
        "0: from all)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="with R above 1, make tokens that occurred before less likely (default 1)",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the random draws: the same seed gives the same text (default: another each "
        "time)",
    )


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


def write_text(text: str) -> None:
    """Text on standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
