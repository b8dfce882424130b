"""From tokens to text that can be shown as it comes: whole characters, and stop strings.

A stop string may begin in one token and end in another. So text that could still become one is held
back, and let go as soon as it no longer can.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pellucid.generate.engine import Generation
from pellucid.generate.prefixes import KeptCache
from pellucid.generate.sample import Sampling
from pellucid.generate.together import AT_ONCE, JoinedRows, generate_rows
from pellucid.models import Model
from pellucid.tokenizers import Tokenizer


class StopStrings:
    """Finds the first of several strings in text that arrives in pieces.

    First is the one that is complete first; of those that end together, the longest. What comes out
    does not depend on how the text is cut into pieces.
    """

    def __init__(self, strings: str | Collection[str] | None) -> None:
        """`strings`: several, one, or None for none. ValueError for an empty one or no text."""
        if not isinstance(strings, Iterable | None):
            raise ValueError(f"stop is {strings!r}: expected a text or a list of texts")
        strings = [strings] if isinstance(strings, str) else list(strings or ())
        for stop in strings:
            if not isinstance(stop, str):
                raise ValueError(f"the stop string {stop!r} is no text: expected a list of texts")
        if "" in strings:
            raise ValueError("a stop string is empty: it would stop before the first character")
        self._strings = sorted(strings, key=len, reverse=True)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain now: before a stop string, and not the beginning of one."""
        if self.found is not None:
            return ""
        held = self._held + text
        ends = [
            (place + len(stop), stop) for stop in self._strings if (place := held.find(stop)) >= 0
        ]
        if ends:
            end, self.found = min(ends, key=lambda found: found[0])
            self._held = ""
            return held[: end - len(self.found)]
        waiting = max((overlap(held, stop) for stop in self._strings), default=0)
        self._held = held[len(held) - waiting :]
        return held[: len(held) - waiting]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, all of `stop` excepted."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(kw_only=True)
class Completion:
    """What became of one prompt.

    prompt         token ids given
    tokens         token ids written, a stop token included
    text           their text, without the stop token and from a stop string on
    finish_reason  "stop": a stop token or string; "length": max_new_tokens or the context's end;
                   None: not finished
    guessed        place in `tokens` -> "draft" or "lookup", of those whose pass was taken ahead
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    guessed: dict[int, str] = field(default_factory=dict)
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None


class TextStream(Iterator[list[str]]):
    """Text of several rows as it is written; `stream_text` makes one.

    Iterating gives, per step, one piece for each row, often "". `completions` holds, at any time,
    what is there so far.
    """

    def __init__(
        self,
        generation: Generation | JoinedRows,
        completions: list[Completion],
        tokenizer: Tokenizer,
        *,
        stop: str | Collection[str] | None,
        stop_ids: frozenset[int],
    ) -> None:
        self.completions = completions
        self._generation, self._stop_ids = generation, stop_ids
        self._stops = [StopStrings(stop) for _ in completions]
        self._decoders = [
            tokenizer.stream(after=_text_part(tokenizer, completion.prompt))
            for completion in completions
        ]
        for row, completion in enumerate(completions):
            if not generation.is_live(row):
                completion.finish_reason = "length"

    @property
    def proposed(self) -> int:
        """Tokens that the draft proposed so far."""
        return self._generation.proposed

    def complete(self) -> list[Completion]:
        """Write to the end; one completion per prompt."""
        for _ in self:
            pass
        return self.completions

    def __next__(self) -> list[str]:
        step = enumerate(next(self._generation))
        return ["" if token is None else self._piece(row, token) for row, token in step]

    def _piece(self, row: int, token: int) -> str:
        completion, stops, decoder = self.completions[row], self._stops[row], self._decoders[row]
        if self._generation.guessed_by is not None:
            completion.guessed[len(completion.tokens)] = self._generation.guessed_by
        completion.tokens.append(token)
        stopped = token in self._stop_ids
        piece = "" if stopped else stops.push(decoder.push(token))
        if not self._generation.is_live(row):  # nothing follows: let go what was held back
            piece += stops.push(decoder.flush()) + stops.flush()
            completion.finish_reason = "stop" if stopped else "length"
        if stops.found is not None:
            self._generation.finish(row)
            completion.finish_reason = "stop"
        completion.text += piece
        return piece


def stream_text(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int | Sequence[int] | None = None,
    stop: str | Collection[str] | None = (),
    stop_ids: Collection[int] | None = None,
    seed: int | Sequence[int] | None = None,
    slide: bool = False,
    kept: KeptCache | None = None,
    fast: bool | None = None,
    draft: Model | None = None,
    at_once: int = AT_ONCE,
) -> TextStream:
    """Continue prompts of token ids: an iterator of one piece of text per row and step.

    A piece never holds half a character. A row ends before the first of the `stop` strings (one,
    several or None), wherever tokens cut it; `stop_ids` None takes the tokenizer's. Special tokens
    show by name, except the one that stops. The rest is as for `generate_rows`, and so are the
    errors.
    """
    ids = tokenizer.stop_ids if stop_ids is None else frozenset(stop_ids)
    generation = generate_rows(
        model,
        prompts,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=ids,
        seed=seed,
        slide=slide,
        kept=kept,
        vocab_size=tokenizer.vocab_size,
        unused_ids=tokenizer.unused_ids,
        fast=fast,
        draft=draft,
        at_once=at_once,
    )
    completions = [Completion(prompt=list(prompt)) for prompt in prompts]
    return TextStream(generation, completions, tokenizer, stop=stop, stop_ids=ids)


def encode_prompt(
    tokenizer: Tokenizer, text: str, *, bos: bool | None = None, specials: bool = False
) -> list[int]:
    """Token ids of a prompt, begun as the model expects it.

    bos       None: where the tokenizer's models are used to it (Llama yes, GPT-2 no), and before an
              empty text where there is a bos token at all, since a model cannot begin from nothing
    specials  read text that spells a special token as that token; where it begins with the bos
              token it gets no second one
    """
    if bos is None:
        bos = tokenizer.adds_bos or (text == "" and tokenizer.bos_id is not None)
    if bos and specials:
        ids = tokenizer.encode(text, specials=True)
        if ids and ids[0] == tokenizer.bos_id:
            return ids
    return tokenizer.encode(text, bos=bos, specials=specials)


def _text_part(tokenizer: Tokenizer, prompt: Sequence[int]) -> Sequence[int]:
    """The prompt without its bos token: for the decoder, text still begins after it."""
    return prompt[1:] if prompt and prompt[0] == tokenizer.bos_id else prompt
