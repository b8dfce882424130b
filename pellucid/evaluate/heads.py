"""What a head does, in numbers: how much it looks at the token before, how much it copies.

An induction head continues what it has seen: at a token that stood in the text before, it looks
at the token that came after it then (Elhage et al., 2021; Olsson et al., 2022). It shows on a
random sequence that is repeated, where nothing else is left to look at:

    key      a b c d a b c d
    query a                      at the second a, the token after the first one: b
          b    #                 (`previous`: the token before the query)
          c
          d
          a    *                 `induction`: key = query - length + 1
          b      *
          c        *
          d          *
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.models import Model
from pellucid.trace import trace


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """Mean attention, from 0 to 1, for each head: both (layers, heads)."""

    induction: Tensor
    previous: Tensor


def induction_score(pattern: Tensor, length: int, begin: int = 0) -> Tensor:
    """Mean attention from a token's second occurrence to what followed its first; -> (H).

    pattern (B, H, T, S) of a text in which `length` tokens stand twice, after `begin` others.
    """
    queries = torch.arange(begin + length, begin + 2 * length, device=pattern.device)
    return pattern[:, :, queries, queries - length + 1].float().mean(dim=(0, 2))


def previous_token_score(pattern: Tensor) -> Tensor:
    """Mean attention to the token before; pattern (B, H, T, S) -> (H). The first query has none."""
    return pattern.diagonal(offset=-1, dim1=2, dim2=3).float().mean(dim=(0, 2))


def repeated_random_tokens(
    vocab_size: int, *, length: int, rows: int, seed: int, begin: Sequence[int] = ()
) -> Tensor:
    """Rows of `begin`, `length` random tokens, and these again: (rows, begin + 2·length)."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(vocab_size, (rows, length), generator=generator)
    start = torch.tensor([*begin], dtype=torch.long).expand(rows, -1)
    return torch.cat((start, half, half), dim=1)


def head_scores(
    model: Model, *, seed: int = 0, length: int = 64, rows: int = 4, begin: Sequence[int] = ()
) -> HeadScores:
    """Both scores of every head on repeated random tokens.

    length  tokens of one copy      rows   sequences to average over
    begin   tokens to begin each row with, usually the one that begins a text

    Raises ValueError where two copies do not fit the model's context.
    """
    config = model.config
    needed = len(begin) + 2 * length
    if length < 2 or needed > config.context_length:
        raise ValueError(
            f"two copies of {length} tokens after {len(begin)} others are {needed} tokens: "
            f"expected at most the context of {config.context_length}, and copies of 2 or more"
        )
    tokens = repeated_random_tokens(
        config.vocab_size, length=length, rows=rows, seed=seed, begin=begin
    )
    with trace(model, only="layers.*.attn.pattern") as seen:
        model(tokens.to(next(model.parameters()).device))
    patterns = [seen[f"layers.{layer}.attn.pattern"] for layer in range(config.n_layers)]
    return HeadScores(
        induction=torch.stack([induction_score(each, length, len(begin)) for each in patterns]),
        previous=torch.stack([previous_token_score(each) for each in patterns]),
    )


def strongest(scores: Tensor) -> tuple[int, int]:
    """(layer, head) of the highest score in (layers, heads)."""
    return divmod(int(scores.argmax()), scores.shape[1])
