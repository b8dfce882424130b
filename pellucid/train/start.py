"""The weights a training run begins with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pellucid.models import GPT2, Model, initialise

EMBEDDING_SIZE = 0.04  # RMS of a GPT-2's embeddings, of tokens and of positions alike


def begin(model: Model, seed: int) -> None:
    """Random weights, the same for the same seed; a GPT-2's heads begin by looking close by.

    GPT-2 learns its position embeddings, and from random ones a head that looks at the token before
    must learn one answer for each position. So positions begin as sinusoids, between which one
    rotation answers for all of them (Vaswani et al., 2017, section 3.5), and keys begin equal to
    queries, so that each token looks at itself, at its neighbours and at tokens like it
    ("mimetic initialisation", Trockman & Kolter, 2023). A Llama needs neither: it has RoPE.
    """
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    if isinstance(model, GPT2):
        _look_close_by(model, generator)


@torch.no_grad()
def _look_close_by(model: GPT2, generator: torch.Generator) -> None:
    nn.init.normal_(model.embed.weight, std=EMBEDDING_SIZE, generator=generator)
    table = sinusoids(*model.pos_embed.weight.shape)
    model.pos_embed.weight.copy_(table * (EMBEDDING_SIZE / table.pow(2).mean().sqrt()))
    for layer in range(model.config.n_layers):
        attention = model.get_submodule(f"layers.{layer}.attn")
        query = attention.get_parameter("q_proj.weight")
        nn.init.normal_(query, std=model.config.width**-0.5, generator=generator)
        attention.get_parameter("k_proj.weight").copy_(query)


def sinusoids(context: int, width: int) -> Tensor:
    """sin and cos of position × frequency, side by side, (context, width).

    The frequencies fall geometrically from 1 to one turn over the whole context.
    """
    pairs = (width + 1) // 2
    slowest = 2 * math.pi / context
    turns = slowest ** (torch.arange(pairs) / max(pairs - 1, 1))
    angles = torch.arange(context)[:, None] * turns  # (context, pairs)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]
