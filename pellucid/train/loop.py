"""The training loop: a batch, its gradients, one step of AdamW, over and over.

`train` is a generator: it yields a `Progress` after every optimiser step and does nothing
with it. The code that calls it prints, samples and saves between two steps, and stops by not asking
for the next one. All that a later continuation needs is in the `TrainState` it is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pellucid.models import Model
from pellucid.models.finite import damaged_weight
from pellucid.train import optim
from pellucid.train.config import TrainConfig
from pellucid.train.data.batches import Batch
from pellucid.train.evaluation import evaluate
from pellucid.train.objective import Objective, next_token_objective
from pellucid.train.precision import (
    device_of,
    eager,
    own_compiler_cache,
    training_precision,
)
from pellucid.train.ranks import Ranks
from pellucid.train.state import TrainState
from pellucid.train.watch import Seen, Watch


class TrainingDiverged(ValueError):
    """The loss or the gradient is no finite number; the model still has its last finite weights."""


class Data(Protocol):
    """What `train` reads: the batch of any step, whatever came before."""

    def at(self, step: int, /) -> Batch:
        """The rows of optimiser step `step`, counted from 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One optimiser step. Losses in nats per token; `step` counts from 1 (steps done).

    `seconds` is the time spent in steps so far: evaluation, and what happens between two steps,
    is not in it. `best`: no evaluation so far was lower than this one. `ending`: there is no next.
    """

    step: int
    tokens: int
    loss: float
    gradient_norm: float
    rate: float
    seconds: float
    held_out_loss: float | None = None
    best: bool = False
    ending: bool = False


def train(
    model: Model,
    batches: Data,
    held_out: Tensor | Callable[[Model], float],
    config: TrainConfig,
    *,
    objective: Objective = next_token_objective,
    state: TrainState | None = None,
    ranks: Ranks | None = None,
    watch: Watch | None = None,
) -> Iterator[Progress]:
    """Train `model` in place on `batches`; evaluate on windows `held_out` (N, T + 1).

    held_out   or a function of the model that gives the loss to judge it by
    objective  (model, batch) -> sum of losses and their count; next tokens unless given
    state      where to go on from, updated at every step; None begins
    ranks      this process' part among several; None: one process
    watch      records what chosen tensors do at some of the steps; None: none are watched

    Raises TrainingDiverged before the weights take in a loss or gradient that is not finite.
    """
    ranks = ranks or Ranks()
    state = state or TrainState.begin(model, config)
    state.restore_random(device_of(model))
    if config.compile:
        compile_blocks(model)
    model.train()
    for step in range(state.step, config.schedule.steps):
        began = time.monotonic()
        rate = config.schedule.rate(step)
        optim.set_rate(state.optimizer, rate)
        batch = batches.at(step)
        look = watch.over(step + 1, model, state.optimizer, batch, config.clip) if watch else None
        with look or nullcontext() as seen:
            loss, norm = accumulate_gradients(
                model, batch, config, objective=objective, ranks=ranks, seen=seen
            )
            _demand_finite(step, loss, norm, config, model)
            state.optimizer.step()
        state.optimizer.zero_grad()
        state.seconds += time.monotonic() - began
        state.step, state.tokens = step + 1, state.tokens + batch.inputs.numel()
        last = state.step == config.schedule.steps
        due = last or _evaluates(state.step, config)
        held_out_loss = judged(model, held_out, config, ranks) if due else None
        best = held_out_loss is not None and state.judge(held_out_loss)
        stalled = bool(config.patience) and state.evaluations_since_best >= config.patience
        yield Progress(
            step=state.step,
            tokens=state.tokens,
            loss=loss,
            gradient_norm=norm,
            rate=rate,
            seconds=state.seconds,
            held_out_loss=held_out_loss,
            best=best,
            ending=last or stalled,
        )
        if stalled:
            return


def _evaluates(step: int, config: TrainConfig) -> bool:
    return step % config.eval_every == (1 % config.eval_every if config.eval_first else 0)


def _demand_finite(step: int, loss: float, norm: float, config: TrainConfig, model: Model) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        slower = f"try a rate below {config.schedule.peak:g} or a longer warm-up"
        raise TrainingDiverged(
            f"step {step + 1} has loss {loss:g} and gradient norm {norm:g}: stopped before "
            f"they reach the weights; {damaged_weight(model) or slower}"
        )


def judged(
    model: Model,
    held_out: Tensor | Callable[[Model], float],
    config: TrainConfig,
    ranks: Ranks | None = None,
) -> float:
    """Loss on held-out text; blocks run as written, since other shapes would be compiled anew."""
    with eager():
        if isinstance(held_out, Tensor):
            return evaluate(model, held_out, bfloat16=config.bfloat16, ranks=ranks)
        return held_out(model)


def accumulate_gradients(
    model: Model,
    batch: Batch,
    config: TrainConfig,
    *,
    objective: Objective = next_token_objective,
    ranks: Ranks | None = None,
    seen: Seen | None = None,
) -> tuple[float, float]:
    """Gradients of the mean loss over a batch, a few rows at a time, then clipped.

    Sums of losses are divided by the number of inputs of the whole batch before the backward pass,
    and what then differs from the true count is put right at the end. So passes and ranks add up
    to the mean over everything that counts, wherever the targets to ignore are.
    Returns the loss and the norm of the gradient before clipping; `seen` watches the first pass.
    """
    ranks = ranks or Ranks()
    device, nominal = device_of(model), batch.inputs.numel()
    mine = ranks.rows(batch)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, count
    passes = range(0, len(mine.inputs), config.micro_batch)
    for first in passes:
        some = rows_to(mine, slice(first, first + config.micro_batch), device)
        with ranks.accumulating(last=first == passes[-1]):
            look = seen.first_pass() if seen and first == 0 else nullcontext()
            with training_precision(model, config.bfloat16), look:
                loss, count = objective(model, some)
            (loss / nominal).backward()
        totals += torch.stack((loss.detach().double(), totals.new_tensor(count)))
    # Not before: a model that is sharded over ranks has other parameters while it computes.
    parameters = [p for p in model.parameters() if p.requires_grad]
    ranks.add_gradients(parameters)
    total, count = ranks.sum(totals).tolist()
    if not count:
        raise ValueError("a batch has no target to predict: every one of them is ignored")
    norm = ranks.gradient_norm(parameters).item() * nominal / count
    scale = nominal / count
    if config.clip and norm > config.clip:
        scale *= config.clip / (norm + 1e-6)
    if scale != 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    if seen:
        seen.arrived(total / count, norm)
    return total / count, norm


def rows_to(batch: Batch, rows: slice, device: torch.device) -> Batch:
    """Some rows of a batch, on a device."""
    inputs, targets, documents = batch
    documents = None if documents is None else documents[rows].to(device)
    return Batch(inputs[rows].to(device), targets[rows].to(device), documents)


def compile_blocks(model: Model, **options: Any) -> None:
    """torch.compile on every block, in place: they share one graph, and taps still work."""
    own_compiler_cache()
    for layer in model.layers:
        layer.compile(**options)
