"""``/v1/completions``: texts continued, with the prompt's own log-probabilities where asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from pellucid.serve import wire
from pellucid.serve.queue import ServedModel, Work
from pellucid.serve.streams import start, until_gone
from pellucid.serve.writing import Choice, Scored, TextPiece, WritingRequest, score_prompts, write

# (engine, prompts, choices) -> the tokens of an answer, counted
Used = Callable[[ServedModel, list[list[int]], list[Choice]], dict[str, int]]


class Completions:
    """One request: its choices, the text and scores of its prompts, and how far each has come."""

    def __init__(
        self, used: Used, engine: ServedModel, given: dict[str, Any], rows: list[list[int]],
        order: WritingRequest,
    ) -> None:  # fmt: skip
        self._used, self._engine, self._given, self._rows = used, engine, given, rows
        self._tokenizer, self._top = engine.lm.tokenizer, given["logprobs"]
        self._choices: list[Choice] = start(engine, order)
        self._answer = wire.AnswerWriter(
            kind="text_completion", model=engine.name, tokenizer=self._tokenizer,
            usage_chunk=bool(given["stream_options"]),
        )  # fmt: skip
        self._lengths = [0] * len(self._choices)  # characters shown so far
        self._decoders = [self._tokenizer.stream(after=row) for row in order.rows]
        self._scores: list[list[Scored | None]] = []
        self._echo: list[str] = []
        if given["echo"]:
            self._echo = [self._shown(prompt, row) for prompt, row in
                          zip(given["prompt"], rows, strict=True)]  # fmt: skip

    def _shown(self, prompt: str | list[int], row: list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(row)

    def _work(self) -> Work:
        """Scores of the prompts, then the texts: lists of pieces."""
        if self._given["echo"] and self._top is not None:
            for scores in score_prompts(self._engine.together, self._rows, self._top):
                self._scores += scores
                yield []
        yield from write(self._choices)

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer in one object."""
        events = await until_gone(request, self._engine.run(self._work()))
        pieces = [piece for some in events for piece in some]
        choices = []
        for index in range(len(self._choices)):
            own = [piece for piece in pieces if piece.index == index]
            begin = self._begin(index)
            joined = TextPiece(
                index,
                "".join(piece.text for piece in own),
                tuple(token for piece in own for token in piece.tokens),
                own[-1].finish_reason,
            )
            choices.append(self._choice(joined, begin))
        used = self._used(self._engine, self._rows, self._choices)
        return self._answer.whole(choices, used)

    async def stream(self) -> AsyncGenerator[str, None]:
        """Chunks; the last text of a choice and its reason stand in one."""
        begun: set[int] = set()
        async with aclosing(self._engine.run(self._work())) as events:
            async for pieces in events:
                for piece in pieces:
                    begin = None if piece.index in begun else self._begin(piece.index)
                    begun.add(piece.index)
                    yield self._answer.chunk([self._choice(piece, begin)])
        used = self._used(self._engine, self._rows, self._choices)
        if self._answer.usage_chunk:
            yield self._answer.chunk([], used)
        yield wire.DONE

    def _begin(self, index: int) -> tuple[str, list[tuple[int, Scored | None]], list[int]]:
        """The echo of a choice's prompt: text, tokens with scores, where each begins."""
        if not self._given["echo"]:
            return "", [], []
        place = index // self._given["n"]
        text, row = self._echo[place], self._rows[place]
        if self._top is None:
            return text, [], []
        added = isinstance(self._given["prompt"][place], str) and row[:1] == [
            self._tokenizer.bos_id
        ]
        own = row[1:] if added else row
        offsets = [0] * added + wire.offsets_of(self._tokenizer.stream(), own)
        return text, list(zip(row, self._scores[place], strict=True)), offsets

    def _choice(
        self,
        piece: TextPiece,
        begin: tuple[str, list[tuple[int, Scored | None]], list[int]] | None,
    ) -> dict[str, Any]:
        text, scored, offsets = begin or ("", [], [])
        at = self._lengths[piece.index] + len(text)
        ids = [token.id for token in piece.tokens]
        scored = [*scored, *((token.id, token) for token in piece.tokens)]
        offsets = [*offsets, *wire.offsets_of(self._decoders[piece.index], ids, at)]
        self._lengths[piece.index] = at + len(piece.text)
        logprobs = None
        if self._top is not None:
            logprobs = self._answer.logprobs(scored, offsets, self._top)
        return {
            "index": piece.index,
            "text": text + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }
