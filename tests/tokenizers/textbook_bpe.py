"""Byte-pair encoding as in the textbook: slow, obvious, and independent of every engine in use."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import regex


def train(text: str, pattern: str, merges: int) -> dict[bytes, int]:
    """Ranks: the 256 bytes, then the most frequent pair, again and again."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in piece.encode()] for piece in regex.findall(pattern, text)]
    while len(ranks) < 256 + merges:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            break
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        ranks.setdefault(left + right, len(ranks))
        words = [_merge(word, left, right) for word in words]
    return ranks


def encode(text: str, pattern: str, ranks: dict[bytes, int]) -> list[int]:
    """Cut into pieces; in each, merge the neighbours that make the lowest rank until none do."""
    ids: list[int] = []
    for piece in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [(a, b) for a, b in pairwise(parts) if a + b in ranks]
            if not pairs:
                break
            parts = _merge(parts, *min(pairs, key=lambda pair: ranks[pair[0] + pair[1]]))
        ids += [ranks[part] for part in parts]
    return ids


def encode_by_list(piece: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """One piece by a list of merges: of the pairs at hand, the one that comes first in the list."""
    order = {pair: place for place, pair in reversed(list(enumerate(merges)))}
    parts = [bytes([byte]) for byte in piece]
    while pairs := [pair for pair in pairwise(parts) if pair in order]:
        parts = _merge(parts, *min(pairs, key=order.__getitem__))
    return parts


def _merge(parts: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    """Every `left` that `right` follows becomes one part, from the left to the right."""
    merged: list[bytes] = []
    at = 0
    while at < len(parts):
        if parts[at : at + 2] == [left, right]:
            merged.append(left + right)
            at += 2
        else:
            merged.append(parts[at])
            at += 1
    return merged
