"""Prompts, one or several, as rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pellucid.models import Config

Prompt: TypeAlias = str | Sequence[int] | Tensor  # text, or ids (T)
Prompts: TypeAlias = Prompt | Sequence[Prompt]  # a tensor (B, T) is several

_FILL = 0  # the id of padding; nothing looks at it


def is_batch(prompts: Prompts) -> bool:
    """Whether these are several prompts: a list of texts or of lists, a tensor of two axes.

    TypeError for what is neither one prompt nor several.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2) or prompts.is_floating_point():
            raise TypeError(
                f"a prompt is a tensor of {prompts.dtype}, {tuple(prompts.shape)}: expected token "
                "ids, (T) or (B, T)"
            )
        return prompts.ndim == 2
    if isinstance(prompts, str):
        return False
    if not isinstance(prompts, Sequence):
        raise TypeError(f"a prompt is a {type(prompts).__name__}: expected text or token ids")
    first = prompts[0] if prompts else 0
    return first.ndim > 0 if isinstance(first, Tensor) else not hasattr(first, "__index__")


def padded(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Rows as (B, T), padded on the left, and where each begins, (B), or None: at 0."""
    longest = max(len(row) for row in rows)
    starts = [longest - len(row) for row in rows]
    filled = [[_FILL] * start + list(row) for start, row in zip(starts, rows, strict=True)]
    tokens = torch.tensor(filled, device=device)
    return tokens, torch.tensor(starts, device=device) if any(starts) else None


def check_tokens(tokens: Iterable[int], config: Config) -> None:
    """ValueError for no tokens, or for one outside the vocabulary."""
    tokens = list(tokens)
    if not tokens:
        raise ValueError("the prompt has no tokens: give some text")
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary 0 … {config.vocab_size - 1}")
