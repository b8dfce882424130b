"""A fine-tuning run at the terminal: model and task, steps, checkpoints, and what came of it.

OUT/
  config.toml     the resolved settings
  log.csv         a line for every step
  last, best      the newest checkpoint, with what it takes to go on, and the best one
  adapter         leads to the best one, where adapters are trained: a folder that PEFT reads
  merged          the model with its best adapters in its weights, if asked for
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
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
from pellucid.cli.finetune_settings import CONFIG, dump
from pellucid.cli.training_display import Display, clock
from pellucid.cli.training_run import Stop
from pellucid.cli.training_setup import clear as clear_names
from pellucid.models import Model
from pellucid.models import adapters as lora
from pellucid.train import Progress, TrainConfig, TrainingDiverged, TrainState, run_folder, train
from pellucid.train.documents import find_files
from pellucid.train.finetune import classify, freeze
from pellucid.train.finetune.rows import Cut
from pellucid.train.finetune.tasks import UNITS, Task
from pellucid.train.slices import digest
from pellucid.train.state import check_settings
from pellucid.train.step_log import Write, step_log

LOG, ADAPTER, MERGED = "log.csv", "adapter", "merged"
OURS = (CONFIG, LOG, ADAPTER, MERGED, run_folder.CHECKPOINTS, run_folder.LAST, run_folder.BEST)
SCALARS = {"classification": ("accuracy",), "preferences": ("reward_margin", "reward_accuracy")}


@dataclass(kw_only=True)
class FinetuneRun:
    """One run: what is trained, on what, and what has come of it so far."""

    settings: Namespace
    out: Path
    checkpoint: Checkpoint
    model: Model
    task: Task
    config: TrainConfig
    state: TrainState
    quiet: bool
    saved_step: int = -1
    loss: float | None = None
    first_loss: float | None = None
    held_out_loss: float | None = None
    measures: dict[str, Any] = field(default_factory=dict)
    stopped_early: bool = False

    def __post_init__(self) -> None:
        self.display = Display(self.steps, quiet=self.quiet)
        self.names = module_names(table(self.model.config))
        self.read = self._fingerprint()  # now: files may change while the run goes on

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.schedule.steps

    def begin(self) -> None:
        """Write the settings and the state as it begins, and judge the model as it is."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / CONFIG).write_text(dump(vars(self.settings)), encoding="utf-8")
        self.first_loss = self.task.held_out(self.model)
        self.save()

    def restore(self) -> None:
        """Go on from ``OUT/last``."""
        check_settings(self.out / run_folder.LAST, self.out / CONFIG)
        with run_folder.reading_last(self.out) as last:
            self._load_weights(last)
            self.state = TrainState.load(last, self.model, self.config)
        extra = self.state.extra
        if extra["data"] != self.read:
            raise ValueError(f"--resume: {self._changed(extra['data'])} is not what it was")
        self.loss, self.held_out_loss = extra["loss"], extra["held_out_loss"]
        self.first_loss = extra["first_loss"]
        self.saved_step = self.state.step
        self.display.begin_at(self.state.step, self.state.tokens, self.state.seconds)

    def _fingerprint(self) -> dict[str, str]:
        """File -> SHA-256 of everything that the run begins with but the model."""
        given = [*self.settings.data, *(self.settings.eval_data or [])]
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
        self._opening()
        scalars = SCALARS.get(self.task.kind, ())
        with step_log(self.out / LOG, self.state.step, scalars) as log, self.display:
            try:
                self._steps(stop, log)
            except TrainingDiverged as error:
                raise TrainingDiverged(f"{error}; {run_folder.kept(self.out)}") from None
        if self.saved_step != self.state.step:
            self.save()

    def _steps(self, stop: Stop, log: Write) -> None:
        if self.state.step >= self.steps:
            return
        for progress in train(
            self.model,
            self.task.batches,
            self.task.held_out,
            self.config,
            objective=self.task.objective,
            state=self.state,
        ):
            self.loss = progress.loss
            self.display.step(progress)
            if progress.held_out_loss is not None:
                self._judged(progress)
            log(progress, self._scalars(progress))
            every = self.settings.save_every
            if every and progress.step % every == 0:
                self.save()
            self.stopped_early = progress.ending and progress.step < self.steps
            if stop.asked:
                break

    def _judged(self, progress: Progress) -> None:
        self.held_out_loss = progress.held_out_loss
        self.measures = self.task.measures(self.model)
        more = ", ".join(
            f"{name.replace('_', ' ')} {value:.3f}"
            for name, value in self._scalars(progress).items()
        )
        if more:
            self.display.say(f"step {progress.step}: held out {progress.held_out_loss:.3f}, {more}")
        if progress.best:
            run_folder.publish(self.out, run_folder.BEST, progress.step, self._write_best)

    def _scalars(self, progress: Progress) -> dict[str, float]:
        if progress.held_out_loss is None:
            return {}
        return {name: self.measures[name] for name in SCALARS.get(self.task.kind, ())}

    # ── Files ────────────────────────────────────────────────────────────────────────────────────

    def save(self) -> None:
        """Write ``OUT/last``: what was trained, in float32, and all it takes to go on."""
        self.state.extra = {
            "data": self.read,
            "loss": self.loss,
            "first_loss": self.first_loss,
            "held_out_loss": self.held_out_loss,
        }
        run_folder.publish(self.out, run_folder.LAST, self.state.step, self._write_last)
        self.saved_step = self.state.step

    def _write_last(self, folder: Path) -> None:
        self._write(folder, torch.float32)
        self.state.save(folder, self.model, self.out / CONFIG)

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

    # ── What is said ─────────────────────────────────────────────────────────────────────────────

    def _opening(self) -> None:
        trained, there = freeze.trainable(self.model)
        begin = f" with {self.settings.adapter}" if self.settings.adapter else ""
        self.display.say(
            f"{self.checkpoint.source}{begin}: {trained:,} of {there:,} parameters are trained, "
            f"{self.steps:,} steps"
        )
        for line in _described(self.task.facts):
            self.display.say(line)
        if self.state.step:
            self.display.say(f"going on after step {self.state.step}")

    def finish(self) -> dict[str, Any]:
        """Judge the best model and merge it if asked for; what came of the run."""
        state, best = self.state, self.out / run_folder.BEST
        interrupted = state.step < self.steps and not self.stopped_early
        summary: dict[str, Any] = {
            "out": str(self.out),
            "kind": self.task.kind,
            "trained": freeze.trainable(self.model)[0],
            "parameters": freeze.trainable(self.model)[1],
            **self.task.facts,
            "steps": state.step,
            "interrupted": interrupted,
            "stopped_early": self.stopped_early,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "loss": self.loss,
            "held_out_loss_before": self.first_loss,
            "held_out_loss": self.held_out_loss,
            "best_step": run_folder.step_of(best),
        }
        if best.is_dir() and not interrupted:
            self._load_weights(best)
            summary["held_out_loss"] = self.task.held_out(self.model)
            summary |= self.task.measures(self.model)
            summary["model"] = str(self._final())
        self._closing(summary)
        return summary

    def _final(self) -> Path:
        """Where the result is; merged first if asked for."""
        if not self.settings.lora:
            return self.out / run_folder.BEST
        adapter, merged = self.out / ADAPTER, self.out / MERGED
        if not adapter.is_symlink():
            adapter.symlink_to(run_folder.BEST, target_is_directory=True)
        if not self.settings.merge:
            return adapter
        clear_names(self.out, MERGED)
        with lora.folded(self.model):
            self._write_model(merged, self.checkpoint.dtype)
        self._write_beside(merged)
        return merged

    def _closing(self, summary: dict[str, Any]) -> None:
        how = "interrupted" if summary["interrupted"] else "done"
        if self.stopped_early:
            how = "stopped early, with no better loss for a while,"
        loss = summary["held_out_loss"]
        judged = "" if loss is None else f", held out {loss:.3f} {UNITS[self.task.kind]}"
        where = summary.get("model", str(self.out / run_folder.LAST))
        self.display.say(
            f"{how} after step {summary['steps']}: {summary['tokens']:,} tokens in "
            f"{clock(summary['seconds'])}{judged} ({self.first_loss:.3f} before)"
        )
        for line in _report(summary):
            self.display.say(line)
        what = "adapter" if self.settings.lora and not self.settings.merge else "model"
        self.display.say(f"the {what} is in {where}")


def _described(facts: Mapping[str, Any]) -> Iterator[str]:
    """What is in the data, in lines."""
    if "training_tokens" in facts:
        yield f"{facts['training_tokens']:,} tokens of text, {facts['held_out_tokens']:,} held out"
    for name, what in (("training", "to learn from"), ("held_out", "to judge by")):
        if name in facts:
            yield f"{what}: {Cut(**facts[name])}"
    if "balance" in facts:
        counts = ", ".join(f"{label} × {count:,}" for label, count in facts["balance"].items())
        yield f"labels: {counts}"
    if "chat_format" in facts:
        yield f"written in the chat format {facts['chat_format']}, {facts['rows']:,} rows"


def _report(summary: dict[str, Any]) -> Iterator[str]:
    """What a classifier or a preferring model is worth, in lines."""
    if "reward_margin" in summary:
        yield (
            f"reward margin {summary['reward_margin']:.3f}, the better answer is preferred in "
            f"{summary['reward_accuracy']:.1%} of the pairs"
        )
    if "classes" in summary:
        yield from class_lines(summary)


def class_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A classifier's report in lines."""
    rows = report["classes"]
    most = max(row["support"] for row in rows) / report["count"]
    yield f"accuracy {report['accuracy']:.1%} (always the most frequent label: {most:.1%})"
    width = max(len("label"), *(len(row["name"]) for row in rows))
    yield f"{'label':<{width}}  precision  recall     f1  examples"
    for row in rows:
        yield (
            f"{row['name']:<{width}}  {row['precision']:>9.1%}  {row['recall']:>6.1%}  "
            f"{row['f1']:>5.1%}  {row['support']:>8,}"
        )


def _without_head(model: Model) -> dict[str, Tensor]:
    head = f"{classify.HEAD}."
    return {name: value for name, value in model.state_dict().items() if not name.startswith(head)}


def clear(out: Path) -> None:
    """Remove what an earlier run left in its folder, and nothing else."""
    clear_names(out, *OURS)
