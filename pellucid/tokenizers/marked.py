"""Text with its source marked for each character: the chat template, a message, or the model.

A template joins its own words with those of messages, and only its own may become control tokens.
So each character carries a mark through everything that templates do with text:

    SAID     the words of a message: text, whatever it spells
    OWN      the template's words: a control token's name in them is that token
    Written  characters of tokens that the model wrote: the very same token ids again

Whatever is not tracked gives an ordinary string, which counts as SAID: the error is on the safe
side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, SupportsIndex

# A part of a text to encode: a control token, text that is only text, or ids as they are.
Part = int | str | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Written:
    """Token ids that the model wrote, and their text: one token, or those that share a character.

    Two are equal only if they are the same object: a mark stands for one place in one answer.
    """

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, eq=False)
class _Writer:
    name: str


SAID, OWN = _Writer("said"), _Writer("own")
Mark = _Writer | Written


class Marked(str):
    """A string with a mark for each character. Equal to, and hashed as, the plain string."""

    # (length, mark) of each stretch with one mark; the underscore keeps templates away from it
    _runs: tuple[tuple[int, Mark], ...]

    def __new__(cls, text: str = "", marks: Iterable[Mark] | None = None) -> Marked:
        """`marks`: one per character; None: all SAID, or those that `text` has."""
        if marks is None:
            return _with_runs(text, _runs_of(text))
        runs = [(len(list(same)), mark) for mark, same in groupby(marks)]
        assert sum(length for length, _ in runs) == len(text), "every character has one mark"
        return _with_runs(text, runs)

    @classmethod
    def own(cls, text: str) -> Marked:
        """Text of the template itself."""
        return _with_runs(text, [(len(text), OWN)])

    def __str__(self) -> str:
        return self  # str(text) must not lose the marks

    def __add__(self, other: str) -> Marked:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Marked:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Marked:
        return _with_runs(super().__mul__(times), self._runs * times.__index__())

    def __rmul__(self, times: SupportsIndex) -> Marked:
        return self * times

    def __mod__(self, values: Any) -> str:
        given = values if isinstance(values, tuple) else (values,)
        places = [match.span() for match in re.finditer("%s", self)]
        if self.count("%") != len(places) or len(given) != len(places):
            return super().__mod__(values)
        ends = [0, *(end for _, end in places)]
        starts = [*(start for start, _ in places), len(self)]
        texts = [self[end:start] for end, start in zip(ends, starts, strict=True)]
        return joined(chain.from_iterable(zip(texts, [*map(str, given), ""], strict=True)))

    def __getitem__(self, place: SupportsIndex | slice) -> Marked:
        piece = super().__getitem__(place)
        if len(self._runs) == 1:
            return _with_runs(piece, [(len(piece), self._runs[0][1])])
        where = range(len(self))[place]
        if isinstance(where, int):
            where = range(where, where + 1)
        if where.step != 1:
            marks = marks_of(self)
            return Marked(piece, [marks[one] for one in where])
        runs, begin = [], 0
        for length, mark in self._runs:
            end = begin + length
            runs.append((min(end, where.stop) - max(begin, where.start), mark))
            begin = end
        return _with_runs(piece, runs)

    def strip(self, chars: str | None = None, /) -> Marked:
        """As str's, and so are the methods below."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Marked:
        """Without characters at the beginning."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> Marked:
        """Without characters at the end."""
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> Marked:
        """Without a beginning."""
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> Marked:
        """Without an end."""
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """The pieces between separators."""
        return self._cut(super().split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """The pieces between separators, the last ones first cut."""
        return self._cut(super().rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        """The lines."""
        return self._cut(super().splitlines(keepends), 0)

    def partition(self, sep: str, /) -> tuple[Marked, Marked, Marked]:
        """Before, at and after the first `sep`."""
        place = self.find(sep)
        if place < 0:
            return self, Marked(), Marked()
        return self[:place], self[place : place + len(sep)], self[place + len(sep) :]

    def rpartition(self, sep: str, /) -> tuple[Marked, Marked, Marked]:
        """Before, at and after the last `sep`."""
        place = self.rfind(sep)
        if place < 0:
            return Marked(), Marked(), self
        return self[:place], self[place : place + len(sep)], self[place + len(sep) :]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Marked:
        """With `new` for the first `count` of `old`."""
        if not old:
            return _with_runs(super().replace(old, new, count), None)
        if len(self._runs) <= 1:  # as nearly always, and much faster
            mark, between = (self._runs or ((0, SAID),))[0][1], _runs_of(new)
            lengths = map(len, super().split(old, count))
            runs = [(next(lengths), mark)]
            for length in lengths:
                runs += [*between, (length, mark)]
            return _with_runs(super().replace(old, new, count), runs)
        pieces = self.split(old, count)
        return joined(chain.from_iterable((new, piece) for piece in pieces), skip=1)

    def join(self, iterable: Iterable[str], /) -> Marked:
        """The parts with this text between them."""
        return joined(chain.from_iterable((self, part) for part in iterable), skip=1)

    def lower(self) -> Marked:
        """In small letters."""
        return self._same_places(super().lower())

    def upper(self) -> Marked:
        """In capitals."""
        return self._same_places(super().upper())

    def title(self) -> Marked:
        """Each word capitalised."""
        return self._same_places(super().title())

    def capitalize(self) -> Marked:
        """The first letter a capital."""
        return self._same_places(super().capitalize())

    def _same_places(self, changed: str) -> Marked:
        return _with_runs(changed, self._runs if len(changed) == len(self) else None)

    def _cut(self, pieces: list[str], gap: int) -> list[str]:
        """`pieces` of this text in order, with their marks; `gap` characters between two, or some
        white space that none of them begins with."""
        cut: list[str] = []
        place = 0
        for piece in pieces:
            place = self.find(piece, place)
            cut.append(self[place : place + len(piece)])
            place += len(piece) + gap
        return cut


def _with_runs(text: str, runs: Iterable[tuple[int, Mark]] | None) -> Marked:
    """`text` with the marks of these stretches, empty ones among them; None: all SAID."""
    made = str.__new__(Marked, text)
    tidy: list[tuple[int, Mark]] = []
    for length, mark in [(len(text), SAID)] if runs is None else runs:
        if length <= 0:
            continue
        if tidy and tidy[-1][1] is mark:
            tidy[-1] = (tidy[-1][0] + length, mark)
        else:
            tidy.append((length, mark))
    made._runs = tuple(tidy)
    return made


def _runs_of(text: str) -> tuple[tuple[int, Mark], ...]:
    if isinstance(text, Marked):
        return text._runs
    return ((len(text), SAID),) if text else ()


def marks_of(text: str) -> tuple[Mark, ...]:
    """The mark of each character; SAID for all of an ordinary string."""
    return tuple(mark for length, mark in _runs_of(text) for _ in range(length))


def is_written(text: str) -> bool:
    """Whether some of it are tokens that the model wrote."""
    return any(isinstance(mark, Written) for _, mark in _runs_of(text))


def joined(texts: Iterable[str], skip: int = 0) -> Marked:
    """The texts after the first `skip`, as one."""
    pieces = list(texts)[skip:]
    return _with_runs("".join(pieces), chain.from_iterable(map(_runs_of, pieces)))


def parts(text: str, split: Callable[[str], Sequence[int | str]]) -> list[Part]:
    """What to encode of a marked text: its control tokens, texts, and ids the model wrote.

    split  a text -> the ids of control tokens it spells and the texts between; asked only of
           stretches that the template alone wrote
    """
    found: list[Part] = []
    place = 0
    for length, mark in _runs_of(text):
        piece = str.__getitem__(text, slice(place, place := place + length))
        if isinstance(mark, Written) and piece == mark.text:
            if found and isinstance(found[-1], tuple):
                found[-1] = (*found[-1], *mark.ids)
            else:
                found.append(mark.ids)
            continue
        for part in split(piece) if mark is OWN else [piece]:
            if isinstance(part, str) and found and isinstance(found[-1], str):
                found[-1] += part
            else:
                found.append(part)
    return found


def marked_inside(value: Any) -> Any:
    """`value` with every string in its lists and mappings marked; what it has already stays."""
    if isinstance(value, str):
        return Marked(value)
    if isinstance(value, Mapping):
        return {key: marked_inside(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [marked_inside(inner) for inner in value]
    return value
