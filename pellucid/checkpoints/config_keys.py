"""A JSON config file read so that no key goes unnoticed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_REQUIRED: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError where it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


class ConfigKeys:
    """The keys of one config file; each is taken by name, and `close` complains about the rest.

    A key that is null counts as absent, as in transformers. `where` begins every message.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._left = dict(values)

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """A whole number, or `default` where the key is absent."""
        return self._taken(key, default, int, "a whole number")

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number as a float, or `default`."""
        value = self._taken(key, default, (int, float), "a number")
        if value is None:
            return None
        if not abs(value) <= sys.float_info.max:  # json reads NaN, Infinity and endless integers
            raise ValueError(f"{self.where}: {key} is not finite; expected a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false, or `default`."""
        return self._taken(key, default, bool, "true or false")

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string, or `default`."""
        return self._taken(key, default, str, "a string")

    def table(self, key: str) -> dict[str, Any] | None:
        """A JSON object, or None where the key is absent."""
        return self._taken(key, None, dict, "an object")

    def must_be(self, key: str, expected: object) -> None:
        """Take a key whose other values would need arithmetic that Pellucid does not have."""
        value = self._left.pop(key, None)
        if value is not None and value != expected:
            raise ValueError(
                f"{self.where}: {key} is {value!r}; Pellucid computes {expected!r} only"
            )

    def close(self, ignored: Iterable[str]) -> None:
        """ValueError naming every key that was neither taken nor is in `ignored`."""
        unknown = sorted(set(self._left) - set(ignored))
        if unknown:
            stated = ", ".join(f"{key} = {str(self._left[key])[:60]}" for key in unknown)
            raise ValueError(
                f"{self.where}: unknown {'keys' if len(unknown) > 1 else 'key'} {stated}; it may "
                "change what the model computes, so it is not passed over in silence"
            )

    def _taken(self, key: str, default: Any, kind: Any, expected: str) -> Any:
        value = self._left.pop(key, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.where}: {key} is missing; expected {expected}")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: {key} is {value!r}; expected {expected}")
        return value
