"""A conversation with a model: its messages, and a KV cache that lives as long as they do."""

from __future__ import annotations

from collections.abc import Collection, Generator

from pellucid.generate.limits import context_limit
from pellucid.generate.prefixes import KeptCache
from pellucid.generate.sample import Sampling, row_seed
from pellucid.generate.text import stream_text
from pellucid.models import Model
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.chat import as_written


class Conversation:
    """Questions and answers in the format of the model's tokenizer.

    Every turn writes the whole conversation as tokens again. Only those that the cache does not
    hold yet are run, so that a turn costs what is new in it; the answers stay the same.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, system: str | None = None, *, reuse: bool = True
    ) -> None:
        """`system`: how the model should behave, a message before all others. `reuse`: the cache.

        Raises ValueError for a tokenizer that knows no chat format.
        """
        if tokenizer.chat is None:
            raise ValueError(
                "this model's tokenizer has no chat format (it was not trained on conversations): "
                "use `pellucid generate` to let it continue a text"
            )
        self._model, self._tokenizer, self._format = model, tokenizer, tokenizer.chat
        self._kept = KeptCache() if reuse else None
        self.system = system
        self.turns: list[dict[str, str]] = []
        self._lost = 0  # forgotten so far
        self.forgotten = 0  # questions, with their answers, that the latest one took the room of
        self.cut = ""  # why the latest answer ends early, unless so many tokens were asked for

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as the chat format takes it, the system message first."""
        return self._with_system(self.turns)

    def _with_system(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *turns]

    def reset(self) -> None:
        """Forget all questions and answers; the system message stays."""
        self.turns.clear()
        self._lost = 0

    def answer(
        self,
        question: str,
        *,
        sampling: Sampling,
        max_new_tokens: int | None = None,
        stop: str | Collection[str] | None = (),
        seed: int | None = None,
        slide: bool = False,
        fast: bool | None = None,
    ) -> Generator[str, None, None]:
        """Ask, and yield the answer in pieces; both are then part of the conversation.

        So is an answer that is broken off, by closing the iterator or by Ctrl-C, as far as it
        came. A question that cannot be asked raises ValueError and is not kept. Each turn mixes
        its number into `seed`.

        Where the context is too full for an answer, the oldest questions and answers are left out
        (`forgotten` counts them), unless `slide` lets the model go on past it.
        """
        asked = {"role": "user", "content": question}
        turns, self.turns, self.cut = self.turns, [*self.turns, asked], ""
        limit = context_limit(self._model.config)
        try:
            self.forgotten = 0 if slide else self._make_room(limit, max_new_tokens)
            self._lost += self.forgotten
            prompt = self._format.encode(self.messages)
            if not slide and self._model.config.rope is not None:
                max_new_tokens = _fitting(len(prompt), max_new_tokens, limit)
            stream = stream_text(
                self._model,
                self._tokenizer,
                [prompt],
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                stop=stop,
                seed=None if seed is None else row_seed(seed, self._lost + len(self.turns) // 2),
                slide=slide,
                kept=self._kept,
                fast=fast,
            )
        except BaseException:
            self.turns = turns
            raise
        try:
            for (piece,) in stream:
                yield piece
        finally:
            # Its text, which goes back into the next prompt as the tokens it was written in.
            done = stream.completions[0]
            full = len(prompt) + len(done.tokens) >= limit and not slide
            if done.finish_reason == "length" and full:
                self.cut = f"the context of {limit} tokens is full"
            content = as_written(self._tokenizer, done.text, done.tokens, after=prompt)
            self.turns.append({"role": "assistant", "content": content})

    def _make_room(self, limit: int, wanted: int | None) -> int:
        """Leave out the oldest questions and answers until an answer fits; how many they were.

        An answer is given a quarter of the context, or the tokens that are asked for if fewer. All
        stay where even the last question alone leaves no token.
        """
        room = min(limit // 4, limit if wanted is None else wanted)
        for first in range(0, len(self.turns), 2):
            kept = self.turns[first:]
            length = len(self._format.encode(self._with_system(kept)))
            if length + room <= limit or (len(kept) == 1 and length < limit):
                self.turns = kept
                return first // 2
        return 0


def _fitting(length: int, wanted: int | None, limit: int) -> int | None:
    """`wanted` new tokens, or as many as the context has room for; ValueError where it has none."""
    if length >= limit:
        raise ValueError(
            f"this question is too long: {length} tokens with what the chat format adds, and the "
            f"context is {limit} tokens"
        )
    return None if wanted is None else min(wanted, limit - length)
