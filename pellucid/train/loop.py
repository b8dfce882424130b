"""The training loop: next-token loss, gradients, one step of AdamW, over and over.

`train` is a generator: it yields a `Progress` after every optimiser step and holds no opinion on
what to do with it. Whoever drives it prints, samples and saves between two steps, and stops by not
asking for the next one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.models import Model
from pellucid.train import optim
from pellucid.train.batches import Batches


class TrainingDiverged(ValueError):
    """The loss or the gradient is no finite number; the model still has its last finite weights."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; lengths in tokens, `batch` and `micro_batch` in rows of the context's length.

    micro_batch     rows in one pass; gradients of batch / micro_batch passes are added up
    clip            largest norm of the whole gradient; 0 leaves it alone
    bfloat16        matrix products in bfloat16 (autocast), weights and optimiser in float32
    eval_every      steps between two evaluations on held-out text; the last step always evaluates
    """

    schedule: optim.Schedule
    batch: int = 8
    micro_batch: int = 4
    weight_decay: float = 0.1
    clip: float = 1.0
    bfloat16: bool = False
    eval_every: int = 100

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batch < 1 or self.batch % self.micro_batch:
            raise ValueError(
                f"a batch of {self.batch} rows does not divide into passes of {self.micro_batch}"
            )
        if self.eval_every < 1:
            raise ValueError(f"eval_every is {self.eval_every}: expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One optimiser step. Losses in nats per token; `step` counts from 1 (steps done).

    `seconds` is the time spent in steps so far: evaluation, and what happens between two steps,
    is not in it.
    """

    step: int
    tokens: int
    loss: float
    gradient_norm: float
    rate: float
    seconds: float
    held_out_loss: float | None = None


def train(
    model: Model, batches: Batches, held_out: Tensor, config: TrainConfig
) -> Iterator[Progress]:
    """Train `model` in place on `batches`; evaluate on windows `held_out` (N, T + 1).

    Raises TrainingDiverged before the weights take in a loss or gradient that is not finite.
    """
    optimizer = optim.adamw(model, weight_decay=config.weight_decay)
    schedule = config.schedule
    device = device_of(model)
    seconds = 0.0
    model.train()
    for step in range(schedule.steps):
        began = time.monotonic()
        optim.set_rate(optimizer, schedule.rate(step))
        inputs, targets, _ = batches.at(step)
        inputs, targets = inputs.to(device), targets.to(device)
        loss, norm = accumulate_gradients(model, inputs, targets, config)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"step {step + 1} has loss {loss:g} and gradient norm {norm:g}: stopped before "
                f"they reach the weights; try a rate below {schedule.peak:g} or a longer warm-up"
            )
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.monotonic() - began
        last = step + 1 == schedule.steps
        due = last or (step + 1) % config.eval_every == 0
        yield Progress(
            step=step + 1,
            tokens=(step + 1) * inputs.numel(),
            loss=loss,
            gradient_norm=norm,
            rate=schedule.rate(step),
            seconds=seconds,
            held_out_loss=evaluate(model, held_out, bfloat16=config.bfloat16) if due else None,
        )


def accumulate_gradients(
    model: Model, inputs: Tensor, targets: Tensor, config: TrainConfig
) -> tuple[float, float]:
    """Gradients of the mean loss over inputs, targets (B, T), a few rows at a time, then clipped.

    Returns the loss and the norm of the gradient before clipping.
    """
    loss = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for some, wanted in zip(
        inputs.split(config.micro_batch), targets.split(config.micro_batch), strict=True
    ):
        with precision(model, config.bfloat16):
            part = next_token_loss(model(some), wanted) * (len(some) / len(inputs))
        part.backward()
        loss += part.detach()
    limit = config.clip or math.inf
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return loss.item(), norm.item()


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats; logits (B, T, V), targets (B, T)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten())


def precision(model: Model, bfloat16: bool) -> AbstractContextManager[object]:
    """Autocast of the model's device, or nothing."""
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=bfloat16)


def device_of(model: Model) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


@torch.no_grad()
def evaluate(model: Model, windows: Tensor, *, rows: int = 4, bfloat16: bool = False) -> float:
    """Mean next-token loss over windows (N, T + 1), in nats per token; the mode is put back."""
    training, device = model.training, device_of(model)
    model.eval()
    total = 0.0
    for some in windows.split(rows):
        some = some.to(device)
        with precision(model, bfloat16):
            loss = next_token_loss(model(some[:, :-1]), some[:, 1:])
        total += loss.item() * len(some)
    model.train(training)
    return total / len(windows)


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """A loss in nats per token as bits per byte of text, which no tokenizer can flatter."""
    return loss * tokens / math.log(2) / text_bytes
