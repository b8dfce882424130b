"""The plan of a training run as one call: memory for each way to spread a model, and time.

    plan = plan_training("llama-3.1-8b", cards=8)
    [(row.name, row.kept.total) for row in plan.rows]

This is what ``pellucid plan`` runs; nothing of the model's size is allocated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pellucid.checkpoints.model_report import find_config
from pellucid.models import Config
from pellucid.models.census import Census, census, check_tokens
from pellucid.train.objective import next_token_objective, plain_next_token_objective
from pellucid.train.parallel.layout import RankGrid
from pellucid.train.plan import Memory, Pace, Work, as_json, layouts, memory

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., Training Compute-Optimal Large Language Models, 2022
GIB = 2**30


class Spread(NamedTuple):
    """One way to spread the model: memory with every activation kept, and with blocks recomputed.

    full_logits  bytes more where all logits of a pass are held at once
    """

    name: str
    layout: RankGrid
    kept: Memory
    recomputed: Memory
    full_logits: int


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What `plan_training` found: `rows` of memory, and the `pace` at which `tokens` are read."""

    title: str
    counted: Census
    work: Work
    pace: Pace
    tokens: int
    rows: list[Spread]
    gib: float

    @property
    def steps(self) -> int:
        """Optimiser steps for all tokens."""
        return -(-self.tokens // self.work.tokens)

    def to_json(self) -> dict[str, Any]:
        """The object that ``pellucid plan --json`` prints; memory in bytes, time in seconds."""
        work, pace, card = self.work, self.pace, self.gib * GIB
        flops = self.counted.flops(work.context)
        return {
            "model": self.title,
            "parameters": self.counted.total,
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
                for row in self.rows
            ],
            "time": {
                "peak": pace.peak,
                "mfu": pace.mfu,
                "tokens_per_second": pace.tokens_per_second(work.cards),
                "seconds_per_step": pace.seconds(work.tokens, work.cards),
                "tokens": self.tokens,
                "steps": self.steps,
                "seconds": pace.seconds(self.tokens, work.cards),
            },
        }


def plan_training(
    source: str | Path = "demo",
    *,
    cards: int = 8,
    gib: float = 80,
    context: int | None = None,
    micro_batch: int = 1,
    batch: int | None = None,
    tensor: int | None = None,
    precision: str = "bfloat16",
    peak: float = 989,
    mfu: float = 0.4,
    tokens: float | None = None,
) -> TrainingPlan:
    """What training a model of this shape takes on so many cards.

    source       a model, its config, or the name of a published shape
    gib          memory of one card
    context      tokens of a row; None: the model's, at most 2048
    micro_batch  rows of one pass on one card; batch: rows of an optimiser step on all cards,
                 None: those of one pass
    tensor       tensor-parallel ranks; None: the most of 2, 4 and 8 that fit
    precision    of matrix products: bfloat16 or float32
    peak, mfu    TFLOP/s of one card in that precision, and the share of them that is reached
    tokens       to train on; None: 20 per parameter

    ValueError or OSError, in one line, for a model that is not found and numbers that do not fit.
    """
    title, config = find_config(str(source))
    context = context or min(config.context_length, 2048)
    check_tokens(config, context)
    spread = layouts(config, cards, tensor)
    work = Work(
        cards=cards,
        rows=micro_batch,
        context=context,
        batch=batch or cards * micro_batch,
        bfloat16=precision == "bfloat16",
    )
    counted = census(config)
    return TrainingPlan(
        title=title,
        counted=counted,
        work=work,
        pace=Pace(flops_per_token=counted.flops(context).training, peak=peak * 1e12, mfu=mfu),
        tokens=round(tokens or TOKENS_PER_PARAMETER * counted.total),
        rows=[_spread(config, work, name, layout) for name, layout in spread.items()],
        gib=gib,
    )


def _spread(config: Config, work: Work, name: str, layout: RankGrid) -> Spread:
    chunked, full = next_token_objective, plain_next_token_objective
    kept = memory(config, work, layout, chunked, recompute=False)
    recomputed = memory(config, work, layout, chunked, recompute=True)
    more = memory(config, work, layout, full, recompute=False).total - kept.total
    return Spread(name, layout, kept, recomputed, more)
