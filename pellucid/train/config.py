"""How to train: the numbers that the loop goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pellucid.train import optim

MOST_ROWS = 1 << 20  # of an optimiser step


def check_rows(batch: int) -> None:
    """ValueError, before their numbers are drawn, for more rows than any step has."""
    if batch > MOST_ROWS:
        raise ValueError(f"a batch of {batch:,} rows: expected {MOST_ROWS:,} or fewer")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; `batch` and `micro_batch` in rows of the context's length.

    micro_batch     rows in one pass; gradients of batch / micro_batch passes are added up
    decay_all       weight decay on every parameter; else on matrices only
    fused           AdamW in one kernel; else the plain steps of PyTorch's default
    clip            largest norm of the whole gradient; 0 leaves it alone
    bfloat16        matrix products in bfloat16 (autocast), weights and optimiser in float32
    compile         torch.compile on every block; evaluation and sampling stay eager
    eval_every      steps between two evaluations on held-out text; the last step always evaluates
    eval_first      the first evaluation is after step 1 instead of step `eval_every`
    patience        evaluations without a better loss after which training ends; 0: to the end
    """

    schedule: optim.Schedule
    batch: int = 8
    micro_batch: int = 4
    weight_decay: float = 0.1
    decay_all: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool = True
    clip: float = 1.0
    bfloat16: bool = False
    compile: bool = False
    eval_every: int = 100
    eval_first: bool = False
    patience: int = 0

    def __post_init__(self) -> None:
        check_rows(self.batch)
        if self.batch < 1 or self.micro_batch < 1 or self.batch % self.micro_batch:
            raise ValueError(
                f"a batch of {self.batch} rows does not divide into passes of {self.micro_batch}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}: expected numbers from 0 to below 1")
        for name in ("weight_decay", "clip", "patience"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}: expected 0 or more")
        if self.eval_every < 1:
            raise ValueError(f"eval_every is {self.eval_every}: expected 1 or more")
