"""The known word that a mistyped one probably means."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_SIMILARITY = 0.6  # difflib's own threshold: below it a suggestion is noise


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The word of `known` that is most like `word`, letter case aside; None where none is near."""
    spelt = {each.lower(): each for each in known}
    found = get_close_matches(word.lower(), spelt, n=1, cutoff=_SIMILARITY)
    return spelt[found[0]] if found else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of an error message: ``; did you mean walk?``, or nothing where no word is near."""
    found = nearest(word, known)
    return f"; did you mean {found}?" if found else ""
