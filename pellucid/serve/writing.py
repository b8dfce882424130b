"""The work behind the endpoints, as iterators that an engine gives turns: write, score, embed."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pellucid.generate import (
    Completion,
    Sampling,
    Scored,
    TextScores,
    TextStream,
    Together,
    row_seed,
    score_logits,
)
from pellucid.language_model import LanguageModel
from pellucid.models import evaluating

AT_ONCE = 4  # choices of one request that are written together


@dataclass(frozen=True)
class TextPiece:
    """What one step adds to a choice: text, the tokens that end in it, and perhaps the end."""

    index: int
    text: str = ""
    tokens: tuple[Scored, ...] = ()
    finish_reason: str | None = None


@dataclass(kw_only=True)
class WritingRequest:
    """What is to be written.

    rows       prompts in token ids, one for each choice
    length     new tokens at most; None: until the context is full
    top        likeliest tokens wanted of each place; None: no log-probabilities at all
    scores_stop  whether a stop token, which has no text, is among the tokens with scores
    """

    rows: list[list[int]]
    sampling: Sampling
    length: int | None
    stop: Sequence[str] = ()
    seed: int | None = None
    top: int | None = None
    scores_stop: bool = False


class Choice:
    """One row of an order while it is written."""

    def __init__(
        self, lm: LanguageModel, together: Together, order: WritingRequest, index: int
    ) -> None:
        """ValueError, at once, for a prompt that the model cannot take or that is too long."""
        ids = lm.tokenizer.stop_ids
        self.index, self._order, self._stop_ids = index, order, ids
        self.together = together
        self.generation = together.generate(
            order.rows[index],
            sampling=order.sampling,
            max_new_tokens=order.length,
            stop_ids=ids,
            seed=None if order.seed is None else row_seed(order.seed, index),
            vocab_size=lm.tokenizer.vocab_size,
            unused_ids=lm.tokenizer.unused_ids,
        )
        self.completion = Completion(prompt=order.rows[index])
        self._stream = TextStream(
            self.generation, [self.completion], lm.tokenizer, stop=order.stop, stop_ids=ids
        )
        self._waiting: list[Scored] = []  # tokens whose text is held back

    @property
    def ended(self) -> bool:
        """Whether nothing follows."""
        return self.completion.finish_reason is not None

    def step(self) -> TextPiece:
        """Write one token, from logits that are there."""
        (text,) = next(self._stream)
        token, top = self.completion.tokens[-1], self._order.top
        if top is not None and (self._order.scores_stop or token not in self._stop_ids):
            logits = self.generation.logits
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            self._waiting += score_logits(logits, [token], top)
        tokens: tuple[Scored, ...] = ()
        if text or self.ended:
            tokens, self._waiting = tuple(self._waiting), []
        return TextPiece(self.index, text, tokens, self.completion.finish_reason)


def write(choices: Sequence[Choice]) -> Generator[list[TextPiece], None, None]:
    """Choices in steps that they share with other requests: what each turn adds to them.

    Only a few are written at a time, so that a request for many does not slow down the others.
    """
    waiting: deque[Choice] = deque()
    for choice in choices:
        if choice.ended:  # no token was asked for
            yield [TextPiece(choice.index, finish_reason="length")]
        else:
            waiting.append(choice)
    live: list[Choice] = []
    try:
        while waiting or live:
            while waiting and len(live) < AT_ONCE:
                live.append(waiting.popleft())
                live[-1].together.join(live[-1].generation)
            pieces = [choice.step() for choice in live if choice.generation.ready]
            for choice in live:
                if choice.ended:
                    choice.together.leave(choice.generation)
            live = [choice for choice in live if not choice.ended]
            yield [piece for piece in pieces if piece.text or piece.tokens or piece.finish_reason]
    finally:
        for choice in live:
            choice.together.leave(choice.generation)


def score_prompts(
    together: Together, rows: Sequence[Sequence[int]], top: int
) -> Generator[list[list[Scored | None]], None, None]:
    """ln p of each token of each prompt given those before it, with the likeliest of its place.

    Read in steps that are shared with other requests, a few prompts at a time: per turn the
    prompts that follow those given so far. The first token has nothing before it and gets None.
    They are the numbers of `pellucid.evaluate`'s adapter for lm-evaluation-harness.
    """
    waiting, live = deque(rows), deque[TextScores | None]()
    try:
        while waiting or live:
            while waiting and len(live) < AT_ONCE:
                row = waiting.popleft()
                live.append(together.score(row, top=top) if len(row) > 1 else None)
                if live[-1] is not None:
                    together.join(live[-1])
            found: list[list[Scored | None]] = []
            while live and (live[0] is None or live[0].ready):
                scored = live.popleft()
                found.append([None] if scored is None else [None, *scored.scores])
                if scored is not None:
                    together.leave(scored)
            yield found
    finally:
        for scored in live:
            if scored is not None:
                together.leave(scored)


def embed(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Generator[list[float], None, None]:
    """A vector (C) of each row, a row per turn: the mean of `final_norm`, made of length 1."""
    for row in rows:
        with evaluating(lm.model):
            hidden = lm.model.hidden(torch.tensor([list(row)], device=lm.device))[0]
        mean = hidden.double().mean(0)
        yield (mean / mean.norm().clamp_min(1e-30)).tolist()


def check_rows(lm: LanguageModel, rows: Sequence[Any]) -> None:
    """ValueError for a row that is empty, holds an unknown token or is longer than the context."""
    from pellucid.prompts import check_tokens

    for row in rows:
        check_tokens(row, lm.config)
        if len(row) > lm.config.context_length:
            raise ValueError(
                f"{len(row)} tokens, but the context is {lm.config.context_length}: shorten it"
            )
