"""Logits of the places that count, a few rows of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.evaluate.windows import WindowRows
from pellucid.models import Model
from pellucid.models.finite import why_not_finite

LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MB in float32
ALIKE = 32  # rows


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


def logits_alike(model: Model, hidden: Tensor) -> Iterator[Tensor]:
    """Logits of hidden (N, C), `ALIKE` rows at a time, each product of the same shape.

    A matrix product rounds by its shape. So a row's logits are the same bits whether its text is
    asked for alone, in part or as a whole; the last product is filled up with zeros.
    """
    for some in hidden.split(ALIKE):
        filled = F.pad(some, (0, 0, 0, ALIKE - len(some)))
        yield wide_logits(model, filled)[: len(some)]


def score_rows(model: Model, rows: WindowRows, *, alike: bool = False) -> tuple[Tensor, Tensor]:
    """Of each scored target, row by row: −ln p in nats, and whether it was the likeliest; (N).

    alike  by `logits_alike`, for scores that must not depend on what else is asked for

    ValueError where a loss is not a number, with the weight that is none.
    """
    chunk = ALIKE if alike else rows_at_once(model)
    hidden = hidden_of(model, rows.inputs, rows.scored)
    wanted = rows.targets[rows.scored].to(hidden.device).split(chunk)
    parts = logits_alike(model, hidden) if alike else _in_chunks(model, hidden, chunk)
    losses, hits = [], []
    for logits, targets in zip(parts, wanted, strict=True):
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        hits.append(logits.argmax(-1) == targets)
    lost = torch.cat(losses)
    if not lost.isfinite().all():
        raise ValueError(f"the loss is not a number (NaN, or infinite): {why_not_finite(model)}")
    return lost, torch.cat(hits)


def _in_chunks(model: Model, hidden: Tensor, chunk: int) -> Iterator[Tensor]:
    return (wide_logits(model, some) for some in hidden.split(chunk))
