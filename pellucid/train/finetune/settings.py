"""The settings of a fine-tuning run: from flags to one resolved set, to its file, and back."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pellucid.train import fields
from pellucid.train.fields import setting

CONFIG = "config.toml"  # in a run's folder
# What may be changed when a run goes on: nothing that changes its steps.
MAY_CHANGE = {"device", "save_every", "merge"}

Kind = Literal["text", "instructions", "classification", "preferences"]


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Every setting of a fine-tuning run; None where the value depends on others."""

    model: str = setting("demo", "folder, owner/name or a demo", section="finetune", flag="")
    data: list[str] | None = setting(
        None, "examples: JSON, JSON lines, CSV; or text files, folders", group="data"
    )
    kind: Kind | None = setting(None, "what the data is", "by its keys", flag="--as")
    separator: str | None = setting(None, "what stands between documents of a text file", "none")
    eval_data: list[str] | None = setting(None, "examples to judge by", "a share of the data")
    hold_out: float = setting(0.1, "share of the data to judge by")
    context: int | None = setting(None, "most tokens of a row", "the model's, at most 1024")
    pack: bool = setting(True, "several examples in a row, none of which sees another")
    lora: int | None = setting(
        None, "rank of adapters", "none: the whole model", group="what is trained"
    )
    alpha: float | None = setting(None, "adapters times alpha / rank", "2 × rank")
    adapter: str | None = setting(None, "go on from the adapters in this folder")
    lora_dropout: float | None = setting(None, "of what adapters read")
    targets: list[str] | None = setting(
        None, "attention, mlp, all, or module globs", "all", metavar="TEXT"
    )
    last_blocks: int | None = setting(None, "only the last N blocks; 0: a new head alone", "all")
    beta: float = setting(0.1, "how near to stay to the start", group="preferences")
    label_smoothing: float = setting(0.0, "share of pairs the wrong way round")
    epochs: float = setting(3.0, "times over the data, unless --steps", group="training")
    steps: int | None = setting(None, "optimiser steps", "by the epochs")
    batch: int = setting(16, "rows of a step")
    micro_batch: int | None = setting(None, "rows in memory at a time", "all")
    lr: float | None = setting(None, "highest learning rate", "by what is trained")
    warmup: int | None = setting(None, "steps up to it", "3 in 100")
    weight_decay: float = setting(0.0, "of matrices")
    clip: float = setting(1.0, "longest gradient; 0: any")
    seed: int = setting(1, "of batches, dropout, adapters and the split")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of products; auto: bfloat16 where the processor has it"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, "of weights that adapters leave as they are", "as stored"
    )
    device: str = setting("cpu", "cpu, cuda, cuda:1 …")
    eval_every: int | None = setting(None, "steps between evaluations", "10 in all")
    patience: int = setting(0, "evaluations without a better one to end at; 0: none")
    save_every: int = setting(200, "steps between checkpoints; 0: at the end only")
    merge: bool = setting(False, "write the model with its adapters in OUT/merged")


def dump(settings: FinetuneSettings) -> str:
    """The settings as TOML; what is None is left out."""
    return fields.dump(settings, "A fine-tuning run.")


def resolve(given: Mapping[str, Any]) -> FinetuneSettings:
    """The defaults, over them what is `given`; paths made absolute, for a later ``--resume``.

    Raises ValueError for a value of the wrong kind, and for settings that exclude each other.
    """
    settings = FinetuneSettings(**_absolute(_checked(given)))
    _check_exclusive(settings)
    return settings


def read(path: Path) -> FinetuneSettings:
    """What `dump` wrote; FileNotFoundError where there is none, ValueError for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path.parent} holds no run (no {CONFIG} in it)")
    text = path.read_text(encoding="utf-8")
    try:
        found = tomllib.loads(text)["finetune"]
    except (tomllib.TOMLDecodeError, KeyError, RecursionError):
        raise ValueError(f"--resume: {path} is not of a fine-tuning run") from None
    unknown = found.keys() - {row.name for row in fields.rows(FinetuneSettings)}
    if unknown or "model" not in found:
        raise ValueError(f"{path}: no setting {min(unknown, default='model')!r} is known")
    return FinetuneSettings(**fields.parse(text, str(path), FinetuneSettings))


def resumed(out: Path, given: Mapping[str, Any]) -> FinetuneSettings:
    """The settings of the run in `out`; what is `given` may change only what changes no step."""
    written = read(out / CONFIG)
    for name, value in _absolute(_checked(given)).items():
        before = getattr(written, name)
        if name not in MAY_CHANGE and value != before:
            raise ValueError(
                f"--resume goes on with {out / CONFIG}, where {name} is {before!r}, not "
                f"{value!r}: leave it out"
            )
        written = replace(written, **{name: value})
    return written


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    known = {row.name: row for row in fields.rows(FinetuneSettings)}
    for name in given:
        if name not in known:
            raise ValueError(f"no setting {name!r}{fields.nearest(name, list(known))}")
    return {name: known[name].checked(value, known[name].flag) for name, value in given.items()}


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(given)
    for name in found.keys() & {"data", "eval_data"}:
        found[name] = [str(Path(path).resolve()) for path in found[name] or ()] or None
    if found.get("adapter") is not None:  # links stay: OUT/adapter leads to the best checkpoint
        found["adapter"] = str(Path(found["adapter"]).absolute())
    if "model" in found and Path(found["model"]).is_dir():
        found["model"] = str(Path(found["model"]).resolve())
    return found


def _check_exclusive(settings: FinetuneSettings) -> None:
    if not settings.data:
        raise ValueError("nothing to learn from: give --data FILE")
    if settings.lora is None and settings.adapter is None:
        for name in ("alpha", "targets", "lora_dropout", "merge", "dtype"):
            if getattr(settings, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is about adapters: give --lora RANK or --adapter DIR")
    elif settings.last_blocks is not None:
        given = "--lora" if settings.adapter is None else "--adapter"
        raise ValueError(f"{given} and --last-blocks are two ways to train a part: give one")
    if settings.adapter is not None and settings.targets:
        raise ValueError("--adapter says which layers are adapted: leave out --targets")
