"""The optimiser: AdamW (Loshchilov & Hutter, 2019), what it decays, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn, optim

Shape = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over `steps` steps: linear warm-up, a level stretch, and down by a `shape`.

        peak        ┌────────┐
                   ╱          ╲
                  ╱            ╲
        final    ╱               ──    last step
                 warmup  hold   the rest: half a cosine, a straight line, or level ("constant")

    With ``hold=0`` it is the usual warm-up and cosine; with most of the steps in `hold`, WSD
    (warm-up, stable, decay; Hu et al., MiniCPM, 2024). A hold lets the length be chosen late: two
    runs that differ only in `steps` are the same run until the shorter one begins to come down.
    """

    peak: float
    final: float
    warmup: int
    steps: int
    hold: int = 0
    shape: Shape = "cosine"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"{self.steps} training steps: expected 1 or more")
        if self.warmup < 0 or self.hold < 0 or self.warmup + self.hold >= self.steps:
            raise ValueError(
                f"{self.warmup} steps of warmup and {self.hold} of hold: "
                f"expected fewer than the {self.steps} steps of training"
            )
        if not (math.isfinite(self.peak) and 0 <= self.final <= self.peak):
            raise ValueError(
                f"learning rate from {self.peak:g} down to {self.final:g}: expected numbers from 0 "
                "on, the second at most the first"
            )
        if self.shape not in get_args(Shape):
            expected = ", ".join(get_args(Shape))
            raise ValueError(f"schedule {self.shape!r}: expected one of {expected}")

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0; the first step already moves."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.shape == "constant":
            return self.peak
        top = self.warmup + self.hold
        down = (step - top) / max(self.steps - 1 - top, 1)  # 0 at the top, 1 at the last step
        down = min(max(down, 0.0), 1.0)
        share = 0.5 * (1 + math.cos(math.pi * down)) if self.shape == "cosine" else 1 - down
        return self.final + (self.peak - self.final) * share


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_all: bool = False
) -> list[dict[str, Any]]:
    """Matrices (embeddings too) decay; biases and the weights of norms, one number each, do not.

    `decay_all`: everything does, as when a whole model is handed to AdamW.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = [p.ndim >= 2 or decay_all for p in parameters]
    groups = [
        {
            "params": [p for p, own in zip(parameters, decays, strict=True) if own == wanted],
            "weight_decay": weight_decay if wanted else 0.0,
        }
        for wanted in (True, False)
    ]
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module,
    *,
    weight_decay: float = 0.1,
    decay_all: bool = False,
    betas: tuple[float, float] = (0.9, 0.95),
    fused: bool = True,
) -> optim.AdamW:
    """AdamW over the model's parameter groups; the loop sets the learning rate at each step."""
    groups = parameter_groups(model, weight_decay, decay_all)
    return optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=fused or None)


def set_rate(optimizer: optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
