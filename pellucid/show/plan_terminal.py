"""The plan of a training run on a terminal: what it assumes, memory as a table, time."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pellucid.models.census import in_units
from pellucid.train.plan_report import GIB, TrainingPlan


def print_plan(out: Console, plan: TrainingPlan) -> None:
    """All of it, in three parts."""
    _print_work(out, plan)
    _print_memory(out, plan)
    _print_time(out, plan)


def _print_work(out: Console, plan: TrainingPlan) -> None:
    work = plan.work
    out.print(Text(plan.title, "bold"), Text(f"  {plan.counted.total:,} parameters", "dim"))
    passes = f"{work.rows} row{'s' if work.rows > 1 else ''} of {work.context:,} tokens"
    products = "bfloat16" if work.bfloat16 else "float32"
    out.print(
        f"{work.cards} GPU{'s' if work.cards > 1 else ''}, passes of {passes}, {work.batch} rows "
        f"({work.tokens:,} tokens) a step, {products} matmuls, AdamW in float32",
        soft_wrap=True,
    )
    out.print()


def _print_memory(out: Console, plan: TrainingPlan) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    columns = ("parameters", "gradients", "optimizer", "gathered", "activations", "working")
    shown = ("weights", "gradients", "AdamW", "gathered", "activations", "working")
    table.add_column("GiB per GPU", no_wrap=True)
    for column in (*shown, "total", f"of {plan.gib:g}"):
        table.add_column(column, justify="right")
    for row in plan.rows:
        for name, found in ((Text(row.name, "bold"), row.kept), ("  recomputed", row.recomputed)):
            numbers = [f"{getattr(found, column) / GIB:.2f}" for column in columns]
            fits = "fits" if found.total <= plan.gib * GIB else Text("too much", "red")
            table.add_row(name, *numbers, Text(f"{found.total / GIB:.2f}", "bold"), fits)
    out.print(table)
    full = f"{plan.rows[0].full_logits / GIB:.2f} GiB"
    out.print(
        "recomputed: activation checkpointing, a block keeps its input only. working: logits and "
        f"loss in chunks, where all logits of a pass at once would take {full} more. The buffers "
        "of allocator, kernels and communication come on top.",
        style="dim",
    )
    out.print()


def _print_time(out: Console, plan: TrainingPlan) -> None:
    work, pace, tokens = plan.work, plan.pace, plan.tokens
    flops = plan.counted.flops(work.context)
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
        f"({plan.steps:,} steps)",
        soft_wrap=True,
    )


def duration(seconds: float) -> str:
    """``0.42 s``, ``3.5 hours``, ``12.1 days``."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
