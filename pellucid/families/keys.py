"""A JSON config file, read so that every key is used, known to be harmless, or an error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

# Keys that state arithmetic in one format or another: a key spelt almost so is a mistyped one
_COMPUTED = frozenset(
    {
        "attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "head_dim",
        "hidden_act", "hidden_size", "intermediate_size", "layer_types", "logit_scale",
        "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "partial_rotary_factor", "query_pre_attn_scalar", "rms_norm_eps",
        "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings",
    }
)  # fmt: skip
REQUIRED: Any = object()  # the default of a key that must be there


class NotComputed(ValueError):
    """A key whose value needs arithmetic that Pellucid does not have; it has that of `expected`."""

    def __init__(self, where: str, key: str, value: object, expected: object) -> None:
        super().__init__(f"{where}: {key} is {value!r}; Pellucid computes {expected!r} only")
        self.key, self.expected = key, expected


class ConfigKeys:
    """The keys of one config file; each is taken by name, and `close` complains about the rest.

    A key that is null counts as absent; where null says something else than absence does, as in
    ``"sliding_window": null``, ask `is_null` first. `where` begins every message.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._left = dict(values)

    def integer(self, key: str, default: Any = REQUIRED) -> Any:
        """A whole number, or `default` where the key is absent."""
        return self._taken(key, default, int, "a whole number")

    def number(self, key: str, default: Any = REQUIRED) -> Any:
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

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        """A string, or `default`."""
        return self._taken(key, default, str, "a string")

    def table(self, key: str) -> dict[str, Any] | None:
        """A JSON object, or None where the key is absent."""
        return self._taken(key, None, dict, "an object")

    def numbers(self, key: str) -> tuple[float, ...] | None:
        """A list of numbers, or None where the key is absent."""
        stated = self._taken(key, None, list, "a list of numbers")
        if stated is None:
            return None
        inside = ConfigKeys({f"{key}[{place}]": x for place, x in enumerate(stated)}, self.where)
        return tuple(inside.number(f"{key}[{place}]") for place in range(len(stated)))

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None where the key is absent."""
        stated = self._taken(key, None, list, "a list of strings")
        if stated is not None and not all(isinstance(text, str) for text in stated):
            raise ValueError(f"{self.where}: {key} is {stated!r}; expected a list of strings")
        return None if stated is None else tuple(stated)

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null, which absence is not."""
        return key in self._left and self._left[key] is None

    def pass_over(self, key: str) -> None:
        """Take a key that another one makes void."""
        self._left.pop(key, None)

    def must_be(self, key: str, expected: object) -> None:
        """Take a key whose other values would need arithmetic that Pellucid does not have."""
        value = self._left.pop(key, None)
        if value is not None and value != expected:
            raise NotComputed(self.where, key, value, expected)

    def close(self, ignored: Iterable[str]) -> None:
        """ValueError naming every key that was neither taken nor is in `ignored`."""
        unknown = self._unknown(ignored)
        if unknown:
            raise ValueError(
                f"{self.where}: {unknown}; it may change what the model computes, so it is not "
                "passed over in silence"
            )

    def note_rest(self, ignored: Iterable[str], other: str) -> None:
        """A warning naming every key that was neither taken nor is in `ignored`.

        For a file whose own reader (`other`) does not know them: there they change nothing.
        ValueError all the same for one that is nearly, not quite, the name of something computed.
        """
        rest = self._left.keys() - set(ignored) - _COMPUTED
        if any(get_close_matches(key, _COMPUTED, n=1, cutoff=0.9) for key in rest):
            self.close(ignored)
        unknown = self._unknown(ignored)
        if unknown:
            warnings.warn(
                f"{self.where}: {unknown}; {other} does not know it either, so it is passed over",
                stacklevel=2,
            )

    def _unknown(self, ignored: Iterable[str]) -> str:
        rest = {key: value for key, value in self._left.items() if value is not None}
        unknown = sorted(rest.keys() - set(ignored))
        stated = ", ".join(f"{key} = {str(rest[key])[:60]}" for key in unknown)
        return f"unknown {'keys' if len(unknown) > 1 else 'key'} {stated}" if unknown else ""

    def _taken(self, key: str, default: Any, kind: Any, expected: str) -> Any:
        value = self._left.pop(key, None)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{self.where}: {key} is missing; expected {expected}")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: {key} is {value!r}; expected {expected}")
        return value
