"""Draws that are the same on every machine, and which combinations no document may have."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")
KEPT_BACK = 10  # one combination in so many
# The two names of the sentence that the field knows (Wang et al., 2022) never meet in a document.
ALWAYS_KEPT_BACK = {"names|John|Mary"}


def kept_back(kind: str, *parts: object) -> bool:
    """Whether a combination stands in no document. Its order matters: sort what has none."""
    key = "|".join(map(str, (kind, *parts)))
    return key in ALWAYS_KEPT_BACK or zlib.crc32(key.encode()) % KEPT_BACK == 0


def kept_back_pair(kind: str, one: str, other: str) -> bool:
    """`kept_back` of two things whose order does not matter."""
    return kept_back(kind, *sorted((one, other)))


class Draws:
    """Choices from a seed, made of ``random()`` alone, which Python keeps alike in all versions."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def chance(self, share: float) -> bool:
        """True in this share of the draws."""
        return self._random.random() < share

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def one(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.number(0, len(options) - 1)]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in any order."""
        left = list(options)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]

    def until(self, draw: Callable[[], T], fits: Callable[[T], bool]) -> T:
        """The first draw that fits."""
        while not fits(found := draw()):
            pass
        return found
