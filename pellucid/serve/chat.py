"""``/v1/chat/completions``: the next message of a conversation, which may call tools."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from pellucid.serve import wire
from pellucid.serve.completions import Used
from pellucid.serve.queue import ServedModel
from pellucid.serve.streams import until_gone
from pellucid.serve.tools import CallForm, CallReader
from pellucid.serve.writing import Choice, Scored, TextPiece, write


class Chat:
    """One request: its choices, and the form in which they may call tools."""

    def __init__(
        self, used: Used, engine: ServedModel, given: dict[str, Any], row: list[int],
        choices: list[Choice], form: CallForm | None,
    ) -> None:  # fmt: skip
        self._used, self._engine, self._row, self._choices = used, engine, row, choices
        self._scored: bool = given["logprobs"]
        self._readers = [None if form is None else CallReader(form) for _ in choices]
        self._answer = wire.AnswerWriter(
            kind="chat.completion", model=engine.name, tokenizer=engine.lm.tokenizer,
            usage_chunk=bool(given["stream_options"]),
        )  # fmt: skip

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer in one object."""
        events = await until_gone(request, self._engine.run(write(self._choices)))
        pieces = [piece for some in events for piece in some]
        choices = [
            self._choice(index, [piece for piece in pieces if piece.index == index])
            for index in range(len(self._choices))
        ]
        used = self._used(self._engine, [self._row], self._choices)
        return self._answer.whole(choices, used)

    async def stream(self) -> AsyncGenerator[str, None]:
        """Chunks: the role of each choice, its text or calls, then an empty one with the reason."""
        begun = False
        async with aclosing(self._engine.run(write(self._choices))) as events:
            async for pieces in events:
                if not begun:
                    for choice in self._choices:
                        delta = {"role": "assistant", "content": None}
                        yield self._chunk(choice.index, delta)
                begun = True
                for piece in pieces:
                    for chunk in self._chunks(piece):
                        yield chunk
        used = self._used(self._engine, [self._row], self._choices)
        if self._answer.usage_chunk:
            yield self._answer.chunk([], used)
        yield wire.DONE

    def _read(self, piece: TextPiece) -> tuple[str, list[dict[str, Any]]]:
        """The text that a piece lets be shown, and at the end the calls."""
        reader = self._readers[piece.index]
        if reader is None:
            return piece.text, []
        text = reader.push(piece.text)
        if piece.finish_reason is None:
            return text, []
        rest, calls = reader.finish()
        return text + rest, calls

    def _choice(self, index: int, pieces: Sequence[TextPiece]) -> dict[str, Any]:
        read = [self._read(piece) for piece in pieces]
        text, calls = "".join(part for part, _ in read), read[-1][1]
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        tokens = [token for piece in pieces for token in piece.tokens]
        return {
            "index": index,
            "message": message,
            "logprobs": self._answer.chat_logprobs(tokens) if self._scored else None,
            "finish_reason": reason(pieces[-1], calls),
        }

    def _chunks(self, piece: TextPiece) -> list[str]:
        text, calls = self._read(piece)
        chunks = []
        if text or piece.tokens:
            chunks.append(self._chunk(piece.index, {"content": text}, piece.tokens))
        if calls:
            told = [{"index": number, **call} for number, call in enumerate(calls)]
            chunks.append(self._chunk(piece.index, {"tool_calls": told}))
        if piece.finish_reason:
            chunks.append(self._chunk(piece.index, {}, finish_reason=reason(piece, calls)))
        return chunks

    def _chunk(
        self, index: int, delta: dict[str, Any], tokens: Sequence[Scored] | None = None,
        *, finish_reason: str | None = None,
    ) -> str:  # fmt: skip
        """One event; tokens None: none belong to it."""
        scored = self._scored and tokens is not None
        logprobs = self._answer.chat_logprobs(tokens or ()) if scored else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs}
        return self._answer.chunk([{**choice, "finish_reason": finish_reason}])


def reason(last: TextPiece, calls: Sequence[Any]) -> str | None:
    """Why a choice ends: with calls of tools, unless it was cut."""
    return "tool_calls" if calls and last.finish_reason == "stop" else last.finish_reason
