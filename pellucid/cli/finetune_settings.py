"""Every setting of a fine-tuning run, one row each: flags, and the file that a run writes."""

from __future__ import annotations

import argparse
import json
import tomllib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "config.toml"
KINDS = ("text", "instructions", "classification", "preferences")


@dataclass(frozen=True)
class Setting:
    """One setting: ``name = …`` in the file, ``--name`` with dashes as a flag.

    kind     type of its value; list for several texts, bool for a switch
    default  the value where nobody says anything; None where that depends on others
    help     one line; what None stands for stands in brackets
    """

    group: str
    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        """As on the command line."""
        return "--as" if self.name == "kind" else "--" + self.name.replace("_", "-")


SETTINGS = (
    Setting("data", "data", list, None, "examples: JSON, JSON lines, CSV; or text files, folders"),
    Setting("data", "kind", str, None, "what the data is (by its keys)", KINDS),
    Setting("data", "eval_data", list, None, "examples to judge by (a share of the data)"),
    Setting("data", "hold_out", float, 0.1, "share of the data to judge by"),
    Setting("data", "context", int, None, "most tokens of a row (the model's, at most 1024)"),
    Setting("data", "pack", bool, True, "several examples in a row, none of which sees another"),
    Setting("what is trained", "lora", int, None, "rank of adapters (none: the whole model)"),
    Setting("what is trained", "alpha", float, None, "adapters times alpha / rank (2 × rank)"),
    Setting("what is trained", "adapter", str, None, "go on from the adapters in this folder"),
    Setting("what is trained", "lora_dropout", float, None, "of what adapters read (none)"),
    Setting("what is trained", "targets", list, None, "attention, mlp, all, or module globs (all)"),
    Setting(
        "what is trained", "last_blocks", int, None, "only the last N blocks; 0: a new head alone"
    ),
    Setting("preferences", "beta", float, 0.1, "how near to stay to the start"),
    Setting("preferences", "label_smoothing", float, 0.0, "share of pairs the wrong way round"),
    Setting("training", "epochs", float, 3.0, "times over the data, unless --steps"),
    Setting("training", "steps", int, None, "optimiser steps (by the epochs)"),
    Setting("training", "batch", int, 16, "rows of a step"),
    Setting("training", "micro_batch", int, None, "rows in memory at a time (all)"),
    Setting("training", "lr", float, None, "highest learning rate (by what is trained)"),
    Setting("training", "warmup", int, None, "steps up to it (3 in 100)"),
    Setting("training", "weight_decay", float, 0.0, "of matrices"),
    Setting("training", "clip", float, 1.0, "longest gradient; 0: any"),
    Setting("training", "seed", int, 1, "of batches, dropout, adapters and the split"),
    Setting(
        "training",
        "precision",
        str,
        "auto",
        "of products; auto: bfloat16 where the processor has it",
        ("auto", "float32", "bfloat16"),
    ),
    Setting(
        "training",
        "dtype",
        str,
        None,
        "of weights that adapters leave as they are (as stored)",
        ("float32", "bfloat16", "float16"),
    ),
    Setting("training", "device", str, "cpu", "cpu, cuda, cuda:1 …"),
    Setting("training", "eval_every", int, None, "steps between evaluations (10 in all)"),
    Setting("training", "patience", int, 0, "evaluations without a better one to end at; 0: none"),
    Setting("training", "save_every", int, 200, "steps between checkpoints; 0: at the end only"),
    Setting("training", "merge", bool, False, "write the model with its adapters in OUT/merged"),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}
# What may be changed when a run goes on: nothing that changes its steps.
MAY_CHANGE = {"device", "save_every", "merge"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, absent from the namespace unless given."""
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(_groups())}
    for setting in SETTINGS:
        shown = setting.help
        if setting.default is not None and setting.kind is not bool:
            shown += (
                f" ({setting.default:g})" if setting.kind is not str else f" ({setting.default})"
            )
        options: dict[str, Any] = {
            "help": shown,
            "dest": setting.name,
            "default": argparse.SUPPRESS,
        }
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction if setting.default else "store_true"
        elif setting.kind is list:
            options |= {"nargs": "+", "metavar": "TEXT" if setting.name == "targets" else "PATH"}
        elif setting.choices:
            options["choices"] = setting.choices
        else:
            options |= {"type": setting.kind, "metavar": "N" if setting.kind is not str else "TEXT"}
        groups[setting.group].add_argument(setting.flag, **options)


def _groups() -> list[str]:
    return [setting.group for setting in SETTINGS]


def given(arguments: Namespace) -> dict[str, Any]:
    """The settings that stand on the command line, the model among them."""
    found = {s.name: getattr(arguments, s.name) for s in SETTINGS if hasattr(arguments, s.name)}
    for name in found.keys() & {"data", "eval_data"}:
        found[name] = [str(Path(path).resolve()) for path in found[name]]  # for a later --resume
    if "adapter" in found:  # links stay links: OUT/adapter leads to the best checkpoint
        found["adapter"] = str(Path(found["adapter"]).absolute())
    if arguments.model is not None:
        folder = Path(arguments.model)
        found["model"] = str(folder.resolve()) if folder.is_dir() else arguments.model
    return found


def defaults() -> dict[str, Any]:
    """Every setting as it is where nobody says anything."""
    return {"model": "demo"} | {setting.name: setting.default for setting in SETTINGS}


def dump(settings: Mapping[str, Any]) -> str:
    """The settings as TOML; what is None is left out."""
    lines = ["# A fine-tuning run.", "", "[finetune]"]
    for name in ("model", *BY_NAME):
        if settings[name] is not None:
            # JSON's numbers, strings and lists of strings are TOML's.
            lines.append(f"{name} = {json.dumps(settings[name], ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, Any]:
    """The settings that `dump` wrote; OSError where there are none, ValueError for other files."""
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path.parent} holds no run (no {CONFIG} in it)")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))["finetune"]
    except (tomllib.TOMLDecodeError, KeyError):
        raise ValueError(f"--resume: {path} is not of a fine-tuning run") from None
    unknown = found.keys() - BY_NAME.keys() - {"model"}
    if unknown or "model" not in found:
        raise ValueError(f"{path}: no setting {min(unknown, default='model')!r} is known")
    return defaults() | found


def resumed(arguments: Namespace) -> Namespace:
    """The settings of the run in ``--out``; flags may change only what changes no step."""
    written = read(arguments.out / CONFIG)
    for name, value in given(arguments).items():
        if name not in MAY_CHANGE and value != written[name]:
            raise ValueError(
                f"--resume goes on with {arguments.out / CONFIG}, where {name} is "
                f"{written[name]!r}, not {value!r}: leave it out"
            )
        written[name] = value
    return Namespace(**written)
