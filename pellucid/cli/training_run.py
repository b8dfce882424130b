"""A training run at the terminal: steps, samples, checkpoints, and what is shown of them."""

from __future__ import annotations

import argparse
import csv
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from pellucid.cli.common import console

if TYPE_CHECKING:
    from torch import Tensor

    from pellucid.models import Model
    from pellucid.tokenizers import Tokenizer
    from pellucid.train import Batches, Progress, TrainConfig

LOG_COLUMNS = ("step", "tokens", "seconds", "rate", "loss", "gradient_norm", "held_out_loss")
EVALUATION_WINDOWS = 32  # between steps; the evaluation at the end reads all of the held-out text
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

    arguments: argparse.Namespace
    model: Model
    tokenizer: Tokenizer
    tokenizer_folder: Path
    begin: int  # the token before each document
    batches: Batches
    held_out: Tensor  # (N) token ids
    held_out_bytes: int
    config: TrainConfig
    last: Progress | None = None
    saved_step: int = 0
    held_out_loss: float | None = None

    def __post_init__(self) -> None:
        self.display = Display(self.last_step, quiet=self.arguments.json)

    @property
    def last_step(self) -> int:
        """The step to end after."""
        return self.arguments.stop or self.arguments.steps

    @property
    def step(self) -> int:
        """Steps done."""
        return self.last.step if self.last else 0

    def fit(self, stop: Stop) -> None:
        """Train to the end or until `stop`, then evaluate on all held-out text and save."""
        from pellucid.train import TrainingDiverged, held_out_windows, train

        context = self.model.config.context_length
        few = held_out_windows(self.held_out, context, EVALUATION_WINDOWS)
        self.display.opening(self)
        with self._log() as log, self.display:
            try:
                for progress in train(self.model, self.batches, few, self.config):
                    self.last = progress
                    log.writerow(_log_row(progress))
                    self._between_steps(progress)
                    if stop.asked or progress.step == self.last_step:
                        break
            except TrainingDiverged as error:
                kept = f"{self.arguments.out} holds the model after step {self.saved_step}"
                raise TrainingDiverged(f"{error}; {kept}") from None
        if self.step == self.last_step:
            self._evaluate_all()
        if self.saved_step != self.step:
            self.save()

    def _between_steps(self, progress: Progress) -> None:
        arguments = self.arguments
        if progress.held_out_loss is not None:
            self.held_out_loss = progress.held_out_loss
        self.display.step(progress)
        if _due(progress.step, arguments.sample_every):
            self.display.say(f"{self.sample()}\n")
        if _due(progress.step, arguments.save_every):
            self.save()

    @contextmanager
    def _log(self) -> Iterator[Any]:
        out = self.arguments.out
        path = self.arguments.log or out.with_name(f"{out.name}.csv")
        with path.open("w", newline="", encoding="utf-8", buffering=1) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(LOG_COLUMNS)
            yield writer

    def save(self) -> None:
        """Write the model as it is now, in Hugging Face's layout; the folder is replaced whole."""
        import torch

        from pellucid import checkpoints

        arguments = self.arguments
        checkpoints.save(
            arguments.out,
            self.model.config,
            self.model.state_dict(),
            tokenizer_from=self.tokenizer_folder,
            dtype=getattr(torch, arguments.dtype),
            overwrite=arguments.overwrite or self.last is not None,
        )
        self.saved_step = self.step

    def sample(self) -> str:
        """The prompt and what the model writes after it, at temperature 0.8."""
        from pellucid.generate import Sampling, stream_text

        prompt = self.arguments.prompt
        ids = [self.begin, *self.tokenizer.encode(prompt)]
        self.model.eval()
        stream = stream_text(
            self.model,
            self.tokenizer,
            [ids],
            sampling=Sampling(temperature=0.8),
            max_new_tokens=min(SAMPLE_TOKENS, self.model.config.context_length - len(ids)),
            seed=self.arguments.seed,
        )
        text = prompt + stream.complete()[0].text
        self.model.train()
        return text

    def _evaluate_all(self) -> None:
        """Loss over all held-out text, in float32."""
        from pellucid.train import evaluate, held_out_windows

        windows = held_out_windows(self.held_out, self.model.config.context_length)
        self.held_out_loss = evaluate(self.model, windows)

    def summary(self) -> dict[str, Any]:
        """What came of it; losses in nats per token."""
        from pellucid.train import bits_per_byte

        config, last, loss = self.model.config, self.last, self.held_out_loss
        tokens, text_bytes = len(self.held_out), self.held_out_bytes
        return {
            "out": str(self.arguments.out),
            "family": config.family,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "training_tokens": len(self.batches.stream),
            "held_out_tokens": tokens,
            "held_out_bytes": text_bytes,
            "steps": self.step,
            "interrupted": self.step != self.last_step,
            "tokens": last.tokens if last else 0,
            "seconds": last.seconds if last else 0.0,
            "tokens_per_second": last.tokens / last.seconds if last else 0.0,
            "loss": last.loss if last else None,
            "held_out_loss": loss,
            "bits_per_byte": loss and bits_per_byte(loss, tokens, text_bytes),
        }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _log_row(progress: Progress) -> list[str]:
    held_out = progress.held_out_loss
    return [
        str(progress.step),
        str(progress.tokens),
        f"{progress.seconds:.1f}",
        f"{progress.rate:.4e}",
        f"{progress.loss:.4f}",
        f"{progress.gradient_norm:.4f}",
        "" if held_out is None else f"{held_out:.4f}",
    ]


class Display:
    """A bar on a terminal, a line every tenth step in a pipe, nothing when `quiet`."""

    def __init__(self, steps: int, *, quiet: bool) -> None:
        self.steps, self.quiet = steps, quiet
        self.console = console(stderr=quiet)
        self._held_out = ""
        self._bar: Bar | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.quiet:
            facts = TextColumn(
                "{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")
            )
            done = TextColumn("{task.completed}/{task.total}")
            self._bar = Bar(done, BarColumn(bar_width=10), facts, console=self.console)
            self._bar.add_task("", total=self.steps)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """A line, above the bar where there is one."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def opening(self, run: Run) -> None:
        """What is about to be trained, on what."""
        facts = run.summary()
        arithmetic = "bfloat16" if run.config.bfloat16 else "float32"
        self.say(
            f"{facts['family']}, {facts['parameters']:,} parameters, vocabulary "
            f"{facts['vocab_size']:,}, context {facts['context_length']}, {arithmetic} products\n"
            f"{facts['training_tokens']:,} tokens of text, {facts['held_out_tokens']:,} held out"
        )

    def step(self, progress: Progress) -> None:
        """One step done."""
        if progress.held_out_loss is not None:
            self._held_out = f"  held out {progress.held_out_loss:.3f}"
        speed = progress.tokens / progress.seconds
        left = progress.seconds / progress.step * (self.steps - progress.step)
        facts = (
            f"{_clock(left)} left  loss {progress.loss:.3f}{self._held_out}  "
            f"{speed:,.0f} tokens/s  rate {progress.rate:.1e}"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=progress.step, description=facts)
        elif progress.step % 10 == 0 or progress.step in (1, self.steps):
            self.say(f"step {progress.step}/{self.steps}  {facts}")

    def closing(self, summary: Mapping[str, Any]) -> None:
        """How it ended."""
        loss, bits = summary["held_out_loss"], summary["bits_per_byte"]
        held_out = "" if loss is None else f", held out {loss:.3f} nats/token, {bits:.3f} bits/byte"
        how = "interrupted" if summary["interrupted"] else "done"
        self.say(
            f"{how} after step {summary['steps']}: {summary['tokens']:,} tokens in "
            f"{_clock(summary['seconds'])}{held_out}; the model is in {summary['out']}"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
