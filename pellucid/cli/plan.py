"""``pellucid plan``: what training a model takes on so many GPUs, before anything is allocated."""

from __future__ import annotations

import argparse

from pellucid.cli.arguments import add_shape_argument, add_shared, add_value
from pellucid.cli.output import console, print_json


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the GPUs and the work."""
    add_shape_argument(parser)
    parser.add_argument(
        "--gpus",
        "--cards",
        dest="cards",
        type=int,
        default=8,
        metavar="N",
        help="number of GPUs, one rank each (default: 8)",
    )
    add_value(parser, "--gib", "G", "memory of one GPU in GiB", kind=float, default=80)
    longest = "the model's context, at most 2048"
    add_value(parser, "--context", "T", "tokens in a row", otherwise=longest)
    add_value(parser, "--micro-batch", "B", "rows in one pass on one GPU", default=1)
    one_pass = "those of one pass"
    add_value(parser, "--batch", "B", "rows of an optimiser step on all GPUs", otherwise=one_pass)
    most = "the most of 2, 4 and 8 that the model divides into"
    shared = "GPUs that share each matrix, tensor parallelism"
    add_value(parser, "--tensor", "T", shared, otherwise=most)
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="data type of matrix products, while weights and optimiser stay float32 "
        "(default: bfloat16)",
    )
    peak = "TFLOP/s of one GPU in the type of --precision"
    h100 = ": an H100 in bfloat16"
    add_value(parser, "--peak", "TFLOPS", peak, kind=float, default=989, otherwise=h100)
    reached = "share of the peak that is reached, model FLOP utilisation"
    add_value(parser, "--mfu", "SHARE", reached, kind=float, default=0.4)
    per_parameter = "20 per parameter"
    add_value(parser, "--tokens", "N", "tokens to train on", kind=float, otherwise=per_parameter)
    add_shared(parser.add_argument_group("output"), "--json")


def plan(arguments: argparse.Namespace) -> None:
    """Print memory per GPU for each way to spread the model, and the time it takes."""
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
