"""The weights a training run begins with."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pellucid.devices import check_room, free_memory
from pellucid.models import Config, Model, build, initialise

Start = Literal["sinusoids", "gpt2", "torch"]


def new_model(config: Config, seed: int, start: Start = "sinusoids", bias: bool = True) -> Model:
    """A model with random weights, the same for the same seed.

    start  "sinusoids": `begin`; "gpt2": as in GPT-2, its positions random as well; "torch": what
           PyTorch's modules begin with after ``torch.manual_seed(seed)``, in the order in which the
           model makes them
    bias   whether biases are trained; else they are 0 and stay so

    ValueError, before any is made, for more weights than the memory that is free.
    """
    inner = config.n_heads * config.head_dim + config.hidden_width
    places = config.vocab_size + (0 if config.rope else config.context_length)
    least = config.width * (places + 2 * config.n_layers * inner)
    cpu = torch.device("cpu")
    what = f"a model of {least:,} weights or more"
    check_room(4 * least, cpu, what, "choose a smaller one", free_memory(cpu))
    if start == "torch":
        torch.manual_seed(seed)
        model = build(config, "meta")
    else:
        model = build(config, "meta")
        _BEGINNINGS[start](model, seed)
    if not bias:
        for parameter in freeze_biases(model):
            nn.init.zeros_(parameter)
    return model


def freeze_biases(model: Model) -> list[nn.Parameter]:
    """Leave the biases as they are; which these are."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.requires_grad_(False)
    return biases


def begin_as_drawn(model: Model, seed: int) -> None:
    """Random weights, the same for the same seed, positions as well."""
    initialise(model, torch.Generator().manual_seed(seed))


def begin(model: Model, seed: int) -> None:
    """Random weights, the same for the same seed; GPT-2's positions begin as sinusoids.

    GPT-2 learns its position embeddings. From random ones, a head that looks at the token before
    must learn one answer for each position; between sinusoids one rotation answers for all of them
    (Vaswani et al., 2017, section 3.5). They are the size of random ones, and trained like them.
    """
    begin_as_drawn(model, seed)
    if model.config.rope is None:
        with torch.no_grad():
            table = sinusoids(*model.pos_embed.weight.shape)
            model.pos_embed.weight.copy_(0.02 * 2**0.5 * table)  # the RMS of a sine is 1/√2


_BEGINNINGS = {"sinusoids": begin, "gpt2": begin_as_drawn}


def sinusoids(context: int, width: int) -> Tensor:
    """sin and cos of position × frequency, side by side, (context, width).

    The frequencies fall geometrically from 1 to one turn over the whole context.
    """
    pairs = (width + 1) // 2
    slowest = 2 * math.pi / context
    turns = slowest ** (torch.arange(pairs) / max(pairs - 1, 1))
    angles = torch.arange(context)[:, None] * turns  # (context, pairs)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]
