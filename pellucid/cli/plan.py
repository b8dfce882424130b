"""``pellucid plan``: what training a model takes on so many cards, before anything is allocated."""

from __future__ import annotations

import argparse

from pellucid.cli.common import add_shape_argument, console, print_json


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the cards and the work."""
    add_shape_argument(parser)
    parser.add_argument(
        "--cards",
        type=int,
        default=8,
        metavar="N",
        help="cards, one rank each (default 8)",
    )
    parser.add_argument(
        "--gib", type=float, default=80, metavar="G", help="memory of one card in GiB (default 80)"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="T",
        help="tokens in a row (default: the model's context, at most 2048)",
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=1,
        metavar="B",
        help="rows in one pass on one card (default 1)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="rows of an optimiser step on all cards (default: those of one pass)",
    )
    parser.add_argument(
        "--tensor",
        type=int,
        metavar="T",
        help="cards that share each matrix, tensor parallelism (default: the most of 2, 4 and 8 "
        "that the model divides into)",
    )
    _add_pace(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, no text")


def _add_pace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="data type of matrix products (default bfloat16); weights and optimiser stay float32",
    )
    parser.add_argument(
        "--peak",
        type=float,
        default=989,
        metavar="TFLOPS",
        help="TFLOP/s of one card in that data type (default 989: an H100 in bfloat16)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that is reached, model FLOP utilisation (default 0.4)",
    )
    parser.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="tokens to train on (default: 20 per parameter)",
    )


def plan(arguments: argparse.Namespace) -> None:
    """Print memory per card for each way to spread the model, and the time it takes."""
    from pellucid.show.plan_terminal import print_plan
    from pellucid.train.plan_report import plan_training

    found = plan_training(
        arguments.model,
        cards=arguments.cards,
        gib=arguments.gib,
        context=arguments.context,
        micro_batch=arguments.micro_batch,
        batch=arguments.batch,
        tensor=arguments.tensor,
        precision=arguments.precision,
        peak=arguments.peak,
        mfu=arguments.mfu,
        tokens=arguments.tokens,
    )
    if arguments.json:
        print_json(found.to_json())
    else:
        print_plan(console(), found)
