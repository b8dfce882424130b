"""The weights a training run begins with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pellucid.models import GPT2, Model, initialise


def begin(model: Model, seed: int) -> None:
    """Random weights, the same for the same seed; GPT-2's positions begin as sinusoids.

    GPT-2 learns its position embeddings. From random ones, a head that looks at the token before
    must learn one answer for each position; between sinusoids one rotation answers for all of them
    (Vaswani et al., 2017, section 3.5). They are the size of random ones, and trained like them.
    """
    initialise(model, torch.Generator().manual_seed(seed))
    if isinstance(model, GPT2):
        with torch.no_grad():
            table = sinusoids(*model.pos_embed.weight.shape)
            model.pos_embed.weight.copy_(0.02 * 2**0.5 * table)  # the RMS of a sine is 1/√2


def sinusoids(context: int, width: int) -> Tensor:
    """sin and cos of position × frequency, side by side, (context, width).

    The frequencies fall geometrically from 1 to one turn over the whole context.
    """
    pairs = (width + 1) // 2
    slowest = 2 * math.pi / context
    turns = slowest ** (torch.arange(pairs) / max(pairs - 1, 1))
    angles = torch.arange(context)[:, None] * turns  # (context, pairs)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]
