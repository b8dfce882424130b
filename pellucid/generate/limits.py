"""What a generation may be asked for: prompts, their length and that of what follows them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid.models import Config, Model

MAX_NEW_TOKENS = 128  # the default number


def context_limit(config: Config) -> int:
    """Tokens a model can have in view; dynamic RoPE stretches its original context by `factor`."""
    if config.rope is not None and config.rope.type == "dynamic":
        original = config.rope.original_context or config.context_length
        return max(config.context_length, int(original * config.rope.factor))
    return config.context_length


def default_length(config: Config, prompts: Sequence[Sequence[int]], *, slide: bool = False) -> int:
    """Default number of new tokens: `MAX_NEW_TOKENS`, or what the context has room for.

    At least one, so that a prompt that fills the context is refused with the numbers.
    """
    if slide or config.rope is None:  # the context slides
        return MAX_NEW_TOKENS
    room = context_limit(config) - max(map(len, prompts), default=0)
    return max(1, min(MAX_NEW_TOKENS, room))


def excluded_ids(
    model: Model, vocab_size: int | None, unused_ids: Collection[int]
) -> Tensor | None:
    """(V) bool: ids of the model that no token of the tokenizer has; None where it has them all."""
    size = model.config.vocab_size
    last = size if vocab_size is None else vocab_size
    inside = [id for id in unused_ids if 0 <= id < size]
    if last >= size and not inside:
        return None
    excluded = torch.arange(size) >= last
    excluded[inside] = True
    return excluded.to(next(model.parameters()).device)


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """ValueError for no prompts, an empty one, or an id that the model does not have."""
    if not prompts:
        raise ValueError("no prompts: expected at least one")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {row} has no tokens, and a model needs one to go on from: begin it with "
                "the tokenizer's bos token"
            )
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"prompt {row} holds token id {token}, but the model's ids are 0 … "
                    f"{vocab_size - 1}: do the model and the tokenizer belong together?"
                )


def check_lengths(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int] | None,
    config: Config,
    *,
    slide: bool,
) -> list[int]:
    """New tokens that each prompt may get; ValueError as `check_prompts` and `room_of`.

    max_new_tokens: one number for all prompts, or one for each; None: what the context holds
    """
    check_prompts(prompts, config.vocab_size)
    each = list(max_new_tokens) if isinstance(max_new_tokens, list | tuple) else None
    if each is not None and len(each) != len(prompts):
        raise ValueError(f"{len(each)} lengths for {len(prompts)} prompts: expected one each")
    crops, window = slide or config.rope is None, context_limit(config)
    return [
        room_of(prompt, row, each[row] if each else max_new_tokens, window, crops)
        for row, prompt in enumerate(prompts)
    ]


def room_of(prompt: Sequence[int], row: int, max_new_tokens: Any, window: int, crops: bool) -> int:
    """New tokens a row may get; ValueError where that is more than the context holds."""
    if max_new_tokens is not None and not isinstance(max_new_tokens, int):
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}: expected a whole number")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected 0 or more")
    wanted = 1 if max_new_tokens is None else max_new_tokens
    if len(prompt) + wanted <= window or (crops and max_new_tokens is not None):
        return window - len(prompt) if max_new_tokens is None else max_new_tokens
    if max_new_tokens is None:
        raise ValueError(
            f"prompt {row} has {len(prompt)} tokens, which leaves no room in the context of "
            f"{window}: shorten it, or say how many tokens to write (max_new_tokens) and let "
            "the context slide (slide=True, --slide)"
        )
    raise ValueError(
        f"prompt {row} ({len(prompt)} tokens) and {max_new_tokens} new tokens make "
        f"{len(prompt) + max_new_tokens}, but the context is {window}: ask for at most "
        f"{max(window - len(prompt), 0)}, or let it slide (slide=True, --slide)"
    )
