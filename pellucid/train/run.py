"""A run, from its first step or a checkpoint to its end: steps, checkpoints, what is written.

`Run` is what training on raw text (`pretraining`) and fine-tuning (`finetune.run`) have in common.
What is another matter for several ranks is asked of a `Crew`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from pellucid.models import Model
from pellucid.tokenizers import Tokenizer
from pellucid.train import run_folder, watch
from pellucid.train.config import TrainConfig
from pellucid.train.listener import Listener
from pellucid.train.loop import Data, Progress, TrainingDiverged, train
from pellucid.train.objective import Objective
from pellucid.train.ranks import Ranks
from pellucid.train.settings import CONFIG
from pellucid.train.state import TrainState
from pellucid.train.step_log import Write, step_log

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
