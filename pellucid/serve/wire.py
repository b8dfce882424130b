"""Answers as OpenAI's clients read them: whole, and in the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pellucid.serve.writing import Scored
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.base import StreamDecoder


def token_name(tokenizer: Tokenizer, id: int) -> str:
    """A token as text; one that is no whole character as ``bytes:\\xe2``, as OpenAI does."""
    data = _bytes(tokenizer, id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """The bytes a token adds inside a text, where SentencePiece's leading space counts."""
    both, one = tokenizer.decode_bytes([id, id]), tokenizer.decode_bytes([id])
    return both[len(one) :]


def usage(prompt: int, written: int) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }


@dataclass(kw_only=True)
class AnswerWriter:
    """What all chunks of one answer share."""

    kind: str  # "text_completion" or "chat.completion"
    model: str
    tokenizer: Tokenizer
    usage_chunk: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        prefix = "cmpl" if self.kind == "text_completion" else "chatcmpl"
        self.id = f"{prefix}-{secrets.token_hex(12)}"

    def whole(self, choices: list[dict[str, Any]], used: dict[str, int]) -> dict[str, Any]:
        """The answer in one object."""
        return {**self._head(self.kind), "choices": choices, "usage": used}

    def chunk(self, choices: list[dict[str, Any]], used: dict[str, int] | None = None) -> str:
        """One event of the stream."""
        kind = self.kind if self.kind == "text_completion" else f"{self.kind}.chunk"
        body = {**self._head(kind), "choices": choices}
        if self.usage_chunk:
            body["usage"] = used
        return event(body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def chat_logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        """Log-probabilities as a chat has them: an object per token, with its bytes."""
        return {"content": [self._chat_token(token) for token in tokens], "refusal": None}

    def _chat_token(self, token: Scored) -> dict[str, Any]:
        likeliest = [self._named(id, logprob) for id, logprob in token.top]
        return {**self._named(token.id, token.logprob), "top_logprobs": likeliest}

    def _named(self, id: int, logprob: float) -> dict[str, Any]:
        data = _bytes(self.tokenizer, id)
        name = token_name(self.tokenizer, id)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(data)}

    def logprobs(
        self, scored: Sequence[tuple[int, Scored | None]], offsets: Sequence[int], top: int
    ) -> dict[str, Any]:
        """Log-probabilities as a completion has them: lists side by side, null for the first."""
        names = [token_name(self.tokenizer, id) for id, _ in scored]
        alternatives = []
        for (_, token), name in zip(scored, names, strict=True):
            if token is None:
                alternatives.append(None)
                continue
            found: dict[str, float] = {}
            for id, logprob in token.top:  # of tokens with one name the likelier stays
                found.setdefault(token_name(self.tokenizer, id), _finite(logprob))
            found.setdefault(name, _finite(token.logprob))  # the chosen token is always there
            alternatives.append(found)
        return {
            "tokens": names,
            "token_logprobs": [None if t is None else _finite(t.logprob) for _, t in scored],
            "top_logprobs": alternatives if top else None,
            "text_offset": list(offsets),
        }


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no −inf; the number that OpenAI writes


def offsets_of(decoder: StreamDecoder, ids: Sequence[int], begin: int = 0) -> list[int]:
    """Where each token's text begins, in characters; `begin` characters stand before the first."""
    found = []
    for id in ids:
        found.append(begin)
        begin += len(decoder.push(id))
    return found


def event(body: Any, name: str = "") -> str:
    """A server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(body)}\n\n"


DONE = "data: [DONE]\n\n"
