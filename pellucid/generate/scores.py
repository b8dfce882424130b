"""How likely a text's own tokens are, read in the passes that generations share.

A score depends on its text alone: no padding is run, no pass is cut where others stand, and a row
of a product keeps its place. So it is the same number in a server, in a batch and by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid import trace
from pellucid.generate import native
from pellucid.generate.fast import FastSteps
from pellucid.generate.prefixes import PIECE, PrefixStore
from pellucid.models import Cache, Model
from pellucid.models.finite import why_not_finite

ROWS = 32  # of a product with the head


@dataclass(frozen=True)
class Scored:
    """A token with ln p in nats, given what stands before it, and the likeliest of its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def score_logits(logits: Tensor, ids: Sequence[int], top: int) -> list[Scored]:
    """logits (N, V), at least float32, and the token of each -> ln p, with the `top` likeliest.

    The first of equally likely tokens comes first, as in argmax.
    """
    ids_there = torch.tensor(ids, device=logits.device)
    losses = F.cross_entropy(logits, ids_there, reduction="none")
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


class TextScores:
    """Scores of one text's tokens; `Together.score` makes one, whose steps it shares.

    What is read of the text, its last token is not, goes through C where a prompt of that length
    does, else through the model in pieces that end at multiples of PIECE tokens.
    """

    proposed = guessed = 0  # as a generation's: nothing is guessed

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        first: int,
        top: int,
        steps: FastSteps,
        kept: PrefixStore,
    ) -> None:
        """ids[first:] are scored; ValueError unless something stands before the first of them."""
        if not 1 <= first <= len(ids):
            raise ValueError(f"a score of token {first} of {len(ids)}: expected one with a context")
        self._model, self._ids, self._first, self._top = model, list(ids), first, top
        self._steps, self._kept = steps, kept
        ropes = (model.config.rope, model.config.second_rope)
        self._in_pieces = not any(rope is not None and rope.follows_length for rope in ropes)
        self._cache: Cache | None = None
        self._exact = 0  # as in `engine.Generation`
        self._scores: list[Scored] = []
        self._failure: Exception | None = None

    @property
    def scores(self) -> list[Scored]:
        """One for each token of ids[first:]; raises what went wrong."""
        if self._failure is not None:
            raise self._failure
        return self._scores

    @property
    def ready(self) -> bool:
        """Whether all scores are there, or something went wrong."""
        return self._failure is not None or len(self._scores) == len(self._ids) - self._first

    @property
    def unread(self) -> int:
        """Tokens that are still to be read."""
        return len(self._ids) - 1 - (self._cache.length if self._cache else 0)

    def took_guess(self) -> bool:
        """Nothing is guessed."""
        return False

    def next_token(self) -> None:
        """Nothing is written."""

    def next_chunk(self, most: int) -> tuple[list[int], Cache] | None:
        """At most so many next tokens where C reads them, and the cache of those before."""
        cache = self._begun()
        if self.ready or not self._in_pieces or not self._steps.reads(self.unread, cache):
            return None
        return self._ids[cache.length : -1][:most], cache

    def wanted(self, tokens: int) -> int:
        """Of how many of the last of so many next tokens logits are wanted; one at least."""
        end = self._begun().length + tokens
        return min(tokens, max(1, end + 1 - self._first))

    def take(self, logits: Tensor, tokens: int) -> None:
        """The logits (N, V) of the last of so many tokens, which C has read."""
        self._count_exact(tokens, own=True, by_c=True)
        self._score(logits, self._begun().length + 1 - len(logits))

    def advance(self) -> None:
        """One pass."""
        chunk = self.next_chunk(native.MOST)
        if chunk is not None:
            tokens, cache = chunk
            found = self._steps.step_each([tokens], [cache], [self.wanted(len(tokens))])
            if found is not None:
                self.take(found[0], len(tokens))
                return
        cache = self._begun()
        held, end = cache.length, len(self._ids) - 1
        pieces = self._in_pieces and not trace.is_open()
        if pieces:
            end = min(end, (held // PIECE + 1) * PIECE)
        with torch.no_grad():
            tokens = torch.tensor([self._ids[held:end]], device=self._model.device)
            hidden = self._model.hidden(tokens, cache=cache)[0]
            self._count_exact(end - held, own=pieces and end - held == PIECE, by_c=False)
            place = max(held, self._first - 1)
            while place < end:
                stop = min(end, (place // ROWS + 1) * ROWS)
                self._score(self._logits(hidden[place - held : stop - held], place), place + 1)
                place = stop

    def fail(self, error: Exception) -> None:
        """End with `error`."""
        self._failure = error

    def _begun(self) -> Cache:
        """The cache, at first with what is known of the text before the first score."""
        if self._cache is None:
            known = self._ids[: self._first] if self._in_pieces else []
            self._cache, _ = self._kept.begin(known, self._model, whole=False)
            self._exact = self._cache.length
        return self._cache

    def _count_exact(self, tokens: int, *, own: bool, by_c: bool) -> None:
        """After a pass over so many tokens: would any other text compute these bits?"""
        end = self._begun().length
        if self._exact == end - tokens and own and by_c == self._steps.reads_prompts:
            self._exact = end

    def _logits(self, hidden: Tensor, place: int) -> Tensor:
        """Logits of hidden (N, C), which begins at `place` of the text.

        A matrix product rounds by its shape, and by where in it a row stands: all are of the same
        shape, and each row stands where it would if the whole text were asked for.
        """
        before = place % ROWS
        filled = F.pad(hidden, (0, 0, before, ROWS - before - len(hidden)))
        return self._model.logits(filled[None])[0, before : before + len(hidden)]

    def _score(self, logits: Tensor, first: int) -> None:
        """Take logits (N, V) of tokens from ids[first] on; those that are not wanted are left."""
        done = self._first + len(self._scores)
        logits = logits[max(0, done - first) :]
        if len(logits):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            some = score_logits(wide, self._ids[done : done + len(wide)], self._top)
            if not all(abs(one.logprob) < float("inf") for one in some):
                why = why_not_finite(self._model)
                self.fail(ValueError(f"the loss is not a number (NaN, or infinite): {why}"))
            self._scores += some
        if self.unread == 0 and self._in_pieces:
            self._kept.hold(self._begun(), self._ids[:-1], self._exact)
