"""A dataclass of settings as a TOML file and back, and what the command line makes its flags of.

A field says its type (a Literal lists choices), its default, and in its metadata a line of help,
what None stands for, and from where on a new section begins. There is no other list.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pellucid.files import parse_toml

S = TypeVar("S", bound=Any)  # a dataclass of settings
C = TypeVar("C", bound=Callable[..., Any])
_KINDS = {
    bool: "true or false",
    int: "a whole number below 2^63",
    float: "a number",
    str: "a text",
    list: "a text or a list of texts",
}


def setting(
    default: Any,
    help: str,
    otherwise: str = "",
    *,
    section: str = "",
    group: str = "",
    flag: str | None = None,
    metavar: str = "",
) -> Any:
    """A field of a dataclass of settings.

    help       one line
    otherwise  what None stands for
    section    of the TOML file, which begins with this field
    group      of flags, which begins with this field; the section's name unless given
    flag       on the command line; made of the name unless given, "" for none
    metavar    what a text is called in the help: TEXT, and PATH in a list, unless given
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "otherwise": otherwise,
            "section": section,
            "group": group,
            "flag": flag,
            "metavar": metavar,
        },
    )


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """One setting: ``[section] name = …`` in a file, ``--name`` with dashes as a flag.

    kind     type of its value: bool, int, float, str, or list for a list of texts
    default  the value unless another is given; None where that depends on other settings
    shown    the line of help, with the default or what None stands for behind it
    """

    section: str
    group: str
    name: str
    kind: type
    choices: tuple[str, ...]
    default: Any
    help: str
    otherwise: str
    flag: str
    metavar: str

    @property
    def shown(self) -> str:
        """The line of help with the default behind it."""
        default = self.default
        if default is None:
            said = self.otherwise or "none"
        elif self.kind is bool:
            said = "yes" if default else "no"
        else:
            said = f"{default:g}" if self.kind in (int, float) else default
        return f"{self.help} (default: {said})"

    def checked(self, value: Any, where: str) -> Any:
        """`value` as this kind; ValueError where it is of another, or not among the choices.

        A whole number stands for a number too, and a text for a list of one; None where the
        default is None.
        """
        if value is None and self.default is None:
            return None
        if self.kind is float and type(value) is int:
            value = _float(value)
        if self.kind is list and isinstance(value, str):
            value = [value]
        if type(value) is not self.kind or not _is_sound(value):
            expected = _KINDS[self.kind]
            raise ValueError(f"{where}: {self.name} = {value!r}: expected {expected}")
        if self.choices and value not in self.choices:
            expected = ", ".join(self.choices)
            raise ValueError(f"{where}: {self.name} = {value!r}: expected one of {expected}")
        return value


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf  # which is refused as every other


def _is_sound(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return not isinstance(value, float) or math.isfinite(value)


def rows(kind: type) -> Iterator[SettingRow]:
    """The settings of a dataclass, in order."""
    hints, section, group = get_type_hints(kind), "", ""
    for each in fields(kind):
        about = each.metadata
        section = about["section"] or section
        group = about["group"] or (f"[{section}]" if about["section"] else group)
        hint = hints[each.name]
        if get_origin(hint) in (UnionType, Union):  # the second of a Literal and None
            (hint,) = (part for part in get_args(hint) if part is not NoneType)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        assert each.default is not MISSING, f"{each.name} has a default"
        flag = flag_of(each.name) if about["flag"] is None else about["flag"]
        yield SettingRow(
            section=section,
            group=group,
            name=each.name,
            kind=str if choices else get_origin(hint) or hint,
            choices=choices,
            default=each.default,
            help=about["help"],
            otherwise=about["otherwise"],
            flag=flag,
            metavar=about["metavar"],
        )


def states_settings(kind: type) -> Callable[[C], C]:
    """For a function with ``**settings``: its signature names each setting of `kind`."""

    def decorate(function: C) -> C:
        stated = signature(function)
        own = {k: v for k, v in stated.parameters.items() if v.kind is not Parameter.VAR_KEYWORD}
        named = [
            Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in fields(kind)
            if each.name not in own
        ]
        vars(function)["__signature__"] = stated.replace(parameters=[*own.values(), *named])
        return function

    return decorate


def parse(
    text: str, where: str, kind: type, elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The settings in TOML text, checked, which an error calls `where`.

    elsewhere  what others call a setting -> its name, for the hint in an error

    Raises ValueError, in one line, for what is no TOML, no setting, or of the wrong kind.
    """
    document = parse_toml(text, where)
    known = {row.name: row for row in rows(kind)}
    sections = list(dict.fromkeys(row.section for row in known.values()))
    found: dict[str, Any] = {}
    for section, inside in document.items():
        if section not in sections:
            raise ValueError(f"{where}: no section [{section}]{nearest(section, sections)}")
        if not isinstance(inside, dict):
            raise ValueError(f"{where}: {section} is a section, [{section}], with settings in it")
        for name, value in inside.items():
            if name not in known:
                near = nearest(name, list(known), elsewhere or {})
                raise ValueError(f"{where}: [{section}] has no setting {name!r}{near}")
            row = known[name]
            if row.section != section:
                raise ValueError(f"{where}: {name} belongs into [{row.section}], not [{section}]")
            found[name] = row.checked(value, where)
    return found


def checked(
    given: Mapping[str, Any], kind: type, elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Settings that are given by name, each of its kind; ValueError for one that is unknown."""
    known = {row.name: row for row in rows(kind)}
    for name in given:
        if name not in known:
            raise ValueError(f"no setting {name!r}{nearest(name, list(known), elsewhere)}")
    return {name: known[name].checked(value, known[name].flag) for name, value in given.items()}


def changed(written: S, given: Mapping[str, Any], may_change: Collection[str], path: Path) -> S:
    """The settings `written` in the file at `path`, with those of `given` that may change.

    ValueError, in one line, where another setting would.
    """
    for name, value in given.items():
        before = getattr(written, name)
        if name not in may_change and value != before:
            raise ValueError(
                f"--resume goes on with {path}, where {name} is {before!r}, not {value!r}: leave "
                f"out {flag_of(name)}"
            )
    return replace(written, **given)


def flag_of(name: str) -> str:
    """``--micro-batch`` of ``micro_batch``."""
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Sequence[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """``; did you mean 'lr'?``: the known name that is most like `name`."""
    near = (elsewhere or {}).get(name)
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return f"; did you mean {near!r}?"


def dump(settings: Any, title: str = "", leave_out: Collection[str] = ()) -> str:
    """The settings as TOML, in order; what is None is left out."""
    lines, section = [f"# {title}", ""] if title else [], ""
    for row in rows(type(settings)):
        if row.section != section:
            lines += [""] if section else []
            lines.append(f"[{row.section}]")
            section = row.section
        value = getattr(settings, row.name)
        if value is not None and row.name not in leave_out:
            # JSON's numbers, strings and lists of strings are TOML's.
            shown = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{row.name} = {shown}")
    return "\n".join([*lines, ""])
