"""Tokens that are given as text, as ids of A's tokenizer.

A server names tokens by their text. That is the token, but where several tokens look alike, or
where one is no whole character; then the way A itself splits the text decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.bytelevel import byte_characters

_BYTES = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ID = re.compile(r"token_id:(\d+)")


@dataclass(frozen=True)
class Name:
    """A token as an engine gives it: by its text, its bytes, its id, or several of these."""

    text: str
    data: bytes | None = None
    id: int | None = None


def ids_of(
    names: Sequence[Name], tokenizer: Tokenizer | None, expected: Sequence[int], where: str
) -> list[int]:
    """The id of each token; `expected`, the ids as A splits the text, decides between twins.

    ValueError for a name that is no token of A, or that may be several.
    """
    if tokenizer is None:
        found = [name.id for name in names]
        if None in found:
            raise ValueError(f"{where}: tokens are given as text, and A has no tokenizer")
        return [id for id in found if id is not None]
    known = [candidates(name, tokenizer) for name in names]
    if len(expected) == len(names) and all(
        ids is None or id in ids for ids, id in zip(known, expected, strict=True)
    ):
        return list(expected)
    chosen = []
    for place, (name, ids) in enumerate(zip(names, known, strict=True)):
        if not ids:
            said = f"{where}: token {place} is {name.text!r}, "
            if ids is None:
                raise ValueError(said + "no whole character: let the server return token ids")
            raise ValueError(
                said + "which is no token of A: do the server and the weights belong together?"
            )
        chosen.append(ids[0])
    return chosen


def candidates(name: Name, tokenizer: Tokenizer) -> list[int] | None:
    """Ids a name may stand for, [] for none; None for part of a character, which may be many."""
    given = _ID.fullmatch(name.text)
    id = int(given[1]) if given else name.id
    if id is not None:
        return [id] if 0 <= id < tokenizer.vocab_size else []
    table = _ids_by_bytes(tokenizer)
    if name.text in tokenizer.controls and name.data is None:
        return [tokenizer.controls[name.text]]
    for data in _readings(name):
        if data in table:
            return table[data]
    return None if "\ufffd" in name.text and name.data is None else []


def _readings(name: Name) -> list[bytes]:
    """The bytes that a name may mean: stated, escaped, as text, as the vocabulary writes them."""
    if name.data is not None:
        return [name.data]
    escaped, single = _BYTES.fullmatch(name.text), _BYTE.fullmatch(name.text)
    if escaped:
        return [bytes.fromhex(escaped[1].replace("\\x", ""))]
    readings = [name.text.encode("utf-8", "replace")]
    if single:
        readings.append(bytes.fromhex(single[1]))
    readings.append(name.text.replace("▁", " ").encode("utf-8", "replace"))
    characters = byte_characters()
    if all(letter in characters for letter in name.text):
        readings.append(bytes(characters[letter] for letter in name.text))
    return readings


@lru_cache(maxsize=4)
def _ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, list[int]]:
    table: dict[bytes, list[int]] = {}
    for id in range(tokenizer.vocab_size):
        if id not in tokenizer.unused_ids:
            table.setdefault(inner_bytes(tokenizer, id), []).append(id)
    return table


def inner_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """The bytes a token adds inside a text, where SentencePiece's leading space counts."""
    both, one = tokenizer.decode_bytes([id, id]), tokenizer.decode_bytes([id])
    return both[len(one) :]
