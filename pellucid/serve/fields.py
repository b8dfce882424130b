"""Fields of a request: how each is read, and the JSON Schema of what it takes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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


Json = dict[str, Any]


@dataclass(frozen=True)
class Read:
    """How a field is read from its name and value, which raises RequestError, and the JSON Schema
    of what it takes."""

    read: Callable[[str, Any], Any]
    schema: Json

    def __call__(self, name: str, value: Any) -> Any:
        """The value, checked."""
        return self.read(name, value)


def takes(schema: Json) -> Callable[[Callable[[str, Any], Any]], Read]:
    """A function as a `Read` of values of this schema."""
    return lambda read: Read(read, schema)


@dataclass(frozen=True)
class Field:
    """One field: how its value is read, and what holds where it is absent or null."""

    read: Read
    default: Any = None
    needed: bool = False


def schema_of(fields: Mapping[str, Field]) -> Json:
    """The JSON Schema of an object of these fields; those that are not needed may be null."""
    needed = [name for name, field in fields.items() if field.needed]
    return {
        "type": "object",
        "properties": {
            name: field.read.schema if field.needed else {"anyOf": [field.read.schema, _NULL]}
            for name, field in fields.items()
        },
        "additionalProperties": False,
        **({"required": needed} if needed else {}),
    }


_NULL = {"type": "null"}


def list_of(items: Json, least: int = 0) -> Json:
    """The schema of a list."""
    return {"type": "array", "items": items, **({"minItems": least} if least else {})}


def whole(low: int, high: int) -> Read:
    """A whole number from `low` to `high`."""

    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise refuse(name, value, f"a whole number from {low} to {high}")
        return value

    return Read(read, {"type": "integer", "minimum": low, "maximum": high})


def number(low: float, high: float = math.inf) -> Read:
    """A finite number from `low` to `high`."""

    def read(name: str, value: Any) -> float:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not low <= value <= high or not abs(value) < 1e300:
            upper = "up" if high == math.inf else f"to {high:g}"
            raise refuse(name, value, f"a number from {low:g} {upper}")
        return float(value)

    upper = {} if high == math.inf else {"maximum": high}
    return Read(read, {"type": "number", "minimum": low, **upper})


@takes({"type": "boolean"})
def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")
    return value


@takes({"type": "string"})
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

    return Read(read, {"enum": list(values)})


def parse(body: Mapping[str, Any], fields: Mapping[str, Field], prefix: str = "") -> dict[str, Any]:
    """A request's fields, checked, all of the table; RequestError names a field."""
    for name in body:
        if name not in fields:
            from pellucid.spelling import suggestion

            said = f"{prefix}{name}: no such field is served here{suggestion(name, list(fields))}"
            raise RequestError(400, said, f"{prefix}{name}")
    missing = next((n for n, field in fields.items() if field.needed and body.get(n) is None), None)
    if missing is not None:
        raise RequestError(400, f"{prefix}{missing} is missing", f"{prefix}{missing}")
    return {
        name: field.default if body.get(name) is None else field.read(prefix + name, body[name])
        for name, field in fields.items()
    }


@takes({"type": "object"})
def as_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise refuse(name, value, "a JSON object")
    return value


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
