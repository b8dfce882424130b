"""What training and fine-tuning show: a bar on a terminal, lines in a pipe."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from pellucid.train.finetune.rows import Cut
from pellucid.train.finetune.tasks import UNITS
from pellucid.train.listener import Listener, Report
from pellucid.train.loop import Progress

RECENT = 20  # steps over which speed is taken, so that compiling in the first soon is forgotten
WorkBar = Callable[[str], AbstractContextManager[Report | None]]


class Display(Listener):
    """A bar on a terminal, a line every tenth step in a pipe, nothing when `quiet`.

    work_bar  makes the bar of work with a known end, such as tokenising
    """

    def __init__(self, console: Console, *, quiet: bool, work_bar: WorkBar | None = None) -> None:
        self.console, self.quiet, self._work_bar = console, quiet, work_bar
        self.shows_speed = not quiet
        self.steps, self.flops_per_token, self.peak = 0, 0, 0.0
        self._recent = deque([(0, 0, 0.0)], maxlen=RECENT)  # step, tokens, seconds
        self._held_out = ""
        self._evaluated = (0.0, 0)  # tokens for each step on the way, and at the end
        self._began, self._done = time.monotonic(), (0, 0.0)  # steps and their seconds by then
        self._bar: Bar | None = None

    def tokenising(self) -> AbstractContextManager[Report | None]:
        """A bar of bytes read."""
        return self._work_bar("bytes of text to tokens") if self._work_bar else nullcontext()

    def opening(self, facts: Mapping[str, Any]) -> None:
        """What is about to be trained, on what."""
        self._begin(facts)
        self.flops_per_token, self.peak = facts["flops_per_token"], facts["peak"]
        if facts["crew"]:
            self.say(facts["crew"])
        arithmetic = "bfloat16" if facts["bfloat16"] else "float32"
        peak = f", {self.peak / 1e9:,.0f} GFLOP/s at most" if self.peak else ""
        again = f"\ngoing on after step {facts['steps']}" if facts["steps"] else ""
        some = facts["evaluated_at_once"] < facts["held_out_tokens"]
        sample = (
            f" ({facts['evaluated_at_once']:,} of them at each evaluation, all at the end)"
            if some
            else ""
        )
        self.say(
            f"{facts['family']}, {facts['parameters']:,} parameters, vocabulary "
            f"{facts['vocab_size']:,}, context {facts['context_length']}, "
            f"{arithmetic} matmuls{peak}\n"
            f"{facts['training_tokens']:,} tokens to train on, {facts['held_out_tokens']:,} for "
            f"validation{sample}{again}"
        )

    def _begin(self, facts: Mapping[str, Any]) -> None:
        """Take note of where the run stands and ends: what was done before is in no speed."""
        self.steps = facts["last_step"]
        self._recent.clear()
        self._recent.append((facts["steps"], facts["tokens"], facts["seconds"]))
        self._evaluated = facts.get("evaluated_tokens", self._evaluated)
        self._began, self._done = time.monotonic(), (facts["steps"], facts["seconds"])

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """The bar, where there is a terminal."""
        if not self.console.is_terminal or self.quiet:
            yield
            return
        facts = TextColumn(
            "{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")
        )
        done = TextColumn("{task.completed}/{task.total}")
        with Bar(done, BarColumn(bar_width=10), facts, console=self.console) as self._bar:
            self._bar.add_task("", total=self.steps, completed=self._recent[0][0])
            yield
        self._bar = None

    def say(self, text: str) -> None:
        """A line, above the bar where there is one."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Share of the machine's matrix products that the model's own take up."""
        return tokens_per_second * self.flops_per_token / self.peak if self.peak else None

    def step(self, progress: Progress) -> None:
        """One step done."""
        if progress.held_out_loss is not None:
            self._held_out = f"  validation {progress.held_out_loss:.3f}"
        step, tokens, seconds = self._recent[0]
        self._recent.append((progress.step, progress.tokens, progress.seconds))
        took = progress.seconds - seconds
        speed = (progress.tokens - tokens) / took
        left = self._seconds_left(progress, took / (progress.step - step), speed)
        share = self.utilisation(speed)
        used = "" if share is None else f" (MFU {share:.0%})"
        facts = (
            f"{clock(left)} left  loss {progress.loss:.3f}{self._held_out}  "
            f"{speed:,.0f} tokens/s{used}  lr {progress.rate:.1e}"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=progress.step, description=facts)
        elif progress.step % 10 == 0 or progress.step in (1, self.steps):
            self.say(f"step {progress.step}/{self.steps}  {facts}")

    def _seconds_left(self, progress: Progress, each: float, speed: float) -> float:
        """Of steps, and of evaluations, samples and checkpoints between and after them.

        each   seconds of a step; speed  tokens of steps in a second

        What is between steps is what it was so far; before there was an evaluation, and for the
        one at the end, a token is taken to cost a third of one that is trained on: no backward.
        """
        steps, seconds = self._done
        between = time.monotonic() - self._began - (progress.seconds - seconds)
        between = max(0.0, between) / (progress.step - steps)
        on_the_way, at_the_end = self._evaluated
        if not self._held_out:
            between = max(between, on_the_way / (3 * speed))
        return (each + between) * (self.steps - progress.step) + at_the_end / (3 * speed)

    def closing(self, summary: Mapping[str, Any]) -> None:
        """How it ended."""
        loss, bits = summary["held_out_loss"], summary["bits_per_byte"]
        judged = "" if loss is None else f", validation {loss:.3f} nats/token, {bits:.3f} bits/byte"
        if loss is not None and not summary["interrupted"]:
            judged += " (of all the validation text)"
        self.say(f"{_ending(summary)}{judged}; the model is in {summary['model']}")


class FinetuneDisplay(Display):
    """The same of a fine-tuning run; machine and model are not measured."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        super().__init__(console, quiet=quiet)
        self.shows_speed = False

    def opening(self, facts: Mapping[str, Any]) -> None:
        """What is about to be trained, on what."""
        self._begin(facts)
        begin = f" with {facts['adapter']}" if facts["adapter"] else ""
        self.say(
            f"{_from_here(facts['source'])}{begin}: {facts['trained']:,} of "
            f"{facts['parameters']:,} parameters are trained, {self.steps:,} steps"
        )
        for line in _described(facts):
            self.say(line)
        if facts["steps"]:
            self.say(f"going on after step {facts['steps']}")

    def closing(self, summary: Mapping[str, Any]) -> None:
        """How it ended, and what the model is worth."""
        loss = summary["held_out_loss"]
        judged = "" if loss is None else f", validation {loss:.3f} {UNITS[summary['kind']]}"
        before = summary["held_out_loss_before"]
        self.say(f"{_ending(summary)}{judged} ({before:.3f} before)")
        for line in _report(summary):
            self.say(line)
        self.say(f"the {summary['result']} is in {summary['where']}")


def _ending(summary: Mapping[str, Any]) -> str:
    how = "interrupted" if summary["interrupted"] else "done"
    if summary["stopped_early"]:
        how = "stopped early, with no better loss for a while,"
    return (
        f"{how} after step {summary['steps']}: {summary['tokens']:,} tokens in "
        f"{clock(summary['seconds'])}"
    )


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _from_here(source: str) -> str:
    """A path below this folder without what leads to it."""
    path = Path(source)
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd())) if inside else source


def _described(facts: Mapping[str, Any]) -> Iterator[str]:
    """What is in the data, in lines."""
    if "training_tokens" in facts:
        yield (
            f"{facts['training_tokens']:,} tokens to train on, {facts['held_out_tokens']:,} for "
            f"validation"
        )
    for name, what in (("training", "to train on"), ("held_out", "for validation")):
        if name in facts:
            yield f"{what}: {Cut(**facts[name])}"
    if "balance" in facts:
        counts = ", ".join(f"{label} × {count:,}" for label, count in facts["balance"].items())
        yield f"labels: {counts}"
    if "chat_format" in facts:
        yield f"written in the chat format {facts['chat_format']}, {facts['rows']:,} rows"


def _report(summary: Mapping[str, Any]) -> Iterator[str]:
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
