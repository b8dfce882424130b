"""A run, from its first step or a checkpoint to its end: steps, checkpoints, what is written.

`Run` is what training and fine-tuning have in common. `Pretraining` trains on raw text; fine-tuning
is in `finetune.run`. What is another matter for several ranks is asked of a `Crew`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pellucid import checkpoints
from pellucid.models import Model
from pellucid.tokenizers import Tokenizer
from pellucid.train import run_folder, watch
from pellucid.train.batches import Batch, held_out_windows
from pellucid.train.config import TrainConfig
from pellucid.train.evaluation import bits_per_byte, evaluate
from pellucid.train.events import EventFile
from pellucid.train.listener import Listener
from pellucid.train.loop import Data, Progress, TrainingDiverged, train
from pellucid.train.loss_plot import draw
from pellucid.train.objective import Objective
from pellucid.train.precision import keep_freed_memory
from pellucid.train.ranks import Ranks
from pellucid.train.recipe_batches import LoaderBatches
from pellucid.train.settings import CONFIG, TrainSettings, dump
from pellucid.train.state import TrainState
from pellucid.train.step_log import Write, step_log
from pellucid.train.token_source import TokenSource
from pellucid.train.utilisation import flops_per_token, measured_peak
from pellucid.train.watch_plot import PICTURE, draw_watch

LOG, PLOT, EVENTS = "log.csv", "loss.png", "tensorboard"
SAMPLE_TOKENS = 100
Weights = Mapping[str, Tensor]


class Stop:
    """Whether the run is asked to stop after its step."""

    asked = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """Ctrl-C, or a scheduler's SIGTERM, asks to stop after this step; a second one insists."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread hears of signals
        return
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


class Crew:
    """The processes that carry out a run: here one alone; a base for several."""

    @property
    def ranks(self) -> Ranks:
        """This one's part in each step."""
        return Ranks()

    @property
    def first(self) -> bool:
        """Whether this is the one that shows and writes what one can."""
        return True

    @property
    def processes(self) -> int:
        """How many there are."""
        return 1

    @property
    def about(self) -> str:
        """The ranks and how they share the work, in a line; nothing of one process."""
        return ""

    def wait(self) -> None:
        """Go on when all of them are here."""

    def stops(self, asked: bool) -> bool:
        """Whether any of them was asked to stop."""
        return asked

    def publish(self, run: Path, name: str, step: int, write: Callable[[Path], None]) -> None:
        """As `run_folder.publish`."""
        run_folder.publish(run, name, step, write)

    def write_weights(
        self, folder: Path, model: Model, save_model: Callable[[Path, Weights], None]
    ) -> None:
        """Have `save_model` write the whole weights into `folder`."""
        save_model(folder, model.state_dict())

    def write_checkpoint(
        self,
        folder: Path,
        model: Model,
        state: TrainState,
        save_model: Callable[[Path, Weights], None],
        settings: Path,
    ) -> None:
        """The model in `folder`, and in it the state to go on from."""
        self.write_weights(folder, model, save_model)
        state.save(folder, model, settings)


@dataclass(kw_only=True)
class Run:
    """One run: what is trained, on what, and what has come of it so far.

    folder         where its checkpoints and its log are
    model          as it is now, trained in place
    losses         of each step that was done here, in nats per token
    held_out_loss  of the last evaluation
    """

    folder: Path
    model: Model
    tokenizer: Tokenizer
    batches: Data
    objective: Objective
    config: TrainConfig
    state: TrainState
    listener: Listener
    save_every: int
    crew: Crew = field(default_factory=Crew)
    saved_step: int = -1
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    held_out_loss: float | None = None
    stopped_early: bool = False

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    @property
    def last_step(self) -> int:
        """The step to end after."""
        return self.config.schedule.steps

    @property
    def interrupted(self) -> bool:
        """Whether it was asked to stop before its last step."""
        return self.step < self.last_step and not self.stopped_early

    def begin(self) -> None:
        """Write the settings and the state as it begins."""
        if self.crew.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG).write_text(self.settings_text(), encoding="utf-8")
        self.crew.wait()
        self.save()

    def fit(self, stop: Stop) -> None:
        """Train to the end or until `stop`, and save."""
        with self.log() as log, self.listener.stepping():
            try:
                self._steps(stop, log)
            except TrainingDiverged as error:
                raise TrainingDiverged(f"{error}; {run_folder.kept(self.folder)}") from None

    def _steps(self, stop: Stop, log: Write) -> None:
        if self.step >= self.last_step:
            return
        for progress in train(
            self.model,
            self.batches,
            self.held_out,
            self.config,
            objective=self.objective,
            state=self.state,
            ranks=self.crew.ranks,
            watch=self.watch(),
        ):
            self.loss = progress.loss
            self.losses.append(progress.loss)
            if progress.held_out_loss is not None:
                self.held_out_loss = progress.held_out_loss
            self.listener.step(progress)
            self.between_steps(progress, log)
            if is_due(progress.step, self.save_every):
                self.save()
            self.stopped_early = progress.ending and progress.step < self.config.schedule.steps
            if self.crew.stops(stop.asked) or progress.step >= self.last_step:
                break

    def save(self) -> None:
        """Write ``last``: what was trained in float32, and all it takes to go on."""
        self.state.extra = self.extra()
        self.crew.publish(self.folder, run_folder.LAST, self.step, self.write_last)
        self.saved_step = self.step

    # ── What differs ─────────────────────────────────────────────────────────────────────────────

    def settings_text(self) -> str:
        """What ``config.toml`` says."""
        raise NotImplementedError

    def extra(self) -> dict[str, Any]:
        """What the state is to hold besides its own."""
        raise NotImplementedError

    def log(self) -> AbstractContextManager[Write]:
        """Where the steps are written down."""
        return step_log(self.folder / LOG, self.step)

    def held_out(self, model: Model) -> float:
        """The loss that the model is judged by."""
        raise NotImplementedError

    def watch(self) -> watch.Watch | None:
        """What records chosen tensors; None: no watch is asked for."""
        return None

    def between_steps(self, progress: Progress, log: Write) -> None:
        """What is written down and published after a step."""
        raise NotImplementedError

    def write_last(self, folder: Path) -> None:
        """A checkpoint to go on from."""
        raise NotImplementedError


def is_due(step: int, every: int) -> bool:
    """Whether what is done every so many steps, 0 for never, is done after this one."""
    return every > 0 and step % every == 0


@dataclass(kw_only=True)
class Pretraining(Run):
    """A run that trains on raw text. `summary` says what has come of it."""

    settings: TrainSettings
    tokenizer_folder: Path
    begin_id: int | None  # the token before each document
    training_tokens: int
    held_out_text: TokenSource
    held_out_bytes: int
    bfloat16: bool  # of products, whatever `config` says of autocast
    training_sample_loss: float | None = None
    events: EventFile | None = None

    @property
    def last_step(self) -> int:
        """The step to end after."""
        return self.settings.stop or self.config.schedule.steps

    def settings_text(self) -> str:
        """What ``config.toml`` says."""
        return dump(self.settings, "A training run; pellucid train --config takes this file.")

    def restore(self) -> None:
        """Go on from `state`, which was read from ``RUN/last``.

        Raises ValueError where the text is not what it was, or the state not of such a run.
        """
        extra = self.state.extra
        missing = {"training_tokens", "loss", "held_out_loss"} - extra.keys()
        if missing:
            raise ValueError(
                f"{self.folder / run_folder.LAST} is not of a training run: its state does not say "
                f"{min(missing)}"
            )
        if extra["training_tokens"] != self.training_tokens:
            raise ValueError(
                f"the text has {self.training_tokens:,} tokens now, and had "
                f"{extra['training_tokens']:,}: a run goes on with the text it began with"
            )
        if isinstance(self.batches, LoaderBatches):
            self.batches.restore(extra["batches"])
        self.loss, self.held_out_loss = extra["loss"], extra["held_out_loss"]
        self.saved_step = self.step

    def extra(self) -> dict[str, Any]:
        """What the state is to hold besides its own."""
        found = {
            "training_tokens": self.training_tokens,
            "loss": self.loss,
            "held_out_loss": self.held_out_loss,
        }
        if isinstance(self.batches, LoaderBatches):
            found["batches"] = self.batches.state()
        return found

    def fit(self, stop: Stop) -> None:
        """Train to the end or until `stop`, then evaluate on all held-out text and save."""
        settings, first = self.settings, self.crew.first
        if torch.device(settings.device).type == "cpu":
            keep_freed_memory()
        self.listener.opening(self.summary() | self._speed())
        with ExitStack() as stack:
            if settings.tensorboard and first:
                self.events = stack.enter_context(EventFile(self.folder / EVENTS))
            super().fit(stop)
        if self.stopped_early or self.step >= self.last_step:
            self._evaluate_all()
        if self.saved_step != self.step:
            self.save()
        if settings.plot and self.step and first:
            draw(self.folder / LOG, self.folder / PLOT, str(self.folder))
            if settings.trace_every:
                table, picture = self.folder / watch.TABLE, self.folder / PICTURE
                draw_watch(table, picture, str(self.folder))
        self.listener.closing(self.summary())

    def _speed(self) -> dict[str, Any]:
        """FLOPs of a token, the machine's FLOP/s, and where this run stands and ends."""
        facts = {
            "last_step": self.last_step,
            "bfloat16": self.bfloat16,
            "crew": self.crew.about,
            "flops_per_token": 0,
            "peak": 0.0,
        }
        if self.listener.shows_speed:
            dtype = torch.bfloat16 if self.bfloat16 else torch.float32
            device = torch.device(self.settings.device)
            facts["peak"] = measured_peak(device, dtype) * self.crew.processes
            facts["flops_per_token"] = flops_per_token(self.model, self.model.config.context_length)
        return facts

    def log(self) -> AbstractContextManager[Write]:
        """Where the steps are written down: by the first process."""
        return super().log() if self.crew.first else _no_log()

    def watch(self) -> watch.Watch | None:
        """What records chosen tensors; None: no watch is asked for."""
        settings = self.settings
        if not (settings.trace_every and self.crew.first):
            return None
        return watch.Watch(
            self.folder,
            settings.trace_every,
            settings.only or ["*"],
            tensors=settings.trace_tensors,
            done=self.step,
        )

    def held_out(self, model: Model) -> float:
        """Loss on windows of held-out text; the book's loop evaluates training text as well."""
        ranks = self.crew.ranks
        if isinstance(self.batches, LoaderBatches):
            sample = self.batches.evaluation_sample(self.step)
            if sample is not None:
                losses = [evaluate(model, _joined(batch), ranks=ranks) for batch in sample]
                self.training_sample_loss = sum(losses) / len(losses)
        windows = self._windows(self.settings.eval_windows or None)
        return evaluate(model, windows, bfloat16=self.config.bfloat16, ranks=ranks)

    def _windows(self, limit: int | None) -> Tensor:
        return held_out_windows(self.held_out_text, self.model.config.context_length, limit)

    def between_steps(self, progress: Progress, log: Write) -> None:
        """Log and events; a sample of text where it is due; the best model."""
        log(progress, {})
        self._add_events(progress)
        if self.training_sample_loss is not None and progress.held_out_loss is not None:
            self.listener.say(
                f"step {progress.step}: training text {self.training_sample_loss:.3f}, "
                f"held-out text {progress.held_out_loss:.3f}"
            )
        if is_due(progress.step, self.settings.sample_every):
            self.listener.say(f"{self.sample()}\n")
        if progress.best:
            self.crew.publish(self.folder, run_folder.BEST, self.step, self._write_best)

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
                progress.held_out_loss, len(self.held_out_text), self.held_out_bytes
            )
        self.events.add(progress.step, scalars)

    def write_last(self, folder: Path) -> None:
        """A checkpoint to go on from."""
        save = self._save_model(torch.float32)
        settings = self.folder / CONFIG
        self.crew.write_checkpoint(folder, self.model, self.state, save, settings)

    def _write_best(self, folder: Path) -> None:
        save = self._save_model(getattr(torch, self.settings.dtype))
        self.crew.write_weights(folder, self.model, save)

    def _save_model(self, dtype: torch.dtype) -> Callable[[Path, Weights], None]:
        def save(folder: Path, weights: Weights) -> None:
            config, tokenizer = self.model.config, self.tokenizer_folder
            checkpoints.save(folder, config, weights, tokenizer_from=tokenizer, dtype=dtype)

        return save

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
        windows = self._windows(None)
        with torch.compiler.set_stance("force_eager"):
            self.held_out_loss = evaluate(self.model, windows, ranks=self.crew.ranks)

    def summary(self) -> dict[str, Any]:
        """What came of it; losses in nats per token."""
        config, state, loss = self.model.config, self.state, self.held_out_loss
        tokens, text_bytes = len(self.held_out_text), self.held_out_bytes
        best = run_folder.step_of(self.folder / run_folder.BEST)
        return {
            "out": str(self.folder),
            "model": str(self.folder / (run_folder.LAST if best is None else run_folder.BEST)),
            "family": config.family,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "training_tokens": self.training_tokens,
            "held_out_tokens": tokens,
            "held_out_bytes": text_bytes,
            "steps": self.step,
            "interrupted": self.interrupted,
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


@contextmanager
def _no_log() -> Iterator[Write]:
    yield lambda progress, values: None
