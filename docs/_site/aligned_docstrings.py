"""Docstrings for the site: a block of aligned `name   text` lines becomes a table.

In the source such a block reads as a table by its columns alone; Markdown would join its lines.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROW = re.compile(r"(?P<name>\S+(?: \S+)*?) {2,}(?P<text>\S.*)")


def with_tables(text: str) -> str:
    """The docstring with every block of aligned lines as a Markdown table.

    >>> print(with_tables("Title.\\n\\na     first\\n      goes on\\nlong  second"))
    Title.
    <BLANKLINE>
    | | |
    |---|---|
    | `a` | first goes on |
    | `long` | second |
    <BLANKLINE>
    """
    lines: list[str] = []
    rows: list[list[str]] = []
    fenced = False
    for line in [*text.splitlines(), ""]:
        fenced ^= line.lstrip().startswith("```")
        row = None if fenced or line.startswith(" ") else _ROW.fullmatch(line)
        if row:
            rows.append([row["name"], row["text"]])
        elif rows and line.startswith("  "):  # goes on below its text
            rows[-1][1] += " " + line.strip()
        else:
            lines += [*_table(rows), line]
            rows = []
    return "\n".join(lines[:-1])


def _table(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    body = [f"| `{name.strip('`')}` | {text} |" for name, text in cells]
    return ["| | |", "|---|---|", *body, ""]


class AlignedDocstrings(griffe.Extension):
    """Rewrites each docstring as it is read from the source."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = with_tables(obj.docstring.value)
