"""A fine-tuning run: what it writes, how it is judged, and what comes of it.

RUN/
  config.toml     the resolved settings
  log.csv         a line for every step
  last, best      the newest checkpoint, with what it takes to go on, and the best one
  adapter         leads to the best one, where adapters are trained: a folder that PEFT reads
  merged          the model with its best adapters in its weights, if asked for
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import checkpoints
from pellucid.checkpoints import Checkpoint
from pellucid.checkpoints.formats.hf import table
from pellucid.checkpoints.formats.peft import (
    TEMPLATE,
    TENSORS,
    apply_adapter,
    module_names,
    save_adapter,
)
from pellucid.models import Model
from pellucid.models import adapters as lora
from pellucid.train import run_folder
from pellucid.train.data.documents import find_files
from pellucid.train.finetune import classify, freeze
from pellucid.train.finetune.settings import CONFIG, FinetuneSettings, dump
from pellucid.train.finetune.tasks import Task
from pellucid.train.loop import Progress
from pellucid.train.prepare import clear
from pellucid.train.run import LOG, Run, Stop
from pellucid.train.slices import digest
from pellucid.train.state import TrainState
from pellucid.train.step_log import Write, step_log

ADAPTER, MERGED = "adapter", "merged"
OURS = (CONFIG, LOG, ADAPTER, MERGED, run_folder.CHECKPOINTS, run_folder.LAST, run_folder.BEST)
SCALARS = {"classification": ("accuracy",), "preferences": ("reward_margin", "reward_accuracy")}


@dataclass(kw_only=True)
class Finetuning(Run):
    """A run that fine-tunes a model on examples. `summary` says what has come of it."""

    settings: FinetuneSettings
    checkpoint: Checkpoint
    task: Task
    first_loss: float | None = None
    measures: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = module_names(table(self.model.config))
        self.read = self._fingerprint()  # now: files may change while the run goes on
        self.scalars = SCALARS.get(self.task.kind, ())

    def settings_text(self) -> str:
        """What ``config.toml`` says."""
        return dump(self.settings)

    def begin(self) -> None:
        """Judge the model as it is; write the settings and the state as it begins."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.first_loss = self.task.held_out(self.model)
        super().begin()

    def restore(self) -> None:
        """Go on from ``RUN/last``; ValueError, OSError where that cannot be, or with other data."""
        with run_folder.reading_last(self.folder) as last:
            self._load_weights(last)
            self.state = TrainState.load(last, self.model, self.config)
        extra = self.state.extra
        missing = {"data", "loss", "held_out_loss", "first_loss"} - extra.keys()
        if missing or not isinstance(extra["data"], dict):
            raise ValueError(f"--resume: {last} is not of a fine-tuning run")
        if extra["data"] != self.read:
            raise ValueError(f"--resume: {self._changed(extra['data'])} is not what it was")
        self.loss, self.held_out_loss = extra["loss"], extra["held_out_loss"]
        self.first_loss = extra["first_loss"]
        self.saved_step = self.step

    def extra(self) -> dict[str, Any]:
        """What the state is to hold besides its own."""
        return {
            "data": self.read,
            "loss": self.loss,
            "first_loss": self.first_loss,
            "held_out_loss": self.held_out_loss,
        }

    def _fingerprint(self) -> dict[str, str]:
        """File -> SHA-256 of everything that the run begins with but the model."""
        given = [*(self.settings.data or []), *(self.settings.eval_data or [])]
        files = list(find_files(given))
        if self.settings.adapter is not None:
            files.append(Path(self.settings.adapter) / TENSORS)
        return {str(file): digest(file) for file in files}

    def _changed(self, before: Mapping[str, str]) -> str:
        """What differs from `before`, a fingerprint."""
        differ = {file for file, _ in before.items() ^ self.read.items()}
        return ", ".join(sorted(differ))

    def fit(self, stop: Stop) -> None:
        """Train to the end or until `stop`, and save."""
        self.listener.opening(self._opening())
        super().fit(stop)
        if self.saved_step != self.step:
            self.save()

    def _opening(self) -> dict[str, Any]:
        trained, there = freeze.trainable(self.model)
        return {
            **self.task.facts,
            "source": self.checkpoint.source,
            "adapter": self.settings.adapter,
            "trained": trained,
            "parameters": there,
            "last_step": self.last_step,
            "steps": self.step,
            "tokens": self.state.tokens,
            "seconds": self.state.seconds,
        }

    def log(self) -> AbstractContextManager[Write]:
        """Where the steps are written down, with the measures of this kind of data."""
        return step_log(self.folder / LOG, self.step, self.scalars)

    def held_out(self, model: Model) -> float:
        """The loss that the model is judged by, in the task's units."""
        return self.task.held_out(model)

    def between_steps(self, progress: Progress, log: Write) -> None:
        """Measures where the model was judged; the log; the best model."""
        found: dict[str, float] = {}
        if progress.held_out_loss is not None:
            self.measures = self.task.measures(self.model)
            found = {name: self.measures[name] for name in self.scalars}
            more = ", ".join(f"{n.replace('_', ' ')} {value:.3f}" for n, value in found.items())
            if more:
                said = f"step {progress.step}: validation {progress.held_out_loss:.3f}, {more}"
                self.listener.say(said)
            if progress.best:
                self.crew.publish(self.folder, run_folder.BEST, self.step, self._write_best)
        log(progress, found)

    # ── Files ────────────────────────────────────────────────────────────────────────────────────

    def write_last(self, folder: Path) -> None:
        """A checkpoint to go on from: what was trained, in float32, and the state."""
        self._write(folder, torch.float32)
        self.state.save(folder, self.model, self.folder / CONFIG)

    def _write_best(self, folder: Path) -> None:
        self._write(folder, self.checkpoint.dtype)

    def _write(self, folder: Path, dtype: torch.dtype) -> None:
        if self.settings.lora:
            save_adapter(folder, self.model, self.names, base=self.checkpoint.source)
        else:
            self._write_model(folder, dtype)
        self._write_beside(folder)

    def _write_model(self, folder: Path, dtype: torch.dtype) -> None:
        checkpoints.save(
            folder,
            self.model.config,
            _without_head(self.model),
            tokenizer_from=self.checkpoint.folder,
            dtype=dtype,
        )

    def _write_beside(self, folder: Path) -> None:
        if self.task.labels:
            classify.save_head(folder, self.model, self.task.labels)
        if self.task.template:
            (folder / TEMPLATE).write_text(self.task.template, encoding="utf-8")
        elif self.settings.adapter and (Path(self.settings.adapter) / TEMPLATE).is_file():
            shutil.copyfile(Path(self.settings.adapter) / TEMPLATE, folder / TEMPLATE)

    def _load_weights(self, folder: Path) -> None:
        """What was trained, from a checkpoint of this run, into the model."""
        if self.settings.lora:
            lora.extract(self.model)
            apply_adapter(self.model, folder, self.names)
        else:
            weights = checkpoints.open_checkpoint(folder).weights
            self.model.load_state_dict(dict(weights), strict=False)  # the head is in its own file
        if self.task.labels:
            classify.load_head(folder, self.model)

    # ── What came of it ──────────────────────────────────────────────────────────────────────────

    def finish(self) -> None:
        """Judge the best model, and merge it if asked for."""
        state, best = self.state, self.folder / run_folder.BEST
        summary: dict[str, Any] = {
            "out": str(self.folder),
            "kind": self.task.kind,
            "trained": freeze.trainable(self.model)[0],
            "parameters": freeze.trainable(self.model)[1],
            **self.task.facts,
            "steps": state.step,
            "interrupted": self.interrupted,
            "stopped_early": self.stopped_early,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "loss": self.loss,
            "held_out_loss_before": self.first_loss,
            "held_out_loss": self.held_out_loss,
            "best_step": run_folder.step_of(best),
        }
        if best.is_dir() and not self.interrupted:
            self._load_weights(best)
            summary["held_out_loss"] = self.task.held_out(self.model)
            summary |= self.task.measures(self.model)
            summary["model"] = str(self._final())
        self.result = summary
        what = "adapter" if self.settings.lora and not self.settings.merge else "model"
        where = summary.get("model", str(self.folder / run_folder.LAST))
        self.listener.closing(summary | {"result": what, "where": where})

    def summary(self) -> dict[str, Any]:
        """What came of it; losses in the units of the task."""
        return self.result

    def _final(self) -> Path:
        """Where the result is; merged first if asked for."""
        if not self.settings.lora:
            return self.folder / run_folder.BEST
        adapter, merged = self.folder / ADAPTER, self.folder / MERGED
        if not adapter.is_symlink():
            adapter.symlink_to(run_folder.BEST, target_is_directory=True)
        if not self.settings.merge:
            return adapter
        clear(self.folder, MERGED)
        with lora.folded(self.model):
            self._write_model(merged, self.checkpoint.dtype)
        self._write_beside(merged)
        return merged


def _without_head(model: Model) -> dict[str, Tensor]:
    head = f"{classify.HEAD}."
    return {name: value for name, value in model.state_dict().items() if not name.startswith(head)}
