"""Tokens guessed from the text itself, so that one reading of the weights checks several.

Text that repeats, such as a file being edited or a document being quoted, often goes on as it went
on before (Saxena, Prompt Lookup Decoding, 2023). A guess costs no accuracy: every token is chosen
from the logits that a step of its own would have given, bit for bit, and drawn by the same draws.

    text        … for row in rows : … for row in │ rows :      guessed: what followed `for row in`
    one pass                                  in   rows  :     logits after each of the three
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (8, 3)  # of the stretch that must have stood in the text before; the longer one first
PASSES = (1, 2, 4, 8, 16)  # tokens of a pass: as many as the kernels take at once, and twice that
_LATELY = 0.1  # weight of the newest guess in the share of right ones
_NEWEST = 0.3  # weight of the newest pass in what a pass takes


def nearer(before: float, seconds: float) -> float:
    """What something takes, after it took so long once more: a busy moment counts little."""
    return before + _NEWEST * (min(seconds, 2 * before) - before)


class PassTimes:
    """What a pass over the weights takes, by the number of its tokens."""

    def __init__(self, plain: float | None = None) -> None:
        """plain: what a pass of one token takes; None until one was measured."""
        self._seconds: dict[int, float] = {} if plain is None else {1: plain}

    @property
    def known(self) -> bool:
        """Whether a plain step's time is known, which comes first."""
        return 1 in self._seconds

    def took(self, tokens: int, seconds: float) -> None:
        """After a pass of so many tokens."""
        known = any(size <= tokens for size in self._seconds)
        self._seconds[tokens] = nearer(self[tokens], seconds) if known else seconds

    def __getitem__(self, size: int) -> float:
        """As measured, else as the next smaller one and a tenth a token more."""
        if size in self._seconds:
            return self._seconds[size]
        below = max(known for known in self._seconds if known < size)
        return self._seconds[below] * (1 + 0.1 * (size - below) / below)

    def best(self, most: int, right: float, each: float = 0.0) -> int:
        """How many guesses, at most `most`, give the most tokens a second: often none.

        right: the share of guesses that are; each: seconds that a guess takes to make
        """
        sizes = [size for size in PASSES if size <= most + 1]

        def rate(size: int) -> float:
            expected = sum(right**place for place in range(size))
            return expected / (self[size] + (size - 1) * each)

        return max(sizes, key=rate, default=1) - 1


class Lookup:
    """Guesses for one text, and whether they pay.

    Every guess is scored, those that were not run as well. A pass takes as many as promise the most
    tokens a second by the share of right ones and by what passes of that size took.
    """

    def __init__(self, times: PassTimes | None = None) -> None:
        self.times = times or PassTimes()
        self._after: dict[tuple[int, ...], int] = {}  # a stretch -> the place behind its latest
        self._read = 0  # tokens of the text whose stretches are in it
        self._right = 0.5  # share of guesses that were right, lately
        self._open: tuple[int, int] | None = None  # (place in the text, token guessed for it)

    def guess(self, text: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow the text; none where none are worth their time."""
        self._score(text)
        place = self._place_after(text)
        if place is None:
            return []
        self._open = len(text), text[place]
        if not self.times.known:
            return []
        there = min(self.times.best(most, self._right), len(text) - place)
        whole = max(size for size in PASSES if size <= there + 1) - 1
        return list(text[place : place + whole])

    def _score(self, text: Sequence[int]) -> None:
        """Compare the latest guess with what came."""
        if self._open is not None and self._open[0] < len(text):
            place, token = self._open
            self._right += _LATELY * ((text[place] == token) - self._right)
            self._open = None

    def _place_after(self, text: Sequence[int]) -> int | None:
        """Where the text goes on after an earlier place that reads as its end does."""
        for end in range(max(self._read, min(LENGTHS)), len(text)):
            for length in LENGTHS:
                if length <= end:
                    self._after[tuple(text[end - length : end])] = end
        self._read = len(text)
        stretches = (tuple(text[-length:]) for length in LENGTHS if length <= len(text))
        return next((self._after[s] for s in stretches if s in self._after), None)
