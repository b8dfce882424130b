"""Where a run stands, beyond its weights: what is needed to go on as if it had never stopped.

    training/
      state.safetensors  exp_avg.NAME, exp_avg_sq.NAME of every parameter; random.0.cpu
      state.json         step, tokens, seconds, best loss …, the index of the tensors, a checksum of
                         every file of the checkpoint and of the settings, and one of itself

Several processes write one file each, with the slices that they have (`slices`). Any number of
processes goes on from it, in any layout. The weights themselves are a model's folder in Hugging
Face's layout, in float32; `training` lies inside it. Nothing here is pickled; states that versions
before wrote are read by `older_state`. AdamW's groups and rates are not stored: they follow from
the settings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.files import read_json
from pellucid.models import Model
from pellucid.train import older_state, optim
from pellucid.train.config import TrainConfig
from pellucid.train.precision import device_of
from pellucid.train.ranks import Ranks
from pellucid.train.slices import (
    Slice,
    Slices,
    WrittenSlices,
    digest,
    joined_index,
    read_index,
    whole,
    write_slices,
)

FOLDER, FACTS = "training", "state.json"
FORMAT = 2
_MEANS = ("exp_avg", "exp_avg_sq")
_KINDS: dict[str, tuple[type, ...]] = {  # of the facts that a state is made of
    "step": (int,),
    "tokens": (int,),
    "seconds": (int, float),
    "best_loss": (int, float, type(None)),
    "evaluations_since_best": (int,),
    "data_ranks": (int,),
    "extra": (dict,),
    "optimizer_steps": (dict,),
}


@dataclass(kw_only=True)
class TrainState:
    """Steps done, the optimiser, the state of the random numbers, and the best loss so far.

    extra  values of the caller, saved and restored with the rest: plain JSON
    """

    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    evaluations_since_best: int = 0
    random: dict[str, Tensor] = field(default_factory=dict)  # to go on from; empty: as it is
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, model: Model, config: TrainConfig) -> TrainState:
        """Step 0, with the optimiser that `config` asks for."""
        return cls(
            optimizer=optim.adamw(
                model,
                weight_decay=config.weight_decay,
                decay_all=config.decay_all,
                betas=config.betas,
                fused=config.fused,
            )
        )

    def judge(self, held_out_loss: float) -> bool:
        """Take in an evaluation; whether it is the best so far. A NaN never is."""
        best = held_out_loss < self.best_loss
        self.best_loss = held_out_loss if best else self.best_loss
        self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
        return best

    def restore_random(self, device: torch.device) -> None:
        """Put the random numbers back to where they were saved; once, when training goes on.

        device  the model's: "cuda" in `random` are the numbers of its card
        """
        for kind, numbers in self.random.items():
            if kind == "cpu":
                torch.set_rng_state(numbers)
            elif kind != "cuda" and torch.cuda.is_available():  # of a card by its number
                torch.cuda.set_rng_state(numbers, kind)
            elif device.type == "cuda":
                torch.cuda.set_rng_state(numbers, device)
        self.random = {}

    def save(self, folder: str | Path, model: Model, settings: Path | None = None) -> None:
        """Write into `folder`/training, beside the weights that `folder` holds by now.

        settings  the run's file of settings, of which the checksum is noted too
        Raises OSError where it cannot be written.
        """
        written = self.write_tensors(folder, model, Ranks())
        self.write_facts(folder, model, written, settings=settings)

    def write_tensors(self, folder: str | Path, model: Model, ranks: Ranks) -> list[WrittenSlices]:
        """All processes together: the slices that each has. What all of them wrote.

        Raises OSError, on all of them, where one could not.
        """
        return write_together(Path(folder) / FOLDER, self._tensors(model, ranks), ranks)

    def _tensors(self, model: Model, ranks: Ranks) -> dict[str, Slice]:
        ranks.reshard(model)
        tensors = {
            f"random.{ranks.rank}.{kind}": whole(numbers)._replace(writes=ranks.writes_rank)
            for kind, numbers in random_numbers(device_of(model)).items()
        }
        for name, parameter in model.named_parameters():
            for key in _MEANS:
                if key in (held := self.optimizer.state.get(parameter, {})):
                    tensors[f"{key}.{name}"] = ranks.slice_of(held[key])
        return tensors

    def write_facts(
        self,
        folder: str | Path,
        model: Model,
        written: list[WrittenSlices],
        *,
        data_ranks: int = 1,
        settings: Path | None = None,
    ) -> None:
        """One process: ``state.json``, when every other file of the checkpoint is there."""
        folder = Path(folder)
        sums = {f"{FOLDER}/{part.file}": part.sha256 for part in written}
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and name not in sums:
                sums[name] = digest(file)
        facts = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "evaluations_since_best": self.evaluations_since_best,
            "data_ranks": data_ranks,
            "optimizer_steps": {
                name: float(self.optimizer.state[parameter]["step"])
                for name, parameter in model.named_parameters()
                if parameter in self.optimizer.state
            },
            "extra": self.extra,
            "tensors": {n: entry.as_json() for n, entry in joined_index(written).items()},
            "sha256": sums,
            "settings_sha256": None if settings is None else digest(settings),
        }
        document = {"format": FORMAT, "sha256_of_facts": _digest_of(facts), "facts": facts}
        text = json.dumps(document, indent=1) + "\n"
        (folder / FOLDER / FACTS).write_text(text, encoding="utf-8")

    @classmethod
    def load(
        cls, folder: str | Path, model: Model, config: TrainConfig, ranks: Ranks | None = None
    ) -> TrainState:
        """The state in `folder`, for a model with the weights in `folder`; each rank its slices.

        Random numbers go on where they were if there are as many data ranks as then; else they stay
        as they are. Raises ValueError or OSError, in one line, for a state that is missing, damaged
        or of another model.
        """
        folder, ranks = Path(folder), ranks or Ranks()
        facts, tensors = read_state(folder, ranks)
        state, steps = cls.begin(model, config), facts["optimizer_steps"]
        parameters = dict(model.named_parameters())
        unknown = steps.keys() - parameters.keys()
        if unknown:
            raise ValueError(f"{folder}: its training state has {min(unknown)}, this model not")
        for name, step in steps.items():
            held = _read_means(tensors, name, parameters[name], ranks)
            device = parameters[name].device if config.fused else "cpu"
            state.optimizer.state[parameters[name]] = {
                "step": torch.tensor(float(step), device=device),
                **held,
            }
        if facts["data_ranks"] == ranks.world:
            begin = f"random.{ranks.rank}."
            state.random = {
                n.removeprefix(begin): tensors[n] for n in tensors if n.startswith(begin)
            }
        state.step, state.tokens, state.seconds = facts["step"], facts["tokens"], facts["seconds"]
        best = facts["best_loss"]
        state.best_loss = math.inf if best is None else best
        state.evaluations_since_best = facts["evaluations_since_best"]
        state.extra = facts["extra"]
        return state


def _read_means(tensors: Slices, name: str, parameter: Tensor, ranks: Ranks) -> dict[str, Tensor]:
    """AdamW's two means of one parameter, as far as this process has it, on its device."""
    found = {}
    for key in _MEANS:
        stored = tensors.index.get(f"{key}.{name}")
        shape = None if stored is None else stored.shape
        if shape != tuple(parameter.shape):
            raise ValueError(
                f"the training state has {key} of {name} {shape or 'not at all'}, "
                f"the model {tuple(parameter.shape)}"
            )
        found[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        mine = ranks.slice_of(found[key])
        mine.values.copy_(tensors.read(f"{key}.{name}", mine.offset, tuple(mine.values.shape)))
    return found


def write_together(inside: Path, tensors: Mapping[str, Slice], ranks: Ranks) -> list[WrittenSlices]:
    """All processes together: write into one folder what each has; what all of them wrote.

    Raises OSError, on all of them and in one line, where one could not.
    """
    name = "state.safetensors"
    if ranks.processes > 1:
        name = f"state-{ranks.process + 1:05}-of-{ranks.processes:05}.safetensors"
    try:
        inside.mkdir(parents=True, exist_ok=True)
        found: WrittenSlices | str = write_slices(inside / name, tensors)
    except OSError as error:
        if ranks.processes == 1:
            raise
        found = f"{error} (is the disk full?)"
    parts = ranks.gathered(found)
    for part in parts:
        if isinstance(part, str):
            raise OSError(part)
    return parts


def read_state(folder: Path, ranks: Ranks | None = None) -> tuple[dict[str, Any], Slices]:
    """The facts in `folder` and its stored tensors, after files were found to be what was written.

    Each process checks the checksums of its share of the files. Raises ValueError or OSError, in
    one line, for a state that is missing or damaged; no code in it is run.
    """
    ranks = ranks or Ranks()
    share = slice(ranks.process, None, ranks.processes)
    if not (folder / FOLDER).is_dir() and (folder / older_state.SHARDED).is_dir():
        facts, tensors = older_state.several_ranks(folder, share)
        return _checked(facts, folder / older_state.SHARDED / older_state.FACTS), tensors
    path = folder / FOLDER / FACTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no training state ({FOLDER}/{FACTS}) to resume from")
    found = _parsed(path)
    facts = found
    if found.get("format") == FORMAT:
        facts = found.get("facts")
        if not isinstance(facts, dict) or found.get("sha256_of_facts") != _digest_of(facts):
            raise ValueError(f"{path} is damaged: it is not what was written (checksum)")
    elif found.get("format") != 1:
        raise ValueError(f"{path}: format {found.get('format')}, this version reads {FORMAT} and 1")
    _check_files(folder, facts.get("sha256"), path, share)
    if found.get("format") == FORMAT:
        tensors = Slices.in_folder(folder / FOLDER, read_index(facts.get("tensors"), str(path)))
    else:
        facts, tensors = older_state.one_process(folder / FOLDER, facts)
    return _checked(facts, path), tensors


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _check_files(folder: Path, sums: Any, where: Path, share: slice) -> None:
    """ValueError for a file that is not what was written."""
    if not isinstance(sums, dict):
        raise ValueError(f"{where} is damaged: it has no checksums")
    for name in sorted(sums)[share]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{where} is damaged: {name!r} is no file of this checkpoint")
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing from this checkpoint")
        if digest(file) != sums[name]:
            raise ValueError(f"{file} is damaged: it is not what was written (checksum)")


def _checked(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """`facts`; ValueError where one of them is missing or of another kind."""
    for name, kinds in _KINDS.items():
        if name not in facts:
            raise ValueError(f"{path} is damaged: it does not say {name}")
        value = facts[name]
        counted = kinds == (int,) or name == "seconds"
        if type(value) not in kinds or (counted and not value >= 0):
            raise ValueError(f"{path} is damaged: {name} = {value!r}")
    if not all(isinstance(step, int | float) for step in facts["optimizer_steps"].values()):
        raise ValueError(f"{path} is damaged: optimizer_steps are no numbers")
    return facts


def check_settings(folder: Path, settings: Path) -> None:
    """ValueError where `settings` is not the file that the run of the checkpoint in `folder` wrote.

    States of versions before have no checksum of it; what cannot be read is for `load` to say.
    """
    path = folder / FOLDER / FACTS
    try:
        facts = _parsed(path).get("facts")
    except (ValueError, OSError):
        return
    wanted = facts.get("settings_sha256") if isinstance(facts, dict) else None
    if wanted is not None and digest(settings) != wanted:
        raise ValueError(
            f"{settings} is not what this run wrote (checksum): a run goes on with the settings it "
            "began with; put them back, or begin a new run with --config"
        )


def _digest_of(facts: dict[str, Any]) -> str:
    """SHA-256 of facts, however they are laid out in a file."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def random_numbers(device: torch.device) -> dict[str, Tensor]:
    """State of torch's random numbers: "cpu", and "cuda" for a model whose `device` is a card."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
