"""Where a run stands, beyond its weights: what is needed to go on as if it had never stopped.

    training/
      state.safetensors  exp_avg.NAME, exp_avg_sq.NAME of every parameter; random.cpu, random.cuda:0
      state.json         step, tokens, seconds, best loss … and a checksum of every file beside it

The weights themselves are a model's folder in Hugging Face's layout, in float32; `training` lies
inside it. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pellucid.models import Model
from pellucid.train import optim

if TYPE_CHECKING:
    from pellucid.train.loop import TrainConfig

FOLDER, TENSORS, FACTS = "training", "state.safetensors", "state.json"
FORMAT = 1


@dataclass(kw_only=True)
class TrainState:
    """Steps done, the optimiser, the state of the random numbers, and the best loss so far.

    extra  whatever else the driver wants back: plain JSON
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
        """Take in an evaluation; whether it is the best so far."""
        best = held_out_loss < self.best_loss
        self.best_loss = held_out_loss if best else self.best_loss  # which no NaN replaces
        self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
        return best

    def restore_random(self) -> None:
        """Put the random numbers back to where they were saved; once, when training goes on."""
        for device, numbers in self.random.items():
            if device == "cpu":
                torch.set_rng_state(numbers)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(numbers, device)
        self.random = {}

    def save(self, folder: str | Path, model: Model) -> None:
        """Write into `folder`/training, beside the weights that `folder` holds by now."""
        inside = Path(folder) / FOLDER
        inside.mkdir(parents=True, exist_ok=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        tensors = {f"random.{device}": numbers for device, numbers in random_numbers().items()}
        steps = {}
        for parameter, held in self.optimizer.state.items():
            name = names[id(parameter)]
            steps[name] = float(held["step"])
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = held[key].detach().cpu().contiguous()
        try:
            save_file(tensors, inside / TENSORS)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{inside / TENSORS}: {error}") from None
        facts = {
            "format": FORMAT,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "evaluations_since_best": self.evaluations_since_best,
            "optimizer_steps": steps,
            "extra": self.extra,
            "sha256": {
                str(file.relative_to(folder)): digest(file)
                for file in sorted(Path(folder).rglob("*"))
                if file.is_file()
            },
        }
        (inside / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: Model, config: TrainConfig) -> TrainState:
        """The state in `folder`/training, for a model with the weights in `folder`.

        Raises ValueError or OSError, in one line, for a state that is missing, damaged or of
        another model.
        """
        folder = Path(folder)
        facts = read_facts(folder)
        state = cls.begin(model, config)
        with _opened(folder / FOLDER / TENSORS) as file:
            stored = set(file.keys())
            for name, parameter in model.named_parameters():
                if name not in facts["optimizer_steps"]:
                    continue
                state.optimizer.state[parameter] = _held(
                    file, name, parameter, facts["optimizer_steps"][name], config.fused
                )
            state.random = {
                key.removeprefix("random."): file.get_tensor(key)
                for key in stored
                if key.startswith("random.")
            }
        unknown = facts["optimizer_steps"].keys() - {name for name, _ in model.named_parameters()}
        if unknown:
            raise ValueError(f"{folder}: its training state has {min(unknown)}, this model not")
        state.step, state.tokens, state.seconds = facts["step"], facts["tokens"], facts["seconds"]
        best = facts["best_loss"]
        state.best_loss = math.inf if best is None else best
        state.evaluations_since_best = facts["evaluations_since_best"]
        state.extra = facts["extra"]
        return state


def _held(
    file: safe_open, name: str, parameter: Tensor, step: float, fused: bool
) -> dict[str, Tensor]:
    """AdamW's own record of one parameter, on its device."""
    held = {key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
    for key, value in held.items():
        if value.shape != parameter.shape:
            raise ValueError(
                f"the training state has {key} of {name} {tuple(value.shape)}, "
                f"the model {tuple(parameter.shape)}"
            )
    device = parameter.device
    moved = {key: value.to(device, copy=True) for key, value in held.items()}
    return {"step": torch.tensor(step, device=device if fused else "cpu"), **moved}


def read_facts(folder: Path) -> dict[str, Any]:
    """state.json, after every file it has a checksum of was found to be what was written."""
    path = folder / FOLDER / FACTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no training state ({FOLDER}/{FACTS}) to resume from")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sums: Mapping[str, str] = facts["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path}: format {facts.get('format')}, this version reads {FORMAT}")
    for name, wanted in sums.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing from this checkpoint")
        if digest(file) != wanted:
            raise ValueError(f"{file} is damaged: it is not what was written (checksum)")
    return facts


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def random_numbers() -> dict[str, Tensor]:
    """State of torch's random numbers on every device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for number, numbers in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda:{number}"] = numbers
    return states


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
