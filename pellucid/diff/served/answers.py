"""OpenAI's answers with log-probabilities, and what other engines add to them.

completions  {"tokens": […], "token_logprobs": […], "top_logprobs": [{…}]}, side by side
chats        {"content": [{"token", "logprob", "bytes", "top_logprobs": […]}]}; llama.cpp's
             completions too, with an "id"
vLLM         "prompt_logprobs": [null, {"1234": {"logprob", "decoded_token"}}], token ids in
             "prompt_token_ids" and "token_ids"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pellucid.diff.served.said import Messages, Said, as_logprob
from pellucid.diff.served.spelling import Name, candidates, ids_of
from pellucid.tokenizers import Tokenizer


@dataclass
class Token:
    """One token of an answer, its ln p, and what else was likely."""

    name: Name
    logprob: float | None
    others: list[tuple[Name, float]] = field(default_factory=list)


def read_choice(
    choice: Mapping[str, Any],
    prompt: list[int],
    tokenizer: Tokenizer | None,
    *,
    where: str,
    counted: int | None = None,
    echo: bool = False,
    messages: Messages | None = None,
) -> Said | None:
    """A choice of an answer as a text; None where it holds no log-probabilities.

    prompt  token ids as A encodes them; what the engine states or echoes goes before
    echo    the answer begins with the prompt

    ValueError, which says where, for tokens that are none of A's and ln p that is none.
    """
    told = [*_prompt_tokens(choice.get("prompt_logprobs"), choice.get("prompt_token_ids"), where)]
    answer = list(_tokens(choice.get("logprobs"), where))
    if echo and not told:
        length = counted if counted is not None else len(prompt)
        told, answer = answer[:length], answer[length:]
    if not any(token.logprob is not None for token in (*told, *answer)):
        return None
    stated = choice.get("prompt_token_ids")
    if told:
        before = ids_of([token.name for token in told], tokenizer, prompt, where)
    else:
        before = _whole_ids(stated, where) if isinstance(stated, list) else list(prompt)
    after = _written(answer, choice, tokenizer, before, where)
    if not told:
        told = [Token(Name(""), None) for _ in before]
    tokens = [*told, *answer][: len(before) + len(after)]
    ids = [*before, *after]
    others = _others(tokens, ids, tokenizer)
    return Said(
        ids=ids,
        logprobs=[token.logprob for token in tokens],
        others=others,
        written=len(before),
        messages=messages,
        counted=counted,
    )


def _written(
    answer: Sequence[Token],
    choice: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    before: Sequence[int],
    where: str,
) -> list[int]:
    stated = choice.get("token_ids")
    if isinstance(stated, list) and len(stated) >= len(answer):
        return _whole_ids(stated[: len(answer)], where)
    expected: list[int] = []
    if tokenizer is not None and any("\ufffd" in token.name.text for token in answer):
        text = choice.get("text", (choice.get("message") or {}).get("content"))
        expected = tokenizer.encode(text) if isinstance(text, str) else []
    return ids_of([token.name for token in answer], tokenizer, expected, where)


def _whole_ids(given: Sequence[Any], where: str) -> list[int]:
    if not all(type(id) is int and id >= 0 for id in given):
        raise ValueError(f"{where}: token ids hold {str(given)[:60]}, expected whole numbers")
    return list(given)


def _tokens(logprobs: Any, where: str) -> list[Token]:
    """The tokens of an answer in either of OpenAI's forms, or as vLLM's offline outputs have them.

    ValueError where lists that belong together differ in length.
    """
    if isinstance(logprobs, list):  # of dictionaries by id
        return _prompt_tokens(logprobs, None, where)
    if not isinstance(logprobs, Mapping):
        return []
    if isinstance(logprobs.get("content"), list):
        return [_chat_token(row, where) for row in logprobs["content"]]
    names, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    tops = logprobs.get("top_logprobs") or [None] * len(names)
    if not len(names) == len(values) == len(tops):
        raise ValueError(
            f"{where}: {len(names)} tokens, {len(values)} log-probabilities and {len(tops)} lists "
            "of likely tokens: expected as many of each"
        )
    return [
        Token(
            Name(str(name)),
            as_logprob(value, where),
            [(Name(other), x) for other, x in _numbers(top, where)],
        )
        for name, value, top in zip(names, values, tops, strict=True)
    ]


def _numbers(top: Any, where: str) -> list[tuple[str, float]]:
    rows = [(name, as_logprob(value, where)) for name, value in dict(top or {}).items()]
    return [(name, value) for name, value in rows if value is not None]


def _chat_token(row: Any, where: str) -> Token:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a token's log-probability is {str(row)[:40]}, expected fields")
    others = [(_name(top), as_logprob(top.get("logprob"), where))
              for top in row.get("top_logprobs") or [] if isinstance(top, Mapping)]  # fmt: skip
    kept = [(name, value) for name, value in others if value is not None]
    return Token(_name(row), as_logprob(row.get("logprob"), where), kept)


def _name(row: Mapping[str, Any]) -> Name:
    data = row.get("bytes")
    whole = isinstance(data, list) and all(type(x) is int and 0 <= x < 256 for x in data)
    id = row.get("id")
    return Name(
        str(row.get("token", row.get("decoded_token", ""))),
        bytes(data) if whole and data else None,
        id if type(id) is int else None,
    )


def _prompt_tokens(rows: Any, ids: Any, where: str) -> list[Token]:
    """vLLM's lists of {id: {"logprob", "rank"}}; `ids` says which of a row was the token."""
    if not isinstance(rows, list):
        return []
    stated = ids if isinstance(ids, list) and len(ids) == len(rows) else [None] * len(rows)
    tokens = []
    for row, id in zip(rows, stated, strict=True):
        read = {
            int(key): as_logprob(x.get("logprob") if isinstance(x, Mapping) else x, where)
            for key, x in dict(row or {}).items()
            if str(key).isdecimal()
        }
        # The token itself stands first; the likeliest follow.
        id = id if id is not None else next(iter(read), None)
        if id is None:
            raise ValueError(f"{where}: a token has no id; keep prompt_token_ids beside the rest")
        others = [(Name("", id=k), v) for k, v in read.items() if k != id and v is not None]
        tokens.append(Token(Name("", id=id), read.get(id), others))
    return tokens


def _others(
    tokens: Sequence[Token], ids: Sequence[int], tokenizer: Tokenizer | None
) -> list[tuple[int, int, float]]:
    """What else was likely, where its name is one token and no other."""
    found = []
    for place, token in enumerate(tokens):
        for name, value in token.others:
            if tokenizer is None:
                known = None if name.id is None else [name.id]
            else:
                known = candidates(name, tokenizer)
            if known and len(known) == 1 and known[0] != ids[place]:
                found.append((place, known[0], value))
    return found
