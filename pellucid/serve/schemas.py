"""What each endpoint accepts, as data: a table of fields, each with what it may hold.

A field that stands in no table is an error that names it. So is a value without an effect here: a
field that is known but not served (`frequency_penalty`) takes only the value that means nothing.
Nothing that is accepted is ignored. Fields and their meaning follow OpenAI's reference; `top_k`,
`min_p` and `repetition_penalty` are added, as other local servers do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_ROWS = 128  # choices of one request: prompts times n
MOST_STOPS = 16
MOST_TOP = 20  # alternatives of a token


class RequestError(Exception):
    """A request that cannot be answered: status, one line, the field that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        return {"error": error}


def refuse(param: str, value: Any, expected: str) -> RequestError:
    """Status 400 for a field: what was given and what was expected."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
    return RequestError(400, f"{param} is {shown}: expected {expected}", param)


Read = Callable[[str, Any], Any]  # of a field's name and its value; raises RequestError


@dataclass(frozen=True)
class Field:
    """One field: how its value is read, and what holds where it is absent or null."""

    read: Read
    default: Any = None


def whole(low: int, high: int) -> Read:
    """A whole number from `low` to `high`."""

    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise refuse(name, value, f"a whole number from {low} to {high}")
        return value

    return read


def number(low: float, high: float = math.inf) -> Read:
    """A finite number from `low` to `high`."""

    def read(name: str, value: Any) -> float:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not low <= value <= high or not abs(value) < 1e300:
            upper = "up" if high == math.inf else f"to {high:g}"
            raise refuse(name, value, f"a number from {low:g} {upper}")
        return float(value)

    return read


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")
    return value


def text(name: str, value: Any) -> str:
    """Any text."""
    if not isinstance(value, str):
        raise refuse(name, value, "text")
    return value


def only(*values: Any) -> Read:
    """One of a few values: the others are not served."""

    def read(name: str, value: Any) -> Any:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool)
                   for one in values):  # fmt: skip
            allowed = " or ".join(json.dumps(one) for one in values)
            raise refuse(name, value, f"{allowed}; nothing else is served here")
        return value

    return read


def stops(name: str, value: Any) -> list[str]:
    """One stop string or several."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > MOST_STOPS:
        raise refuse(name, value, f"a text or a list of at most {MOST_STOPS} texts")
    if not all(isinstance(one, str) and one for one in found):
        raise refuse(name, value, "texts of one character or more")
    return found


def token_ids(name: str, value: Any) -> list[int]:
    """A list of token ids."""
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise refuse(name, value, "a list of token ids")
    return value


def prompts(name: str, value: Any) -> list[str | list[int]]:
    """A prompt as text or token ids, or a list of either -> a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and one for one in value):
            return [token_ids(f"{name}[{place}]", one) for place, one in enumerate(value)]
        if all(type(one) is int for one in value):
            return [value]
    raise refuse(name, value, "text, token ids, or a list of texts or of lists of token ids")


def stream_options(name: str, value: Any) -> bool:
    """Whether a stream ends with a chunk of usage."""
    fields = {"include_usage": Field(flag, False)}
    return parse(as_object(name, value), fields, f"{name}.")["include_usage"]


def messages(name: str, value: Any) -> list[dict[str, str]]:
    """A conversation: role and content of each message; parts of text are joined."""
    if not isinstance(value, list) or not value:
        raise refuse(name, value, "a list of one message or more")
    found = []
    for place, message in enumerate(value):
        where = f"{name}[{place}]"
        fields = {
            "role": Field(text),
            "content": Field(content_text),
            "type": Field(only("message")),
        }
        given = parse(as_object(where, message), fields, f"{where}.")
        for key in ("role", "content"):
            if given[key] is None:
                raise refuse(f"{where}.{key}", None, "text")
        found.append({"role": given["role"], "content": given["content"]})
    return found


def content_text(name: str, value: Any) -> str:
    """The text of a message: as it is, or a list of parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refuse(name, value, "text or a list of parts of text")
    kinds = ("text", "input_text", "output_text")
    fields = {"type": Field(only(*kinds)), "text": Field(text, "")}
    parts = (parse(as_object(f"{name}[{i}]", part), fields, f"{name}[{i}].")
             for i, part in enumerate(value))  # fmt: skip
    return "".join(part["text"] for part in parts)


def conversation(name: str, value: Any) -> list[dict[str, str]]:
    """The input of a response: text, which is the user's message, or messages."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else messages(name, value)


def as_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise refuse(name, value, "a JSON object")
    return value


def parse(body: Mapping[str, Any], fields: Mapping[str, Field], prefix: str = "") -> dict[str, Any]:
    """A request's fields, checked, all of the table; RequestError names a field."""
    for name in body:
        if name not in fields:
            from pellucid.spelling import suggestion

            said = f"{prefix}{name}: no such field is served here{suggestion(name, list(fields))}"
            raise RequestError(400, said, f"{prefix}{name}")
    return {
        name: field.default if body.get(name) is None else field.read(prefix + name, body[name])
        for name, field in fields.items()
    }


_COUNT = whole(0, 2**31)
_WRITING = {
    "model": Field(text),
    "temperature": Field(number(0), 1.0),
    "top_p": Field(number(0, 1), 1.0),
    "stream": Field(flag, False),
}
_CHOOSING = {
    "top_k": Field(_COUNT, 0),
    "min_p": Field(number(0, 1), 0.0),
    "repetition_penalty": Field(number(0), 1.0),
    "n": Field(whole(1, MOST_ROWS), 1),
    "seed": Field(whole(0, 2**63 - 1)),
    "stop": Field(stops, ()),
    "stream_options": Field(stream_options),
    "frequency_penalty": Field(only(0)),
    "presence_penalty": Field(only(0)),
    "logit_bias": Field(only({})),
}
COMPLETION = {
    **_WRITING,
    **_CHOOSING,
    "prompt": Field(prompts),
    "max_tokens": Field(_COUNT, 16),
    "echo": Field(flag, False),
    "logprobs": Field(whole(0, MOST_TOP)),
    "best_of": Field(only(1)),
}
CHAT = {
    **_WRITING,
    **_CHOOSING,
    "messages": Field(messages),
    "max_tokens": Field(_COUNT),
    "max_completion_tokens": Field(_COUNT),
    "logprobs": Field(flag, False),
    "top_logprobs": Field(whole(0, MOST_TOP)),
    "response_format": Field(only({"type": "text"})),
    "tools": Field(only([])),
    "tool_choice": Field(only("none", "auto")),
}
RESPONSE = {
    **_WRITING,
    "input": Field(conversation),
    "instructions": Field(text),
    "max_output_tokens": Field(whole(1, 2**31)),
    "store": Field(only(False)),
    "text": Field(only({"format": {"type": "text"}})),
    "tools": Field(only([])),
}
EMBEDDING = {
    "model": Field(text),
    "input": Field(prompts),
    "encoding_format": Field(only("float", "base64"), "float"),
}
TOKENIZE = {
    "model": Field(text),
    "prompt": Field(text),
    "add_special_tokens": Field(flag, True),
    "parse_special": Field(flag, True),
    "return_token_strs": Field(flag, False),
}
DETOKENIZE = {"model": Field(text), "tokens": Field(token_ids)}


def require(given: Mapping[str, Any], *names: str) -> None:
    """RequestError for a field that must be there."""
    for name in names:
        if given[name] is None:
            raise RequestError(400, f"{name} is missing", name)


def read_json(data: bytes) -> dict[str, Any]:
    """The JSON object of a request's body; RequestError for anything else, however deep."""

    def refuse_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    def without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a field stands in it twice")
        return found

    try:
        body = json.loads(
            data.decode("utf-8"), parse_constant=refuse_constant, object_pairs_hook=without_twins
        )
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply") from None
    except ValueError as error:  # of UTF-8, of JSON, of a number with thousands of digits
        raise RequestError(400, f"the body is no JSON: {error}") from None
    return as_object("the body", body)
