"""Token by token: prefill once, then decode with a KV cache; plain.py is what it must equal.

Prompts of different length stand in one batch, padded on the left so that all rows end together:

    row 0   ·  ·  ·  p  p  │ t  t  t        ·  padding, which no token sees
    row 1   p  p  p  p  p  │ t  t  t        p  prompt: one pass over all of it, the prefill (step 0)
                           │                t  a pass of one token per row (steps 1, 2, …)

A model's window is its context length. A row that outgrows it keeps its last tokens, as the loop of
"Build an LLM from scratch" does (``idx[:, -context:]``). Every token then stands at a new position,
so keys and values in the cache no longer hold: each further step runs the whole window again.

A row of its own reads a long prompt in passes that end at multiples of PIECE tokens. A server gives
others their steps between two of them. What a piece computes depends on nothing after it, so that
prompts that begin alike share it bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from pellucid import trace
from pellucid.generate.draft import Ahead, draft_steps
from pellucid.generate.fast import FastSteps
from pellucid.generate.limits import check_lengths, context_limit, excluded_ids
from pellucid.generate.prefixes import PIECE, KeptCache, PrefixStore
from pellucid.generate.sample import (
    NotFinite,
    Sampling,
    accept_or_draw,
    next_tokens,
    one_thread,
    row_generators,
)
from pellucid.models import Cache, Model, RopeConfig
from pellucid.models.finite import why_not_finite

_FILL = 0  # stands for padding and for rows that have finished; nothing looks at it


class Generation(Iterator[list[int | None]]):
    """Rows of tokens being continued; `generate_tokens` makes one.

    Iterating gives, per step, one token for each row, and None for rows that have finished.
    `logits` (rows of the last step, V) are the model's own, before sampling changes them; `cached`
    is how many places of the cache the last step read instead of computing them. `guessed_by` is
    "draft" or "lookup" where the last step's token had been guessed and its pass taken ahead;
    `guessed` how many such tokens there were, `proposed` how many a draft proposed.
    """

    logits: Tensor
    cached = 0
    guessed = 0
    guessed_by: str | None = None

    def __init__(
        self,
        model: Model,
        rows: list[list[int]],
        *,
        room: list[int],
        sampling: Sampling,
        generators: list[torch.Generator],
        stop_ids: frozenset[int],
        excluded: Tensor | None,
        kept: KeptCache | PrefixStore | None,
        fast: bool | FastSteps | None,
        lookup: bool = True,
        draft: FastSteps | None = None,
    ) -> None:
        """`rows` are the prompts, and grow; `room` is the number of tokens each may still get;
        excluded (V) bool: ids that are never chosen."""
        self._model, self._sampling, self._generators = model, sampling, generators
        self._stop_ids, self._excluded, self._kept = stop_ids, excluded, kept
        self._rows, self._room = rows, room
        self._live = [row for row, left in enumerate(room) if left > 0]
        self._window = context_limit(model.config)
        self._device = model.device
        self._seen = self._first_seen() if sampling.repetition_penalty != 1 else None
        self._step = 0
        longest = max((len(row) + left for row, left in zip(rows, room, strict=True)), default=0)
        self._fast = (
            fast
            if isinstance(fast, FastSteps)
            else FastSteps(model, min(longest, self._window), fast)
        )
        self._align()
        self._begun, self._prompt = kept is None, len(rows[0])
        self._reading = False  # between two pieces of a prompt
        self._exact = 0  # leading places of the cache that are the bits any other would compute
        self._ready: Tensor | None = None  # logits (B, V) of a step that is not taken yet
        self._failure: Exception | None = None
        self._ahead: Ahead | None = None
        if len(rows) == 1 and not self._ropes_by_length():
            self._ahead = Ahead.of(model, sampling, generators[0], excluded, lookup, draft)

    def is_live(self, row: int) -> bool:
        """Whether `row` gets another token in the next step."""
        return row in self._live

    def finish(self, row: int) -> None:
        """End a row; it gets no further tokens."""
        if row in self._live:
            self._live.remove(row)

    def __next__(self) -> list[int | None]:
        if not self._live:
            raise StopIteration
        trace.set_step(self._step)
        self._step += 1
        logits = self._forward()
        if len(self._live) < len(logits):
            logits = logits[self._live]  # (live rows, V)
        self.logits = logits
        if self._excluded is not None:
            logits = logits.masked_fill(self._excluded, -torch.inf)
        with one_thread():
            try:
                chosen = self._chosen(logits)
            except NotFinite:
                why = why_not_finite(self._model)
                raise ValueError(f"the logits are not numbers (NaN, or infinite): {why}") from None
        guess = self._ahead.due if self._ahead else None
        self.guessed_by = guess.source if guess and guess.token == chosen[0] else None
        new: list[int | None] = [None] * len(self._rows)
        for row, token in zip(tuple(self._live), chosen, strict=True):
            new[row] = token
            self._rows[row].append(token)
            self._room[row] -= 1
            if self._seen is not None:
                self._seen[row, token] = True
            if token in self._stop_ids or self._room[row] == 0:
                self._live.remove(row)
        return new

    def _chosen(self, logits: Tensor) -> list[int]:
        """The next token of each live row from its logits (live rows, V)."""
        generators = [self._generators[row] for row in self._live]
        seen = None if self._seen is None else self._seen[self._live]
        guess = self._ahead.due if self._ahead else None
        if guess is None or guess.probabilities is None:
            return next_tokens(logits, self._sampling, generators, seen)
        drafted = guess.token, guess.probabilities
        return [accept_or_draw(logits, self._sampling, generators[0], seen, *drafted)]

    @property
    def proposed(self) -> int:
        """Tokens that the draft proposed so far."""
        return 0 if self._ahead is None else self._ahead.proposed

    @property
    def ready(self) -> bool:
        """Whether the next step has been computed and only chooses its tokens."""
        return self._ready is not None or self._failure is not None

    @property
    def unread(self) -> int:
        """Tokens of a single row that the cache does not hold."""
        return len(self._rows[0]) - self._cache.length

    def advance(self) -> None:
        """One pass nearer to the next step; several where a long prompt has yet to be read."""
        if self.ready:
            return
        self._begin()
        if self._ready is not None:
            return
        if self.took_guess() or self._ran_ahead():
            return
        if not self._reading:
            if self._overflows() or self._stale():
                self._align()
                self._exact = 0
            self.cached = self._cache.length
        first = self._live[0]
        columns = self._padding[first] + min(len(self._rows[first]), self._window)
        end = (self._cache.length // PIECE + 1) * PIECE if self._in_pieces() else columns
        self._reading = end < columns
        logits = self._pass(min(end, columns))
        if not self._reading:
            self._give(logits)

    def _begin(self) -> None:
        """Take over what a kept cache has of the prompt, before its first pass."""
        if self._begun:
            return
        assert self._kept is not None, "only a kept cache is begun from"
        self._cache, self._ready = self._kept.begin(self._rows[0], self._model)
        held = self.cached = self._cache.length
        self._begun = True
        self._exact = held if self._fast.reads_prompts else held - held % PIECE

    def took_guess(self) -> bool:
        """Whether the latest token had been guessed; the step is ready then."""
        logits = None if self._ahead is None else self._ahead.take(self._rows[0][-1])
        if logits is None:
            return False
        self.guessed += 1
        self._cache.uncrop(len(self._rows[0]))
        self.take(logits)
        return True

    def _ran_ahead(self) -> bool:
        """Whether a pass could take the latest token, and guesses of what follows it."""
        due = None if self._ahead is None else self.next_token()
        if due is None or self._ahead is None or not self._fast.joins(self._cache):
            return False
        row = self._rows[0]
        most = min(self._room[0] - 1, self._window - len(row))
        guesses = self._ahead.guesses(row, most, self._seen, self._cache)
        found = self._fast.step_ahead([due[0], *(guess.token for guess in guesses)], self._cache)
        if found is None:
            return False
        self._cache.crop(len(row))
        self.take(self._ahead.hold(guesses, *found))
        return True

    def fail(self, error: Exception) -> None:
        """End with `error`, which the next step raises."""
        self._failure = error

    def next_token(self) -> tuple[int, Cache] | None:
        """A row's latest token and the cache of those before it, if its next pass is that token's.

        The code that computes it, which makes the cache a token longer, gives the logits to `take`.
        """
        if not self._begun or self._reading or self.ready or len(self._rows) > 1 or not self._live:
            return None
        held = len(self._rows[0]) - 1
        if self._cache.length != held or held == 0 or self._overflows() or self._stale():
            return None
        return self._rows[0][-1], self._cache

    def next_chunk(self, most: int) -> tuple[list[int], Cache] | None:
        """At most so many next tokens of a row's prompt, where C reads it, and the cache before.

        The code that computes them, which makes the cache longer, gives the logits after the last
        to `take`.
        """
        if self.ready or len(self._rows) > 1 or not self._live or self._ropes_by_length():
            return None
        self._begin()
        row, held = self._rows[0], self._cache.length
        if self.ready or self._overflows() or not self._fast.reads(len(row) - held, self._cache):
            return None
        return row[held : held + most], self._cache

    def wanted(self, tokens: int) -> int:
        """Of how many of the last of so many tokens logits are wanted."""
        return 1

    def take(self, logits: Tensor, tokens: int = 1) -> None:
        """The logits (1, V) after `next_token`, or so many of a chunk, computed elsewhere."""
        before = self._cache.length - tokens
        if not self._reading:
            self.cached = before
        self._count_exact(before, by_c=True)
        self._reading = self._cache.length < len(self._rows[0])
        if not self._reading:
            self._give(logits)

    def _give(self, logits: Tensor) -> None:
        self._ready = logits
        if self._kept is None:
            return
        if self._longer_than_trained() or self._overflows():
            self._kept.forget()
        else:
            of_prompt = logits if len(self._rows[0]) == self._prompt else None
            self._kept.hold(self._cache, self._rows[0], self._exact, of_prompt)

    def _forward(self) -> Tensor:
        """Run what the cache does not hold yet; logits of each row's next token, (B, V)."""
        while not self.ready:
            self.advance()
        if self._failure is not None:
            raise self._failure
        logits, self._ready = self._ready, None
        assert logits is not None, "a step that is ready has logits"
        return logits

    def _in_pieces(self) -> bool:
        """Whether what is left of the prompt may be read in several passes.

        Not while a trace is open, which names passes by their step, and not where the angles of
        RoPE follow the length of the whole text.
        """
        alone = len(self._rows) == 1 and not self._overflows()
        return alone and not trace.is_open() and not self._ropes_by_length()

    def _pass(self, columns: int) -> Tensor:
        """Run the cache's places up to `columns`; logits of the last one's next token, (B, V)."""
        held = self._cache.length
        feed = [[_FILL] * (columns - held) for _ in self._rows]
        for row in self._live:
            padding, tokens = self._padding[row], self._rows[row]
            start = max(len(tokens) - self._window, held - padding, 0)
            feed[row] = [_FILL] * max(padding - held, 0) + tokens[start:]
            feed[row] = feed[row][: columns - held]
        logits = self._fast.step(feed, self._cache, self._padding)
        by_c = logits is not None
        if logits is None:
            # Only a trace that asks for gradients leaves them on; it was opened around us then.
            with torch.set_grad_enabled(torch.is_grad_enabled() and trace.is_open()):
                logits = self._model(
                    torch.tensor(feed, device=self._device),  # (B, T)
                    cache=self._cache,
                    starts=self._starts,
                    last=True,
                )
            logits = logits.detach()[:, -1]
        self._count_exact(held, by_c=by_c)
        return logits

    def _count_exact(self, held: int, *, by_c: bool) -> None:
        """After a pass over places from `held` on: would any other compute these bits?

        In C a token's bits are its own. PyTorch's are those of a whole piece.
        """
        end = self._cache.length
        whole = end - held == PIECE and held % PIECE == 0 and not self._ropes_by_length()
        own = by_c if self._fast.reads_prompts else whole and not by_c
        if self._exact == held and own:
            self._exact = end

    def _overflows(self) -> bool:
        """Whether this pass ends outside the window. All live rows end in the same column."""
        row = self._live[0]
        return self._padding[row] + len(self._rows[row]) > self._window

    def _stale(self) -> bool:
        """Whether this pass turns all tokens by other frequencies than those in the cache.

        Dynamic RoPE does so at every step beyond the original context, longrope at the first.
        """
        return any(self._is_stale(rope) for rope in self._ropes_by_length())

    def _is_stale(self, rope: RopeConfig) -> bool:
        held, original = self._cache.length, rope.original_context or 1
        if rope.type == "dynamic":
            return max(len(self._rows[row]) for row in self._live) > original
        return any(
            held - self._padding[row] <= original < len(self._rows[row]) for row in self._live
        )

    def _longer_than_trained(self) -> bool:
        """Whether some row is turned by frequencies that follow its length."""
        longest = max(len(self._rows[row]) for row in self._live)
        return any(longest > (rope.original_context or 1) for rope in self._ropes_by_length())

    def _ropes_by_length(self) -> list[RopeConfig]:
        """The model's RoPEs whose frequencies follow the length of the text."""
        config = self._model.config
        ropes = (config.rope, config.second_rope)
        return [rope for rope in ropes if rope is not None and rope.follows_length]

    def _first_seen(self) -> Tensor:
        """(B, V) bool: the tokens of each row's prompt."""
        seen = torch.zeros(len(self._rows), self._model.config.vocab_size, dtype=torch.bool)
        for row, tokens in enumerate(self._rows):
            seen[row, tokens] = True
        return seen.to(self._device)

    def _align(self) -> None:
        """Begin with an empty cache: each live row's window, with as little padding as can be."""
        lengths = [
            min(len(tokens), self._window) if row in self._live else 1
            for row, tokens in enumerate(self._rows)
        ]
        self._padding = [max(lengths, default=1) - length for length in lengths]
        self._starts = (
            torch.tensor(self._padding, device=self._device) if any(self._padding) else None
        )
        layers = self._model.config.n_layers
        self._cache = Cache(layers) if self._kept is None else self._kept.empty(self._model)


def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int | Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
    seed: int | Sequence[int] | None = None,
    slide: bool = False,
    kept: KeptCache | PrefixStore | None = None,
    vocab_size: int | None = None,
    unused_ids: Collection[int] = (),
    fast: bool | FastSteps | None = None,
    lookup: bool = True,
    draft: Model | FastSteps | None = None,
) -> Generation:
    """Continue each prompt: an iterator of one token per row and step, None for finished rows.

    A row's tokens do not depend on its neighbours: padding is invisible and each row draws from a
    generator of its own. A trace opened around the iteration sees every pass: the prefill is step
    0, the i-th pass after it is step i.

    max_new_tokens  None: until a stop token, or until prompt and text fill the context; or one each
    stop_ids        a row ends with the first of these, which is the last token given for it
    seed            one for all rows (row i then has ``row_seed(seed, i)``) or one for each
    slide           let a Llama go on past its context over the last tokens, as GPT-2 always does
    kept            the cache of a row to begin from and to leave for the next generation
    vocab_size      never choose ids from here on (embeddings are often padded beyond the tokenizer)
    unused_ids      never choose these either (gaps inside a vocabulary)
    fast            decode in C: None wherever it can and as soon as it is compiled, True or an
                    error, False never. The logits are the same up to rounding. Or shared steps
    lookup          let a single row that C decodes guess from its own text where that is quicker
    draft           a smaller model with the same tokens that runs ahead of a single row where that
                    pays; greedy tokens are the same, drawn ones as likely (`draft.py`)

    Raises ValueError, at once: an empty prompt, an id outside the vocabulary, a Llama whose prompt
    and new tokens exceed its context without `slide`, a model in training mode, `fast` or `draft`
    where that cannot be.
    """
    room = check_lengths(prompts, max_new_tokens, model.config, slide=slide)
    if model.training:
        raise ValueError("the model is in training mode (dropout acts): call model.eval()")
    if kept is not None and len(prompts) != 1:
        raise ValueError(f"{len(prompts)} prompts: a kept cache belongs to exactly one")
    if draft is not None:
        fast, draft = draft_steps(model, draft, fast)
    return Generation(
        model,
        [list(prompt) for prompt in prompts],
        room=room,
        sampling=sampling,
        generators=row_generators(seed, len(prompts)),
        stop_ids=frozenset(stop_ids),
        excluded=excluded_ids(model, vocab_size, unused_ids),
        kept=kept,
        fast=fast,
        lookup=lookup,
        draft=draft,
    )
