"""Settings on the command line: a flag for every field of a dataclass of settings."""

from __future__ import annotations

import argparse
from typing import Any

from pellucid.train.fields import rows


def add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """A flag for each setting of `kind`, absent unless given: a file's value is not overruled."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for row in rows(kind):
        if not row.flag:
            continue
        if row.group not in groups:
            groups[row.group] = parser.add_argument_group(row.group)
        options: dict[str, Any] = {
            "help": row.shown.replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "dest": row.name,
        }
        if row.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif row.kind is list:
            options |= {"nargs": "+", "metavar": row.metavar or "PATH", "action": "extend"}
        elif row.choices:
            options["choices"] = row.choices
        else:
            options |= {
                "type": row.kind,
                "metavar": (row.metavar or "TEXT") if row.kind is str else "N",
            }
        groups[row.group].add_argument(row.flag, **options)


def given(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The settings that stand on the command line."""
    found = vars(arguments)
    return {row.name: found[row.name] for row in rows(kind) if row.flag and row.name in found}
