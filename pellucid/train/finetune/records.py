"""Files of examples: JSON, JSON lines or CSV, each example a dictionary, and what they are for."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pellucid.files import parse_json
from pellucid.train.data.documents import decoded

Record = Mapping[str, Any]


class Located(dict[str, Any]):
    """An example with its place in a file, such as ``FILE, line 12``."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        super().__init__(fields)
        self.where = where


# What the keys of an example say it is for. The first that has all of its keys counts.
KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "preferences": (("chosen", "rejected"),),
    "instructions": (
        ("messages",),
        ("conversations",),
        ("prompt", "completion"),
        ("instruction", "output"),
    ),
    "classification": (("text", "label"),),
    "text": (("text",),),
}


def read_records(path: str | Path) -> list[Located]:
    """The examples in a file: a JSON list, JSON lines, or CSV with a line of column names.

    Raises OSError for a file that is not there, and ValueError, with the line, for one that is not
    what its name says or holds no examples.
    """
    path = Path(path)
    if path.is_dir() or not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of examples")
    text = decoded(path.read_bytes(), path)
    if path.suffix == ".csv":
        records = list(_from_csv(text, path))
    elif text.lstrip().startswith("["):
        found = enumerate(parse_json(text, str(path)), start=1)
        records = [_checked(record, f"{path}, example {number}") for number, record in found]
    else:
        records = list(_from_lines(text, path))
    if not records:
        raise ValueError(f"{path} has no examples in it")
    return records


def _from_csv(text: str, path: Path) -> Iterator[Located]:
    # Not splitlines: it takes form feeds and Unicode's separators for ends of lines, too.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or [])} "
                    f"fields, {', '.join(reader.fieldnames or [])}"
                )
            yield Located(record, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _from_lines(text: str, path: Path) -> Iterator[Located]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _checked(parse_json(line, where), where)


def _checked(record: Any, where: str) -> Located:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found a {type(record).__name__}")
    return Located(record, where)


def place_of(record: Record, number: int) -> str:
    """Where an example stands in its file, or its number where it comes from none."""
    return record.where if isinstance(record, Located) else f"example {number}"


def kind_of(record: Record) -> str:
    """What an example is for, by its keys; ValueError where they do not say."""
    for kind, choices in KINDS.items():
        if any(all(key in record for key in keys) for keys in choices):
            return kind
    known = "; ".join(
        f"{kind}: {' or '.join(' + '.join(keys) for keys in choices)}"
        for kind, choices in KINDS.items()
    )
    raise ValueError(f"an example with {', '.join(record) or 'no keys'}: expected {known}")


def text_of(record: Record, key: str, where: str, default: str | None = None) -> str:
    """The text under a key; ValueError, beginning with `where`, for what is no text."""
    value = record.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} is {str(value)[:60]!r}; expected text")
    return value
