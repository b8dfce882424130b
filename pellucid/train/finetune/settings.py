"""The settings of a fine-tuning run: from flags to one resolved set, to its file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pellucid.files import parse_toml, read_text
from pellucid.train import fields
from pellucid.train.fields import setting

CONFIG = "config.toml"  # in a run's folder
# What may be changed when a run goes on: nothing that changes its steps.
MAY_CHANGE = {"device", "save_every", "merge"}

Kind = Literal["text", "instructions", "classification", "preferences"]


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Every setting of a fine-tuning run; None where the value depends on others."""

    model: str = setting(
        "demo",
        "model to fine-tune: a folder, owner/name on the Hub, or a demo",
        section="finetune",
        flag="",
    )
    data: list[str] | None = setting(
        None,
        "examples as JSON, JSON lines or CSV; or text files and folders of them",
        "none",
        group="data",
    )
    kind: Kind | None = setting(None, "what the examples teach", "told by their keys", flag="--as")
    separator: str | None = setting(
        None, "text between two documents of a text file", "none: a file is one document"
    )
    eval_data: list[str] | None = setting(
        None, "examples to evaluate on", "a share of the data, --hold-out"
    )
    hold_out: float = setting(0.1, "share of the data that is kept for validation")
    context: int | None = setting(
        None, "largest number of tokens in a row", "the model's context, at most 1024"
    )
    pack: bool = setting(True, "put several examples into a row, none of which sees another")
    lora: int | None = setting(
        None,
        "rank of the LoRA adapters to train",
        "none: the whole model is trained",
        group="what is trained",
    )
    alpha: float | None = setting(
        None, "scale of the adapters: they count alpha / rank times", "2 × rank"
    )
    adapter: str | None = setting(
        None, "folder of a LoRA adapter to go on from", "none", metavar="DIR"
    )
    lora_dropout: float | None = setting(
        None, "share of the adapters' inputs that dropout sets to 0", "0, or the adapter's own"
    )
    targets: list[str] | None = setting(
        None,
        "matrices that get adapters: attention, mlp, all, or globs of module names",
        "all",
        metavar="GLOB",
    )
    last_blocks: int | None = setting(
        None, "train the last N blocks only; 0 trains a new head alone", "all blocks"
    )
    beta: float = setting(
        0.1,
        "weight of staying near the first model, in the loss of preferences (DPO)",
        group="preferences",
    )
    label_smoothing: float = setting(
        0.0, "share of preference pairs that are assumed to be the wrong way round"
    )
    epochs: float = setting(3.0, "passes over the data, unless --steps is given", group="training")
    steps: int | None = setting(None, "number of optimiser steps", "those of --epochs")
    batch: int = setting(16, "rows of an optimiser step")
    micro_batch: int | None = setting(
        None,
        "rows in memory at a time; gradients add up to those of the batch",
        "all rows of the batch",
    )
    lr: float | None = setting(None, "highest learning rate", "chosen by what is trained")
    warmup: int | None = setting(
        None, "steps in which the learning rate rises to its highest value", "3 of 100 steps"
    )
    weight_decay: float = setting(
        0.0, "share of each matrix that AdamW takes off, per step and unit of learning rate"
    )
    clip: float = setting(
        1.0,
        "largest norm of a step's gradient, larger ones are scaled down to it; 0: no clipping",
    )
    seed: int = setting(1, "seed of batches, dropout, adapters and the split of the data")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "data type of matrix products; auto is bfloat16 where the processor has it"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None,
        "data type of the weights that adapters leave as they are",
        "as stored, or float32 where the processor multiplies no 16 bits and has room",
    )
    device: str = setting("cpu", "device to compute on: cpu, cuda, cuda:1 …", metavar="DEVICE")
    eval_every: int | None = setting(None, "steps between two evaluations", "10 evaluations in all")
    patience: int = setting(
        0, "evaluations without a better result before training ends early; 0 never ends early"
    )
    save_every: int = setting(200, "steps between two checkpoints; 0 saves at the end only")
    merge: bool = setting(False, "also write the model with its adapters merged into RUN/merged")


def dump(settings: FinetuneSettings) -> str:
    """The settings as TOML; what is None is left out."""
    return fields.dump(settings, "A fine-tuning run.")


def resolve(given: Mapping[str, Any]) -> FinetuneSettings:
    """The defaults, over them what is `given`; paths made absolute, for a later ``--resume``.

    Raises ValueError for a value of the wrong kind, and for settings that exclude each other.
    """
    settings = FinetuneSettings(**_absolute(fields.checked(given, FinetuneSettings)))
    _check_exclusive(settings)
    return settings


def read(path: Path) -> FinetuneSettings:
    """What `dump` wrote; FileNotFoundError where there is none, ValueError for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path.parent} holds no run (no {CONFIG} in it)")
    text = read_text(path)
    found = parse_toml(text, str(path)).get("finetune")
    if not isinstance(found, dict):
        raise ValueError(f"--resume: {path} is not of a fine-tuning run")
    unknown = found.keys() - {row.name for row in fields.rows(FinetuneSettings)}
    if unknown or "model" not in found:
        raise ValueError(f"{path}: no setting {min(unknown, default='model')!r} is known")
    return FinetuneSettings(**fields.parse(text, str(path), FinetuneSettings))


def resumed(out: Path, given: Mapping[str, Any]) -> FinetuneSettings:
    """The settings of the run in `out`; what is `given` may change only what changes no step."""
    settings = _absolute(fields.checked(given, FinetuneSettings))
    return fields.changed(read(out / CONFIG), settings, MAY_CHANGE, out / CONFIG)


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(given)
    for name in found.keys() & {"data", "eval_data"}:
        found[name] = [str(Path(path).resolve()) for path in found[name] or ()] or None
    if found.get("adapter") is not None:  # links stay: RUN/adapter leads to the best checkpoint
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
                flag = fields.flag_of(name)
                raise ValueError(f"{flag} is about adapters: give --lora RANK or --adapter DIR")
    elif settings.last_blocks is not None:
        given = "--lora" if settings.adapter is None else "--adapter"
        raise ValueError(f"{given} and --last-blocks are two ways to train a part: give one")
    if settings.adapter is not None and settings.targets:
        raise ValueError("--adapter says which layers are adapted: leave out --targets")
