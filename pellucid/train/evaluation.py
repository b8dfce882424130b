"""Loss on text that was held out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pellucid.models import Model
from pellucid.train.batches import Batch
from pellucid.train.objective import next_token_objective
from pellucid.train.precision import device_of, precision


@torch.no_grad()
def evaluate(model: Model, windows: Tensor, *, rows: int = 4, bfloat16: bool = False) -> float:
    """Mean next-token loss over windows (N, T + 1), in nats per token; the mode is put back."""
    training, device = model.training, device_of(model)
    model.eval()
    total = 0.0
    for some in windows.split(rows):
        some = some.to(device)
        with precision(device, bfloat16):
            loss, _ = next_token_objective(model, Batch(some[:, :-1], some[:, 1:]))
        total += loss.item()
    model.train(training)
    return total / windows[:, 1:].numel()


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """A loss in nats per token as bits per byte of text, which no tokenizer can flatter."""
    return loss * tokens / math.log(2) / text_bytes
