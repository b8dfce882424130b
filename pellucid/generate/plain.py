"""The plain loop of "Build an LLM from scratch", which everything quicker must equal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from pellucid.generate.limits import context_limit
from pellucid.generate.sample import Sampling, next_tokens, row_generators
from pellucid.models import Model


def generate_plain(
    model: Model,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
) -> list[int]:
    """The book's loop: a full pass over the last `context_limit` tokens for every new one.

    Slow, and short enough to be seen right at once: `generate_tokens` is held against it.
    Returns the new tokens, a stop token included.
    """
    tokens, generators = list(prompt), row_generators(seed, 1)
    window, device = context_limit(model.config), model.device
    seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-window:]], device=device))  # (1, T, V)
        seen[0, tokens] = True
        tokens += next_tokens(logits[:, -1], sampling, generators, seen)
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]
