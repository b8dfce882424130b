"""``pellucid plan``: what training a model takes on so many cards, before anything is allocated."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from pellucid.cli.common import add_shape_argument, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from pellucid.models import Config
    from pellucid.models.census import Census
    from pellucid.train.parallel.layout import Layout
    from pellucid.train.plan import Memory, Pace, Work

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., Training Compute-Optimal Large Language Models, 2022
GIB = 2**30


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the cards and the work."""
    add_shape_argument(parser)
    parser.add_argument("--cards", type=int, default=8, metavar="N", help="ranks (default 8)")
    parser.add_argument(
        "--gib", type=float, default=80, metavar="G", help="memory of one card (default 80)"
    )
    parser.add_argument(
        "--context", type=int, metavar="T", help="tokens per row (default: the model's, up to 2048)"
    )
    parser.add_argument(
        "--micro-batch", type=int, default=1, metavar="B", help="rows in one pass (default 1)"
    )
    parser.add_argument(
        "--batch", type=int, metavar="B", help="rows of a step on all cards (default: one pass)"
    )
    parser.add_argument(
        "--tensor",
        type=int,
        metavar="T",
        help="tensor-parallel ranks (default: the most of 2, 4, 8)",
    )
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of matrix products (default bfloat16); weights and optimiser are float32 always",
    )
    parser.add_argument(
        "--peak",
        type=float,
        default=989,
        metavar="TFLOPS",
        help="of one card in that precision (default 989, an H100 in bfloat16)",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="model FLOP utilisation (default 0.4)"
    )
    parser.add_argument(
        "--tokens", type=float, metavar="N", help="to train on (default: 20 per parameter)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def plan(arguments: argparse.Namespace) -> None:
    """Print memory per rank for each way to spread the model, and the time it takes."""
    from pellucid.checkpoints.model_report import find_config
    from pellucid.models.census import census, check_tokens
    from pellucid.train.plan import Pace, Work, layouts

    title, config = find_config(arguments.model)
    context = arguments.context or min(config.context_length, 2048)
    check_tokens(config, context)
    spread = layouts(config, arguments.cards, arguments.tensor)
    work = Work(
        cards=arguments.cards,
        rows=arguments.micro_batch,
        context=context,
        batch=arguments.batch or arguments.cards * arguments.micro_batch,
        bfloat16=arguments.precision == "bfloat16",
    )
    counted = census(config)
    pace = Pace(
        flops_per_token=counted.flops(context).training,
        peak=arguments.peak * 1e12,
        mfu=arguments.mfu,
    )
    tokens = round(arguments.tokens or TOKENS_PER_PARAMETER * counted.total)
    rows = [_row(config, work, name, layout) for name, layout in spread.items()]
    if arguments.json:
        card = arguments.gib * GIB
        print_json(_as_json(title, counted, work, pace, tokens, rows, card))
        return
    out = console()
    _print_work(out, title, counted, work)
    _print_memory(out, rows, arguments.gib)
    _print_time(out, counted, work, pace, tokens)


class _Row(NamedTuple):
    """One way to spread the model: memory with every activation kept, and with blocks recomputed.

    full_logits  bytes more where all logits of a pass are held at once
    """

    name: str
    layout: Layout
    kept: Memory
    recomputed: Memory
    full_logits: int


def _row(config: Config, work: Work, name: str, layout: Layout) -> _Row:
    from pellucid.train.objective import next_token_objective, plain_next_token_objective
    from pellucid.train.plan import memory

    chunked, full = next_token_objective, plain_next_token_objective
    kept = memory(config, work, layout, chunked, recompute=False)
    recomputed = memory(config, work, layout, chunked, recompute=True)
    more = memory(config, work, layout, full, recompute=False).total - kept.total
    return _Row(name, layout, kept, recomputed, more)


def _print_work(out: Console, title: str, counted: Census, work: Work) -> None:
    out.print(Text(title, "bold"), Text(f"  {counted.total:,} parameters", "dim"))
    passes = f"{work.rows} row{'s' if work.rows > 1 else ''} of {work.context:,} tokens"
    products = "bfloat16" if work.bfloat16 else "float32"
    out.print(
        f"{work.cards} card{'s' if work.cards > 1 else ''}, passes of {passes}, {work.batch} rows "
        f"({work.tokens:,} tokens) a step, {products} products, AdamW in float32",
        soft_wrap=True,
    )
    out.print()


def _print_memory(out: Console, rows: list[_Row], gib: float) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    columns = ("parameters", "gradients", "optimizer", "gathered", "activations", "working")
    shown = ("weights", "gradients", "AdamW", "gathered", "activations", "working")
    table.add_column("GiB per card", no_wrap=True)
    for column in (*shown, "total", f"of {gib:g}"):
        table.add_column(column, justify="right")
    for row in rows:
        for name, found in ((Text(row.name, "bold"), row.kept), ("  recomputed", row.recomputed)):
            numbers = [f"{getattr(found, column) / GIB:.2f}" for column in columns]
            fits = "fits" if found.total <= gib * GIB else Text("too much", "red")
            table.add_row(name, *numbers, Text(f"{found.total / GIB:.2f}", "bold"), fits)
    out.print(table)
    full = f"{rows[0].full_logits / GIB:.2f} GiB"
    out.print(
        "recomputed: activation checkpointing, a block keeps its input only. working: logits and "
        f"loss in chunks, where all logits of a pass at once would take {full} more. The buffers "
        "of allocator, kernels and communication come on top.",
        style="dim",
    )
    out.print()


def _print_time(out: Console, counted: Census, work: Work, pace: Pace, tokens: int) -> None:
    from pellucid.models.census import in_units

    flops = counted.flops(work.context)
    out.print(
        f"FLOPs per token: 6 × {flops.matmul_parameters:,} + 3 × "
        f"{flops.attention_per_token_in_view:,} × {work.context:,} = {flops.training:,} "
        f"({in_units(flops.training, 'FLOP')})",
        soft_wrap=True,
    )
    peak = in_units(pace.peak, "FLOP/s")
    out.print(
        f"{work.cards} × {peak} at {pace.mfu:.0%}: "
        f"{pace.tokens_per_second(work.cards):,.0f} tokens/s, "
        f"{duration(pace.seconds(work.tokens, work.cards))} a step, "
        f"{duration(pace.seconds(tokens, work.cards))} for {in_units(tokens, 'tokens')} "
        f"({-(-tokens // work.tokens):,} steps)",
        soft_wrap=True,
    )


def duration(seconds: float) -> str:
    """``0.42 s``, ``3.5 hours``, ``12.1 days``."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _as_json(
    title: str,
    counted: Census,
    work: Work,
    pace: Pace,
    tokens: int,
    rows: list[_Row],
    card: float,
) -> dict[str, Any]:
    from pellucid.train.plan import as_json

    flops = counted.flops(work.context)
    return {
        "model": title,
        "parameters": counted.total,
        "work": asdict(work),
        "flops_per_token": {
            "matmul_parameters": flops.matmul_parameters,
            "attention": 3 * flops.attention,
            "training": flops.training,
        },
        "card_bytes": card,
        "memory": [
            {
                "name": row.name,
                **asdict(row.layout),
                "kept": as_json(row.kept, card),
                "recomputed": as_json(row.recomputed, card),
                "full_logits": row.full_logits,
            }
            for row in rows
        ],
        "time": {
            "peak": pace.peak,
            "mfu": pace.mfu,
            "tokens_per_second": pace.tokens_per_second(work.cards),
            "seconds_per_step": pace.seconds(work.tokens, work.cards),
            "tokens": tokens,
            "steps": -(-tokens // work.tokens),
            "seconds": pace.seconds(tokens, work.cards),
        },
    }
