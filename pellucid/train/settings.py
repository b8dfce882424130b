"""The settings of a training run: from TOML files and flags to one resolved set, and back.

    defaults  <  preset  <  config file  <  flags            the later one wins

The rows of `SETTINGS` are the only list there is. The command line makes its flags of them, `read`
checks a file against them, and `write` puts down what a run really used, which `read` takes again.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from argparse import Namespace
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pellucid.train.settings_table import SECTIONS, SETTINGS, Setting, Value

DEFAULT_STEPS = 1600
BY_NAME = {setting.name: setting for setting in SETTINGS}
_ELSEWHERE = {  # what other trainers call it
    "learning_rate": "lr",
    "batch_size": "batch",
    "max_iters": "steps",
    "block_size": "context",
    "n_layer": "layers",
    "n_head": "heads",
    "n_embd": "width",
}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a text or a list of texts",
}


def defaults() -> dict[str, Value]:
    """Every setting as it is where nobody says anything."""
    return {setting.name: setting.default for setting in SETTINGS}


def presets() -> list[str]:
    """Names of the recipes that ship with the package."""
    files = resources.files("pellucid.train").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def preset(name: str) -> dict[str, Value]:
    """The settings of a shipped recipe; ValueError that lists them for a name that is none."""
    if name not in presets():
        raise ValueError(f"no preset is called {name!r}: expected one of {', '.join(presets())}")
    file = resources.files("pellucid.train").joinpath("presets", f"{name}.toml")
    return parse(file.read_text(encoding="utf-8"), f"preset {name}")


def read(path: str | Path) -> dict[str, Value]:
    """The settings in a TOML file, checked; those it does not name are not in the result.

    Raises OSError where there is no file, ValueError for one that is no TOML, a key that is no
    setting (with the nearest that is one) and a value of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    return parse(path.read_text(encoding="utf-8"), str(path))


def parse(text: str, where: str) -> dict[str, Value]:
    """As `read`, from text that an error calls `where`."""
    try:
        document: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not TOML: {error}") from None
    found: dict[str, Value] = {}
    for section, inside in document.items():
        if section not in SECTIONS:
            raise ValueError(f"{where}: no section [{section}]{_nearest(section, SECTIONS)}")
        if not isinstance(inside, dict):
            raise ValueError(f"{where}: {section} is a section, [{section}], with settings in it")
        for name, value in inside.items():
            found[name] = checked(_setting(section, name, where), value, where)
    return found


def _setting(section: str, name: str, where: str) -> Setting:
    here = [setting.name for setting in SETTINGS if setting.section == section]
    if name in here:
        return BY_NAME[name]
    if name in BY_NAME:
        raise ValueError(f"{where}: {name} belongs into [{BY_NAME[name].section}], not [{section}]")
    raise ValueError(f"{where}: [{section}] has no setting {name!r}{_nearest(name, [*BY_NAME])}")


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    near = _ELSEWHERE.get(name) or difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return f"; did you mean {near!r}?"


def checked(setting: Setting, value: Any, where: str) -> Value:
    """`value` as the setting's kind; ValueError where it is of another, or not among its choices.

    A whole number stands for a number too, and a text for a list of one.
    """
    if setting.kind is float and type(value) is int:
        value = float(value)
    if setting.kind is list and isinstance(value, str):
        value = [value]
    if type(value) is not setting.kind or not _sound(value):
        expected = _KINDS[setting.kind]
        raise ValueError(f"{where}: {setting.name} = {value!r}: expected {expected}")
    if setting.choices and value not in setting.choices:
        expected = ", ".join(setting.choices)
        raise ValueError(f"{where}: {setting.name} = {value!r}: expected one of {expected}")
    return value


def _sound(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return not isinstance(value, float) or math.isfinite(value)


def dump(settings: Mapping[str, Value], title: str = "") -> str:
    """The settings as TOML, in the order of the table; what is None is left out."""
    lines = [f"# {title}", ""] if title else []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for setting in SETTINGS:
            value = settings.get(setting.name)
            if setting.section == section and value is not None:
                # JSON's numbers, strings and lists of strings are TOML's.
                shown = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{setting.name} = {shown}")
        lines.append("")
    return "\n".join(lines)


# Of a model that begins from random weights; with `init` all of it comes from that model.
FROM_INIT = (
    "family",
    "width",
    "layers",
    "heads",
    "kv_heads",
    "hidden",
    "context",
    "qkv_bias",
    "tied",
    "start",
    "tokenizer",
)


def resolve(given: Mapping[str, Value]) -> Namespace:
    """All settings, the `given` ones over the defaults; ValueError where two exclude each other."""
    whole = Namespace(**(defaults() | dict(given)))
    if bool(whole.data) == whole.stdlib:
        raise ValueError("what to train on: give either data, files and folders of text, or stdlib")
    if whole.steps is not None and whole.epochs is not None:
        raise ValueError(f"{whole.steps} steps and {whole.epochs} epochs: give one of them")
    if whole.epochs is None and whole.steps is None:
        whole.steps = DEFAULT_STEPS
    if whole.init is not None:
        for name in FROM_INIT:
            if given.get(name) is not None:
                flag = BY_NAME[name].flag
                raise ValueError(f"init brings its own shape and tokenizer: leave out {flag}")
            setattr(whole, name, None)
    return _absolute(whole)


def _absolute(settings: Namespace) -> Namespace:
    """Paths that lead to the same place wherever the run is resumed."""
    if settings.data is not None:
        settings.data = [os.path.abspath(path) for path in settings.data]
    for name in ("tokenizer", "tokens", "init"):
        path = getattr(settings, name)
        if path is not None and (name == "tokens" or Path(path).exists()):
            setattr(settings, name, os.path.abspath(path))
    return settings
