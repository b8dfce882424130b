"""Direct preference optimisation (Rafailov et al. 2023): of two answers, the better one.

Each example has a prompt and two answers. With π the model and ref its weights at the start,

    reward(answer) = β · (log π(answer | prompt) − log ref(answer | prompt))
    loss = −log σ(reward(chosen) − reward(rejected))                       equation 7 of the paper

The reference's log-probabilities never change, so they are computed once, before the first step,
by the model that is about to be trained: no second one is ever loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.models import Model, evaluating
from pellucid.train.cross_entropy import linear_cross_entropy
from pellucid.train.data.batches import Batch
from pellucid.train.finetune.pairs import PairRows
from pellucid.train.loop import rows_to
from pellucid.train.objective import Objective, head_weight
from pellucid.train.precision import device_of, precision


@dataclass(frozen=True, kw_only=True)
class DPO:
    """How strongly to prefer.

    beta       how far the model may move from its start: larger is nearer
    smoothing  share of pairs thought to be the wrong way round (conservative DPO; Mitchell 2023)
    """

    beta: float = 0.1
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}: expected a number above 0")
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"label smoothing is {self.smoothing}: expected 0 to below 0.5")


def log_probabilities(model: Model, batch: Batch) -> Tensor:
    """log π of both answers of each pair, summed over their tokens, (B, 2) in nats."""
    rows = len(batch.inputs)
    hidden = model.hidden(batch.inputs.view(2 * rows, -1))  # (2B, T, C), two texts of a pair apart
    targets, weight = batch.targets.view(2 * rows, -1), head_weight(model)
    losses = [linear_cross_entropy(h, weight, t) for h, t in zip(hidden, targets, strict=True)]
    return -torch.stack(losses).view(rows, 2)


def reference(model: Model, rows: PairRows, *, bfloat16: bool = False) -> Tensor:
    """log-probabilities of every pair's answers under the model as it is now, (N, 2); no dropout.

    Adapters count, trained ones too: ``lora.switched_off(model)`` leaves them out.
    """
    device, found = device_of(model), []
    for batch in rows.in_order():
        with evaluating(model), precision(device, bfloat16):
            found.append(log_probabilities(model, rows_to(batch, slice(None), device)))
    return torch.cat(found)


def rewards(model: Model, batch: Batch, start: Tensor, beta: float) -> Tensor:
    """Implicit rewards of both answers, (B, 2); `start` is `reference` of all pairs."""
    assert batch.documents is not None, "rows of pairs say which pair they are"
    numbers = batch.documents[:, 0] // 2
    return beta * (log_probabilities(model, batch) - start.to(numbers.device)[numbers])


def dpo_loss(found: Tensor, smoothing: float = 0.0) -> Tensor:
    """Loss of each pair (B) from its rewards (B, 2)."""
    margin = found[:, 0] - found[:, 1]
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def dpo_objective(start: Tensor, settings: DPO) -> Objective:
    """The objective of pairs whose reference log-probabilities are `start` (N, 2)."""

    def objective(model: Model, batch: Batch) -> tuple[Tensor, int]:
        found = rewards(model, batch, start, settings.beta)
        return dpo_loss(found, settings.smoothing).sum(), len(found)

    return objective


@dataclass(frozen=True, kw_only=True)
class PreferenceReport:
    """Means over pairs: rewards in nats times β, and the share in which chosen has the larger."""

    chosen: float
    rejected: float
    accuracy: float

    @property
    def margin(self) -> float:
        """By how much the chosen answer's reward is the larger, on average."""
        return self.chosen - self.rejected


def preference_report(
    model: Model, rows: PairRows, start: Tensor, beta: float, *, bfloat16: bool = False
) -> PreferenceReport:
    """What the model makes of pairs by now; the mode is put back."""
    device, found = device_of(model), []
    for batch in rows.in_order():
        with evaluating(model), precision(device, bfloat16):
            found.append(rewards(model, rows_to(batch, slice(None), device), start, beta))
    all_pairs = torch.cat(found).cpu()
    chosen, rejected = all_pairs.mean(0).tolist()
    better = (all_pairs[:, 0] > all_pairs[:, 1]).float().mean().item()
    return PreferenceReport(chosen=chosen, rejected=rejected, accuracy=better)
