"""What training makes smaller: a sum of losses and how many there are.

Sums and counts add up exactly, over the passes of a step and over ranks, where means of parts of
different sizes do not. An objective may count whatever it averages over: tokens, answers, pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.models import Model
from pellucid.train.cross_entropy import linear_cross_entropy
from pellucid.train.data.batches import IGNORED, Batch

# (model, rows of a batch) -> (sum of the losses, a scalar with a gradient; their number)
Objective = Callable[[Model, Batch], tuple[Tensor, int]]


def next_token_objective(model: Model, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy of each next token in nats, a chunk of the logits at a time."""
    hidden = model.hidden(batch.inputs, starts=document_starts(batch))
    return linear_cross_entropy(hidden, head_weight(model), batch.targets), count(batch)


def plain_next_token_objective(model: Model, batch: Batch) -> tuple[Tensor, int]:
    """The same from all logits at once, which is what `next_token_objective` must equal."""
    logits = model(batch.inputs, starts=document_starts(batch))  # (B, T, V)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    loss = F.cross_entropy(wide, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, count(batch)


def head_weight(model: Model) -> Tensor:
    """The matrix (V, C) that makes logits: the head's own, or the embedding's where it is tied."""
    return model.embed.weight if model.unembed is None else model.unembed.weight


def count(batch: Batch) -> int:
    """How many targets there are to predict."""
    return int((batch.targets != IGNORED).sum())


def document_starts(batch: Batch) -> Tensor | None:
    """(B, T) where in its row each token's document begins; None: the row is one text.

    documents  0 0 0 1 1 2   ->   starts  0 0 0 3 3 5
    """
    if batch.documents is None:
        return None
    place = torch.arange(batch.documents.shape[1], device=batch.documents.device)
    new = batch.documents.diff(dim=1, prepend=batch.documents[:, :1]) != 0
    return torch.where(new, place, 0).cummax(dim=1).values
