"""Logits of the places that count, a few rows of the vocabulary at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.evaluate.windows import WindowRows
from pellucid.models import Model
from pellucid.models.finite import why_not_finite

LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MB in float32


def hidden_of(model: Model, inputs: Tensor, scored: Tensor) -> Tensor:
    """Of inputs (B, T), the normalised residual stream at the scored places, (N, C)."""
    device = model.device
    return model.hidden(inputs.to(device))[scored.to(device)]


def wide_logits(model: Model, hidden: Tensor) -> Tensor:
    """Logits (N, V) of hidden (N, C), at least in float32."""
    logits = model.logits(hidden[None])[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def rows_at_once(model: Model) -> int:
    """How many rows of logits to hold at a time."""
    return max(1, LOGITS_AT_ONCE // model.config.vocab_size)


def score_rows(model: Model, rows: WindowRows) -> tuple[Tensor, Tensor]:
    """Of each scored target, row by row: −ln p in nats, and whether it was the likeliest; (N).

    ValueError where a loss is not a number, with the weight that is none.
    """
    chunk = rows_at_once(model)
    hidden = hidden_of(model, rows.inputs, rows.scored)
    wanted = rows.targets[rows.scored].to(hidden.device).split(chunk)
    losses, hits = [], []
    for some, targets in zip(hidden.split(chunk), wanted, strict=True):
        logits = wide_logits(model, some)
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        hits.append(logits.argmax(-1) == targets)
    lost = torch.cat(losses)
    if not lost.isfinite().all():
        raise ValueError(f"the loss is not a number (NaN, or infinite): {why_not_finite(model)}")
    return lost, torch.cat(hits)
