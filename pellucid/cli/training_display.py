"""What a training run shows: a bar on a terminal, lines in a pipe."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from pellucid.cli.common import console

if TYPE_CHECKING:
    from pellucid.train import Progress


RECENT = 20  # steps over which speed is taken, so that compiling in the first soon is forgotten


class Display:
    """A bar on a terminal, a line every tenth step in a pipe, nothing when `quiet`.

    flops_per_token, peak  for the model FLOP utilisation (MFU); without them it is not shown
    """

    def __init__(self, steps: int, *, quiet: bool) -> None:
        self.steps, self.quiet = steps, quiet
        self.flops_per_token, self.peak = 0, 0.0
        self._recent = deque([(0, 0, 0.0)], maxlen=RECENT)  # step, tokens, seconds
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
            self._bar.add_task("", total=self.steps, completed=self._recent[0][0])
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

    def begin_at(self, step: int, tokens: int, seconds: float) -> None:
        """A run that goes on: what was done before is in no speed."""
        self._recent.clear()
        self._recent.append((step, tokens, seconds))

    def opening(self, facts: Mapping[str, Any], bfloat16: bool) -> None:
        """What is about to be trained, on what."""
        arithmetic = "bfloat16" if bfloat16 else "float32"
        peak = f", {self.peak / 1e9:,.0f} GFLOP/s at most" if self.peak else ""
        again = f"\ngoing on after step {facts['steps']}" if facts["steps"] else ""
        self.say(
            f"{facts['family']}, {facts['parameters']:,} parameters, vocabulary "
            f"{facts['vocab_size']:,}, context {facts['context_length']}, "
            f"{arithmetic} products{peak}\n"
            f"{facts['training_tokens']:,} tokens of text, {facts['held_out_tokens']:,} held out"
            f"{again}"
        )

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Share of the machine's matrix products that the model's own take up."""
        return tokens_per_second * self.flops_per_token / self.peak if self.peak else None

    def step(self, progress: Progress) -> None:
        """One step done."""
        if progress.held_out_loss is not None:
            self._held_out = f"  held out {progress.held_out_loss:.3f}"
        step, tokens, seconds = self._recent[0]
        self._recent.append((progress.step, progress.tokens, progress.seconds))
        took = progress.seconds - seconds
        speed = (progress.tokens - tokens) / took
        left = took / (progress.step - step) * (self.steps - progress.step)
        share = self.utilisation(speed)
        used = "" if share is None else f" (MFU {share:.0%})"
        facts = (
            f"{clock(left)} left  loss {progress.loss:.3f}{self._held_out}  "
            f"{speed:,.0f} tokens/s{used}  rate {progress.rate:.1e}"
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
        if summary["stopped_early"]:
            how = "stopped early, with no better loss for a while,"
        self.say(
            f"{how} after step {summary['steps']}: {summary['tokens']:,} tokens in "
            f"{clock(summary['seconds'])}{held_out}; the model is in {summary['model']}"
        )


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
