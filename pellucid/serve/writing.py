"""The work behind the endpoints, as iterators that an engine gives turns: write, score, embed."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.evaluate.scoring import hidden_of, logits_alike
from pellucid.generate import Completion, Sampling, TextStream, Together, row_seed
from pellucid.language_model import LanguageModel
from pellucid.models import evaluating

AT_ONCE = 4  # choices of one request that are written together


@dataclass(frozen=True)
class Scored:
    """A token with ln p in nats, given what stands before it, and the likeliest of its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
    """

    rows: list[list[int]]
    sampling: Sampling
    length: int | None
    stop: Sequence[str] = ()
    seed: int | None = None
    top: int | None = None


def score_logits(logits: Tensor, ids: Sequence[int], top: int) -> list[Scored]:
    """logits (N, V), at least float32, and the token of each -> ln p, with the `top` likeliest.

    The first of equally likely tokens comes first, as in argmax.
    """
    ids_there = torch.tensor(ids, device=logits.device)
    losses = torch.nn.functional.cross_entropy(logits, ids_there, reduction="none")
    found = (-losses).tolist()
    if not top:
        return [Scored(id, value) for id, value in zip(ids, found, strict=True)]
    values, places = logits.log_softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
    best = logits.argmax(-1, keepdim=True)
    values, places = values.tolist(), places.tolist()
    scored = []
    for row, (id, value) in enumerate(zip(ids, found, strict=True)):
        pairs = dict(zip(places[row], values[row], strict=True))
        first = int(best[row])
        ranked = {first: values[row][0], **pairs}
        kept = list(ranked.items())[:top]
        scored.append(Scored(id, value, tuple(kept)))
    return scored


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
        if top is not None and token not in self._stop_ids:
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


def score_prompt(lm: LanguageModel, ids: Sequence[int], top: int) -> list[Scored | None]:
    """ln p of each token of a prompt given those before it; None for the first, which has none.

    The products are those of `pellucid.evaluate`'s adapter for lm-evaluation-harness, so that a
    score is the same number through the server and in the process.
    """
    if len(ids) < 2:
        return [None for _ in ids]
    scored: list[Scored | None] = [None]
    with evaluating(lm.model):
        inputs = torch.tensor([list(ids[:-1])])
        hidden = hidden_of(lm.model, inputs, torch.ones_like(inputs, dtype=torch.bool))
        for logits in logits_alike(lm.model, hidden):
            first = len(scored)
            scored += score_logits(logits, ids[first : first + len(logits)], top)
    return scored


def score_prompts(
    lm: LanguageModel, rows: Sequence[Sequence[int]], top: int
) -> Generator[list[Scored | None], None, None]:
    """Each row's scores, a row per turn."""
    for row in rows:
        yield score_prompt(lm, row, top)


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
