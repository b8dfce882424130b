"""Tokens drafted by a smaller model, so that one reading of the large one's weights checks several.

    draft    t ─ a ─ b ─ c        three steps of the small model after the text's last token t
    model    t   a   b   c        one pass: the logits after each of the four
    text     t   a   b   d        a and b are accepted, c is not; d is chosen in its place

Greedy tokens are those of plain decoding, bit for bit. A drawn token is accepted with probability
min(1, p / q), where the model gives it p and the draft, under the same sampling, gave it q; else
one is drawn from what p has above q. So tokens are distributed as the model's own (Leviathan et
al., "Fast Inference from Transformers via Speculative Decoding", 2023; Chen et al., "Accelerating
Large Language Model Decoding with Speculative Sampling", 2023).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pellucid.generate import native
from pellucid.generate.fast import FastSteps
from pellucid.generate.limits import context_limit
from pellucid.generate.lookup import Lookup, PassTimes, nearer
from pellucid.generate.prefixes import shared_length
from pellucid.generate.sample import Sampling, draw, likeliest, one_thread, probabilities, warp
from pellucid.models import Cache, Model
from pellucid.tokenizers import Tokenizer

_LATELY = 0.1  # weight of the newest guess in the share of right ones
_HOPED = 0.7  # that share before there are any
_PAUSE = 16, 1024  # tokens before the next try where drafting did not pay: at first, and at most


class Guess(NamedTuple):
    """A token that may come next.

    source         "draft" or "lookup"
    probabilities  (V) float64 by which it was drawn; None where it was not drawn
    """

    token: int
    source: str
    probabilities: Tensor | None = None


def draft_steps(
    model: Model, draft: Model | FastSteps, fast: bool | FastSteps | None
) -> tuple[bool | FastSteps, FastSteps]:
    """How the model's steps are computed with a draft, and the draft's own.

    ValueError where either cannot be decoded in C: elsewhere several tokens in one pass have other
    bits than one by one.
    """
    if fast is False:
        raise ValueError(
            "a draft is checked by the decoder in C: leave out the draft, or fast=False"
        )
    for which, one in (("the model", model), ("the draft", draft)):
        reason = None if isinstance(one, FastSteps) else native.unsupported(one)
        if reason:
            raise ValueError(f"a draft needs both models decoded in C, {which} cannot be: {reason}")
    if not isinstance(draft, FastSteps):
        draft = FastSteps(draft, context_limit(draft.config), True)
    return (fast if isinstance(fast, FastSteps) else True), draft


class Draft:
    """The drafts for one text, and whether they pay.

    They are as long as promises the most tokens a second, by the share of accepted ones and by what
    passes take; where none pays, drafting pauses. For drawn text these times are not measured but
    follow from the sizes of the two models: how many tokens are drafted decides which numbers are
    drawn, and a seed must mean the same text on a busy machine.

    A copy of the model in fewer bits goes on from the model's own cache, so it never reads the
    text: what it writes there, behind the text, the pass that checks it writes again.
    """

    def __init__(
        self,
        steps: FastSteps,
        model: Model,
        sampling: Sampling,
        generator: torch.Generator,
        excluded: Tensor | None,
        times: PassTimes,
    ) -> None:
        """steps: of the draft; model: the one it drafts for; excluded (V): ids it never chooses."""
        self._steps, self._sampling, self._generator = steps, sampling, generator
        self._excluded, self._size = excluded, model.config.vocab_size
        self._share = weight_bytes(steps.model) / weight_bytes(model)
        self._times = times if sampling.greedy else PassTimes(1.0)
        self._seconds: float | None = None  # of a step of the draft
        self._limit = min(steps.length, context_limit(steps.model.config))
        self._cache = None if is_copy(model, steps.model) else Cache(steps.model.config.n_layers)
        self._held: list[int] = []  # tokens in its own cache
        self._right = _HOPED
        self._open: tuple[int, list[int]] = (0, [])  # where the latest draft begins, and its tokens
        self._retry, self._pause = 0, _PAUSE[0]
        self.proposed = 0  # tokens in all

    def guess(
        self, text: Sequence[int], most: int, seen: Tensor | None, cache: Cache
    ) -> list[Guess]:
        """At most `most` tokens that may follow the text; none where none are worth their time.

        seen (1, V) bool: tokens of the text, where repetition is penalised; cache: the model's, of
        all tokens but the last, and so it is left
        """
        self._score(text)
        count = self._worth(text, min(most, self._limit - len(text) - 1))
        if not count:
            return []
        guesses, text, length = [], list(text), cache.length
        seen = None if seen is None else seen.clone()
        with one_thread():
            for _ in range(count):
                guesses.append(self._next(text, seen, cache))
                text.append(guesses[-1].token)
                if seen is not None:
                    seen[0, text[-1]] = True
        cache.crop(length)
        self._open = len(text) - count, text[-count:]
        self.proposed += count
        return guesses

    def _score(self, text: Sequence[int]) -> None:
        """Compare the latest draft with what came."""
        place, tokens = self._open
        for came, token in zip(text[place:], tokens, strict=False):
            self._right += _LATELY * ((came == token) - self._right)
            if came != token:
                break
        self._open = (0, [])

    def _worth(self, text: Sequence[int], most: int) -> int:
        if len(text) < self._retry or not self._times.known or most < 1:
            return 0
        count = self._times.best(most, self._right, self._each())
        if not count:  # try again later
            self._right = _HOPED
            self._retry = len(text) + self._pause
            self._pause = min(2 * self._pause, _PAUSE[1])
        return count

    def _each(self) -> float:
        """Seconds of a step of the draft: as measured, else by the sizes of the models."""
        return self._share * self._times[1] if self._seconds is None else self._seconds

    def _next(self, text: list[int], seen: Tensor | None, cache: Cache) -> Guess:
        """The draft's next token after the text."""
        logits = self._logits(text, cache)
        if not logits.amax().isfinite():
            raise ValueError("the draft's logits are not numbers (NaN, or infinite): leave it out")
        shaped = warp(logits, self._sampling, seen)
        if self._sampling.greedy:
            return Guess(int(likeliest(shaped)), "draft")
        (token,) = draw(shaped, [self._generator]).tolist()
        return Guess(token, "draft", probabilities(shaped)[0])

    def _logits(self, text: list[int], cache: Cache) -> Tensor:
        """Of the token after the text, (1, V) with the model's V; ids it never writes at −inf."""
        if self._cache is not None:
            cache = self._cache
            cache.crop(shared_length(self._held, text, len(text) - 1))
            self._held = text.copy()
        unread, begin = text[cache.length :], time.perf_counter()
        logits = self._steps.read(unread, cache)
        if len(unread) == 1 and self._sampling.greedy:
            self._seconds = nearer(self._each(), time.perf_counter() - begin)
        own = logits[:, : self._size].float()
        own = nn.functional.pad(own, (0, self._size - own.shape[1]), value=-torch.inf)
        return own if self._excluded is None else own.masked_fill(self._excluded, -torch.inf)


class Ahead:
    """Guesses of what follows one text, and the logits that a pass has computed after each."""

    def __init__(self, lookup: Lookup | None, draft: Draft | None, times: PassTimes) -> None:
        """times: which both of them decide by, where they do by what was measured."""
        self._lookup, self._draft, self._times = lookup, draft, times
        self._held: deque[tuple[Guess, Tensor]] = deque()

    @classmethod
    def of(
        cls,
        model: Model,
        sampling: Sampling,
        generator: torch.Generator,
        excluded: Tensor | None,
        lookup: bool,
        draft: FastSteps | None,
    ) -> Ahead | None:
        """What guesses for a text; None where nothing does.

        Lookup goes by measured times, so with a draft it is for greedy text only.
        """
        times = PassTimes()
        looks = Lookup(times) if lookup and (draft is None or sampling.greedy) else None
        drafts = draft and Draft(draft, model, sampling, generator, excluded, times)
        return cls(looks, drafts, times) if looks or drafts else None

    @property
    def due(self) -> Guess | None:
        """The guess of the token that is chosen next; None where there is none."""
        return self._held[0][0] if self._held else None

    @property
    def proposed(self) -> int:
        """Tokens that the draft proposed so far."""
        return 0 if self._draft is None else self._draft.proposed

    def guesses(
        self, text: Sequence[int], most: int, seen: Tensor | None, cache: Cache
    ) -> list[Guess]:
        """At most `most` tokens that may follow, from the text itself or else from the draft."""
        found = [] if self._lookup is None else self._lookup.guess(text, most)
        if found or self._draft is None:
            return [Guess(token, "lookup") for token in found]
        return self._draft.guess(text, most, seen, cache)

    def hold(self, guesses: Sequence[Guess], logits: Tensor, seconds: float) -> Tensor:
        """After a pass of the text's last token and its guesses that took so many seconds.

        logits (1 + guesses, V) -> those (1, V) of the token itself; the others wait to be taken.
        """
        self._times.took(len(logits), seconds)
        self._held.extend(zip(guesses, logits.split(1)[1:], strict=True))
        return logits[:1]

    def take(self, token: int) -> Tensor | None:
        """The logits (1, V) after the text's newest token, where that is what had been guessed."""
        if not self._held:
            return None
        guess, logits = self._held.popleft()
        if guess.token == token:
            return logits
        self._held.clear()
        return None


def weight_bytes(model: Model) -> int:
    """Bytes of a model's weights."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def is_copy(model: Model, draft: Model) -> bool:
    """Whether a draft is the model in fewer bits: what is not quantised, the norms, is the same."""
    if model.config != draft.config or model.dtype != draft.dtype:
        return False
    own, kept = dict(model.named_parameters()), dict(draft.named_parameters())
    same = (name in own and torch.equal(own[name], weight) for name, weight in kept.items())
    return bool(kept) and all(same)


def check_same_tokens(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """ValueError where a draft's tokenizer has other tokens than the model's."""
    sizes = tokenizer.vocab_size, other.vocab_size
    found = next(
        (id for id in range(min(sizes)) if _token(tokenizer, id) != _token(other, id)), None
    )
    if found is not None:
        named = (
            f"token {found} is {_token(other, found)!r} there, {_token(tokenizer, found)!r} here"
        )
    elif sizes[0] != sizes[1]:
        named = f"it has {sizes[1]:,} tokens, the model's {sizes[0]:,}"
    else:
        return
    raise ValueError(f"the draft has another tokenizer ({named}): choose one with the same tokens")


def _token(tokenizer: Tokenizer, id: int) -> str | None:
    return None if id in tokenizer.unused_ids else tokenizer.token_string(id)
