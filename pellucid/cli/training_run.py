"""A training run at the terminal: steps, samples, checkpoints, and what is written of them."""

from __future__ import annotations

import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pellucid import checkpoints
from pellucid.cli.training_display import Display
from pellucid.models import Model
from pellucid.tokenizers import Tokenizer
from pellucid.train import (
    Batch,
    LoaderBatches,
    Progress,
    TrainConfig,
    TrainingDiverged,
    TrainState,
    bits_per_byte,
    evaluate,
    held_out_windows,
    next_token_objective,
    plain_next_token_objective,
    run_folder,
    train,
    watch,
)
from pellucid.train.events import EventFile
from pellucid.train.loop import Data
from pellucid.train.loss_plot import draw
from pellucid.train.objective import Objective
from pellucid.train.precision import keep_freed_memory
from pellucid.train.ranks import Ranks
from pellucid.train.settings import dump
from pellucid.train.step_log import Write, step_log
from pellucid.train.token_source import TokenSource
from pellucid.train.utilisation import flops_per_token, measured_peak
from pellucid.train.watch_plot import PICTURE, draw_watch

CONFIG, LOG, PLOT, EVENTS = "config.toml", "log.csv", "loss.png", "tensorboard"
OURS = (CONFIG, LOG, PLOT, EVENTS, run_folder.CHECKPOINTS, run_folder.LAST, run_folder.BEST)
OURS += (watch.TABLE, watch.FOLDER, PICTURE)
SAMPLE_TOKENS = 100


class Stop:
    """Whether somebody asked to stop."""

    asked = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """Ctrl-C, or a scheduler's SIGTERM, asks to stop after this step; a second one insists."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(kw_only=True)
class Run:
    """One training run: what is trained, on what, and what has come of it so far."""

    settings: Namespace
    out: Path
    model: Model
    tokenizer: Tokenizer
    tokenizer_folder: Path
    begin_id: int | None  # the token before each document
    batches: Data
    training_tokens: int
    held_out: TokenSource
    held_out_bytes: int
    config: TrainConfig
    state: TrainState
    quiet: bool
    saved_step: int = -1
    loss: float | None = None
    held_out_loss: float | None = None
    training_sample_loss: float | None = None
    stopped_early: bool = False

    def __post_init__(self) -> None:
        self.display = Display(self.last_step, quiet=self.quiet)
        self.events: EventFile | None = None

    @property
    def last_step(self) -> int:
        """The step to end after."""
        return self.settings.stop or self.config.schedule.steps

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    @property
    def bfloat16(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        return self.config.bfloat16

    def begin(self) -> None:
        """Write the settings and the model as it begins."""
        self._write_settings()
        self.save()

    def _write_settings(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        text = dump(vars(self.settings), "A training run; pellucid train --config takes this file.")
        (self.out / CONFIG).write_text(text, encoding="utf-8")

    def restore(self) -> None:
        """Go on from `state`, which was read from ``RUN/last``."""
        extra = self.state.extra
        if extra["training_tokens"] != self.training_tokens:
            raise ValueError(
                f"the text has {self.training_tokens:,} tokens now, and had "
                f"{extra['training_tokens']:,}: a run goes on with the text it began with"
            )
        if isinstance(self.batches, LoaderBatches):
            self.batches.restore(extra["batches"])
        self.loss, self.held_out_loss = extra["loss"], extra["held_out_loss"]
        self.saved_step = self.step
        self.display.begin_at(self.step, self.state.tokens, self.state.seconds)

    def fit(self, stop: Stop) -> None:
        """Train to the end or until `stop`, then evaluate on all held-out text and save."""
        if torch.device(self.settings.device).type == "cpu":
            keep_freed_memory()
        self._measure()
        self.display.opening(self.summary(), self.bfloat16)
        with ExitStack() as stack:
            log = stack.enter_context(self._log())
            if self.settings.tensorboard:
                self.events = stack.enter_context(EventFile(self.out / EVENTS))
            stack.enter_context(self.display)
            try:
                self._steps(stop, log)
            except TrainingDiverged as error:
                raise TrainingDiverged(f"{error}; {run_folder.kept(self.out)}") from None
        if self.stopped_early or self.step >= self.last_step:
            self._evaluate_all()
        if self.saved_step != self.step:
            self.save()
        if self.settings.plot and self.step:
            draw(self.out / LOG, self.out / PLOT, str(self.out))
            if self.settings.trace_every:
                draw_watch(self.out / watch.TABLE, self.out / PICTURE, str(self.out))

    def _measure(self) -> None:
        if self.quiet:
            return
        device = torch.device(self.settings.device)
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        self.display.peak = measured_peak(device, dtype)
        self.display.flops_per_token = flops_per_token(self.model, self.model.config.context_length)

    def _steps(self, stop: Stop, log: Write) -> None:
        if self.step >= self.last_step:
            return
        for progress in self._training():
            self.loss = progress.loss
            log(progress, {})
            self._between_steps(progress)
            self.stopped_early = progress.ending and progress.step < self.config.schedule.steps
            if self._stops(stop) or progress.step >= self.last_step:
                break

    def _training(self) -> Iterator[Progress]:
        return train(
            self.model,
            self.batches,
            self._evaluation(),
            self.config,
            objective=self.objective,
            state=self.state,
            ranks=self._ranks(),
            watch=self._watch(),
        )

    def _log(self) -> AbstractContextManager[Write]:
        return step_log(self.out / LOG, self.step)

    def _ranks(self) -> Ranks | None:
        """Who shares each step; None: this process has all of it."""
        return None

    def _watch(self) -> watch.Watch | None:
        settings = self.settings
        if not settings.trace_every:
            return None
        return watch.Watch(
            self.out,
            settings.trace_every,
            settings.only or ["*"],
            tensors=settings.trace_tensors,
            done=self.step,
        )

    @property
    def objective(self) -> Objective:
        """What is made smaller."""
        return plain_next_token_objective if self.settings.loss == "plain" else next_token_objective

    def _stops(self, stop: Stop) -> bool:
        return stop.asked

    def _evaluation(self) -> Any:
        """Windows of held-out text; the book's loop evaluates on some training text as well."""
        limit, ranks = self.settings.eval_windows or None, self._ranks()
        windows = held_out_windows(self.held_out, self.model.config.context_length, limit)
        batches = self.batches
        if not isinstance(batches, LoaderBatches):
            return windows

        def both(model: Model) -> float:
            sample = batches.evaluation_sample(self.step)
            if sample is not None:
                losses = [evaluate(model, _joined(batch), ranks=ranks) for batch in sample]
                self.training_sample_loss = sum(losses) / len(losses)
            return evaluate(model, windows, bfloat16=self.config.bfloat16, ranks=ranks)

        return both

    def _between_steps(self, progress: Progress) -> None:
        settings = self.settings
        if progress.held_out_loss is not None:
            self.held_out_loss = progress.held_out_loss
        self.display.step(progress)
        self._add_events(progress)
        if self.training_sample_loss is not None and progress.held_out_loss is not None:
            self.display.say(
                f"step {progress.step}: training text {self.training_sample_loss:.3f}, "
                f"held-out text {progress.held_out_loss:.3f}"
            )
        if _due(progress.step, settings.sample_every):
            self.display.say(f"{self.sample()}\n")
        if progress.best:
            self._publish(run_folder.BEST, self._write_best)
        if _due(progress.step, settings.save_every):
            self.save()

    def _add_events(self, progress: Progress) -> None:
        if self.events is None:
            return
        scalars = {
            "loss/training": progress.loss,
            "gradient norm": progress.gradient_norm,
            "learning rate": progress.rate,
            "tokens": progress.tokens,
        }
        if progress.held_out_loss is not None:
            scalars["loss/held out"] = progress.held_out_loss
            scalars["bits per byte"] = bits_per_byte(
                progress.held_out_loss, len(self.held_out), self.held_out_bytes
            )
        self.events.add(progress.step, scalars)

    def save(self) -> None:
        """Write ``RUN/last``: the model in float32 and all it takes to go on."""
        self.state.extra = {
            "training_tokens": self.training_tokens,
            "loss": self.loss,
            "held_out_loss": self.held_out_loss,
        }
        if isinstance(self.batches, LoaderBatches):
            self.state.extra["batches"] = self.batches.state()
        self._publish(run_folder.LAST, self._write_last)
        self.saved_step = self.step

    def _publish(self, name: str, write: Callable[[Path], None]) -> None:
        run_folder.publish(self.out, name, self.step, write)

    def _write_last(self, folder: Path) -> None:
        self._write_model(folder, torch.float32)
        self.state.save(folder, self.model, self.out / CONFIG)

    def _write_best(self, folder: Path) -> None:
        self._write_model(folder, getattr(torch, self.settings.dtype))

    def _write_model(self, folder: Path, dtype: torch.dtype) -> None:
        checkpoints.save(
            folder,
            self.model.config,
            self.model.state_dict(),
            tokenizer_from=self.tokenizer_folder,
            dtype=dtype,
        )

    def sample(self) -> str:
        """The prompt and what the model writes after it, at temperature 0.8."""
        from pellucid.generate import Sampling, stream_text

        prompt = self.settings.prompt
        begin = [] if self.begin_id is None else [self.begin_id]
        ids = [*begin, *self.tokenizer.encode(prompt)]
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):
            stream = stream_text(
                self.model,
                self.tokenizer,
                [ids],
                sampling=Sampling(temperature=0.8),
                max_new_tokens=min(SAMPLE_TOKENS, self.model.config.context_length - len(ids)),
                seed=self.settings.seed,
            )
            text = prompt + stream.complete()[0].text
        self.model.train()
        return text

    def _evaluate_all(self) -> None:
        """Loss over all held-out text, in float32."""
        windows = held_out_windows(self.held_out, self.model.config.context_length)
        with torch.compiler.set_stance("force_eager"):
            self.held_out_loss = evaluate(self.model, windows, ranks=self._ranks())

    def summary(self) -> dict[str, Any]:
        """What came of it; losses in nats per token."""
        config, state, loss = self.model.config, self.state, self.held_out_loss
        tokens, text_bytes = len(self.held_out), self.held_out_bytes
        best = run_folder.step_of(self.out / run_folder.BEST)
        return {
            "out": str(self.out),
            "model": str(self.out / (run_folder.LAST if best is None else run_folder.BEST)),
            "family": config.family,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "training_tokens": self.training_tokens,
            "held_out_tokens": tokens,
            "held_out_bytes": text_bytes,
            "steps": self.step,
            "interrupted": self.step < self.last_step and not self.stopped_early,
            "stopped_early": self.stopped_early,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
            "loss": self.loss,
            "held_out_loss": loss,
            "bits_per_byte": loss and bits_per_byte(loss, tokens, text_bytes),
            "best_step": best,
            "best_loss": None if best is None else state.best_loss,
        }


def _joined(batch: Batch) -> torch.Tensor:
    """Inputs and the last target: windows (B, T + 1)."""
    return torch.cat((batch.inputs, batch.targets[:, -1:]), dim=1)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
