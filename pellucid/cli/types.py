"""Texts from the command line as values; argparse makes one line of what these functions refuse."""

from __future__ import annotations

import argparse
import re
from decimal import Decimal

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def words(text: str) -> tuple[str, ...]:
    """``"a,b"`` -> ("a", "b")."""
    return tuple(text.split(","))


def token_rows(text: str) -> list[list[int]]:
    """``"1,2,3;4,5"`` -> [[1, 2, 3], [4, 5]]."""
    try:
        rows = [[int(word) for word in row.replace(",", " ").split()] for row in text.split(";")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"token ids are numbers, not {text!r}") from None
    if not all(rows):
        raise argparse.ArgumentTypeError("a row without token ids")
    return rows


def count(text: str) -> int:
    """``"3"`` -> 3; not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number from 0 on, not {text!r}")
    return int(text)


def byte_size(text: str) -> int:
    """A number of bytes: 500M, 5GB, 5000000000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.upper())
    size = int(Decimal(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500M or 5G")
    return size
