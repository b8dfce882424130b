"""Token by token: prefill once, then decode with a KV cache; and the plain loop it must equal.

Prompts of different length stand in one batch, padded on the left so that all rows end together:

    row 0   ·  ·  ·  p  p  │ t  t  t        ·  padding, which no token sees
    row 1   p  p  p  p  p  │ t  t  t        p  prompt: one pass over all of it, the prefill (step 0)
                           │                t  a pass of one token per row (steps 1, 2, …)

A model's window is its context length. A row that outgrows it keeps its last tokens, as the loop of
"Build an LLM from scratch" does (``idx[:, -context:]``). Every token then stands at a new position,
so keys and values in the cache no longer hold: each further step runs the whole window again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pellucid import trace
from pellucid.generate.fast import FastSteps
from pellucid.generate.sample import NotFinite, Sampling, next_tokens, row_generators
from pellucid.models import Cache, Config, Model, RopeConfig
from pellucid.models.finite import why_not_finite

MAX_NEW_TOKENS = 128  # the default number
_FILL = 0  # stands for padding and for rows that have finished; nothing looks at it


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


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations on this thread alone.

    To choose a token is little work, and the threads that OpenMP would wake for it go on spinning
    for milliseconds afterwards: on the very cores that the next step of the C decoder needs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class KeptCache:
    """The KV cache of one row, kept from one generation to the next of the same model.

    A prompt that begins like the tokens it holds is run only from where they part. Each turn of a
    chat repeats the whole conversation: with this it costs only what is new.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Empty the cache."""
        self._cache: Cache | None = None
        self._tokens: Sequence[int] = ()  # the first `_length` of them are in the cache
        self._length = 0

    def begin(self, prompt: Sequence[int], n_layers: int) -> Cache:
        """The cache, cropped to what `prompt` shares with it; its last token is left to run."""
        shared, most = 0, min(self._length, len(prompt) - 1)
        while shared < most and self._tokens[shared] == prompt[shared]:
            shared += 1
        if self._cache is None or shared == 0:
            return Cache(n_layers)
        self._length = shared
        self._cache.crop(shared)
        return self._cache

    def hold(self, cache: Cache, tokens: Sequence[int]) -> None:
        """`cache` holds the first of `tokens`; called once a whole pass has ended."""
        self._cache, self._tokens, self._length = cache, tokens, cache.length


class Generation(Iterator[list[int | None]]):
    """Rows of tokens being continued; `generate_tokens` makes one.

    Iterating gives, per step, one token for each row, and None for rows that have finished.
    `logits` (rows of the last step, V) are the model's own, before sampling changes them; `cached`
    is how many places of the cache the last step read instead of computing them.
    """

    logits: Tensor
    cached = 0

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
        kept: KeptCache | None,
        fast: bool | None,
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
        self._fast = FastSteps(model, min(longest, self._window), fast)
        self._align()
        if kept is not None:
            self._cache = kept.begin(rows[0], model.config.n_layers)

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
        generators = [self._generators[row] for row in self._live]
        seen = None if self._seen is None else self._seen[self._live]
        with one_thread():
            try:
                chosen = next_tokens(logits, self._sampling, generators, seen)
            except NotFinite:
                why = why_not_finite(self._model)
                raise ValueError(f"the logits are not numbers (NaN, or infinite): {why}") from None
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

    def _forward(self) -> Tensor:
        """Run what the cache does not hold yet; logits of each row's next token, (B, V)."""
        if self._overflows() or self._stale():
            self._align()
        held, first = self._cache.length, self._live[0]
        self.cached = held
        columns = self._padding[first] + min(len(self._rows[first]), self._window)
        feed = [[_FILL] * (columns - held) for _ in self._rows]
        for row in self._live:
            padding, tokens = self._padding[row], self._rows[row]
            start = max(len(tokens) - self._window, held - padding, 0)
            feed[row] = [_FILL] * max(padding - held, 0) + tokens[start:]
        logits = self._fast.step(feed, self._cache, self._padding)
        if logits is not None:
            self._keep()
            return logits
        # Only a trace that asks for gradients leaves them on; it has then been opened around us.
        with torch.set_grad_enabled(torch.is_grad_enabled() and trace.is_open()):
            logits = self._model(
                torch.tensor(feed, device=self._device),  # (B, T)
                cache=self._cache,
                starts=self._starts,
                last=True,
            )
        self._keep()
        return logits.detach()[:, -1]

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

    def _keep(self) -> None:
        if self._kept is None:
            return
        if self._longer_than_trained() or self._overflows():
            self._kept.forget()
        else:
            self._kept.hold(self._cache, self._rows[0])

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
        self._cache = Cache(self._model.config.n_layers)


def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    seed: int | Sequence[int] | None = None,
    slide: bool = False,
    kept: KeptCache | None = None,
    vocab_size: int | None = None,
    unused_ids: Collection[int] = (),
    fast: bool | None = None,
) -> Generation:
    """Continue each prompt: an iterator of one token per row and step, None for finished rows.

    A row's tokens do not depend on its neighbours: padding is invisible and each row draws from a
    generator of its own. A trace opened around the iteration sees every pass: the prefill is step
    0, the i-th pass after it is step i.

    model           in eval mode
    max_new_tokens  None: until a stop token, or until prompt and text fill the context
    stop_ids        a row ends with the first of these, which is the last token given for it
    seed            one for all rows (row i then has ``row_seed(seed, i)``) or one for each
    slide           let a Llama go on past its context over the last tokens, as GPT-2 always does
    kept            the cache of a row to begin from and to leave for the next generation
    vocab_size      never choose ids from here on (embeddings are often padded beyond the tokenizer)
    unused_ids      never choose these either (gaps inside a vocabulary)
    fast            decode in C: None wherever it can and as soon as it is compiled, True or an
                    error, False never. The logits are the same up to rounding

    Raises ValueError, at once: an empty prompt, an id outside the vocabulary, a Llama whose prompt
    and new tokens exceed its context without `slide`, a model in training mode, `fast` where that
    cannot be.
    """
    _check_prompts(prompts, model.config.vocab_size)
    if model.training:
        raise ValueError("the model is in training mode (dropout acts): call model.eval()")
    if kept is not None and len(prompts) != 1:
        raise ValueError(f"{len(prompts)} prompts: a kept cache belongs to exactly one")
    crops = slide or model.config.rope is None
    return Generation(
        model,
        [list(prompt) for prompt in prompts],
        room=_room(prompts, max_new_tokens, context_limit(model.config), crops),
        sampling=sampling,
        generators=row_generators(seed, len(prompts)),
        stop_ids=frozenset(stop_ids),
        excluded=_excluded(model, vocab_size, unused_ids),
        kept=kept,
        fast=fast,
    )


def _excluded(model: Model, vocab_size: int | None, unused_ids: Collection[int]) -> Tensor | None:
    """(V) bool: ids of the model that no token of the tokenizer has; None where it has them all."""
    size = model.config.vocab_size
    last = size if vocab_size is None else vocab_size
    inside = [id for id in unused_ids if 0 <= id < size]
    if last >= size and not inside:
        return None
    excluded = torch.arange(size) >= last
    excluded[inside] = True
    return excluded.to(next(model.parameters()).device)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
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


def _room(
    prompts: Sequence[Sequence[int]], max_new_tokens: int | None, window: int, crops: bool
) -> list[int]:
    """New tokens each row may get; ValueError where that is more than the context holds."""
    if max_new_tokens is not None and not isinstance(max_new_tokens, int):
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}: expected a whole number")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected 0 or more")
    for row, prompt in enumerate(prompts):
        wanted = 1 if max_new_tokens is None else max_new_tokens
        if len(prompt) + wanted <= window or (crops and max_new_tokens is not None):
            continue
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
    if max_new_tokens is None:
        return [window - len(prompt) for prompt in prompts]
    return [max_new_tokens] * len(prompts)
