"""Loss on text that was held out."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pellucid.models import Model, evaluating
from pellucid.train.data.batches import IGNORED, Batch
from pellucid.train.objective import next_token_objective
from pellucid.train.precision import device_of, precision
from pellucid.train.ranks import Ranks


def evaluate(
    model: Model,
    windows: Tensor,
    *,
    rows: int = 4,
    bfloat16: bool = False,
    ranks: Ranks | None = None,
) -> float:
    """Mean next-token loss over windows (N, T + 1), in nats per token; the mode is put back.

    Each of `ranks` computes its share of the windows, `rows` at a time. All of them are given all
    windows, and all return the loss over all of them; None: one process.
    """
    ranks, device = ranks or Ranks(), device_of(model)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, count
    for inputs, targets in _share(windows, ranks, rows):
        with evaluating(model), precision(device, bfloat16):
            loss, count = next_token_objective(model, Batch(inputs.to(device), targets.to(device)))
            totals += torch.stack((loss.double(), totals.new_tensor(count)))
    total, count = ranks.sum(totals).tolist()
    return total / count


def _share(windows: Tensor, ranks: Ranks, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of this rank's windows, `rows` at a time: as often as on every other rank.

    A sharded model is put together by all ranks in each pass, so none may have a pass more. Where
    windows do not divide evenly, a rank without a last one takes the first, which does not count:

        5 windows, 3 ranks     rank 0   0 3     rank 1   1 4     rank 2   2 (0)
    """
    mine = windows[ranks.rank :: ranks.world]
    inputs, targets = mine[:, :-1], mine[:, 1:]
    if ranks.rank >= len(windows) % ranks.world > 0:
        first = windows[:1, :-1]
        inputs = torch.cat((inputs, first))
        targets = torch.cat((targets, torch.full_like(first, IGNORED)))
    return zip(inputs.split(rows), targets.split(rows), strict=True)


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """A loss in nats per token as bits per byte of text, comparable between tokenizers."""
    return loss * tokens / math.log(2) / text_bytes
