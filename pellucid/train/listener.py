"""What a run reports while it goes on, to a display or to a caller in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pellucid.train.loop import Progress

Report = Callable[[int, int], None]


class Listener:
    """Receives what a run does, in this order; this base ignores all of it.

    shows_speed  whether the run is to measure the machine before its first step
    """

    shows_speed = False

    def tokenising(self) -> AbstractContextManager[Report | None]:
        """Around reading text: gives a function of bytes done and bytes in all, or None."""
        return nullcontext()

    def opening(self, facts: Mapping[str, Any]) -> None:
        """What is about to be trained, on what, and up to which step."""

    def stepping(self) -> AbstractContextManager[object]:
        """Around the steps."""
        return nullcontext()

    def step(self, progress: Progress) -> None:
        """One step is done."""

    def say(self, text: str) -> None:
        """A sample, or measures of an evaluation, in a line or several."""

    def closing(self, summary: Mapping[str, Any]) -> None:
        """The run has ended; `summary` is its result."""


class Callback(Listener):
    """Calls a function with the `Progress` of each step."""

    def __init__(self, call: Callable[[Progress], object] | None) -> None:
        self.call = call

    def step(self, progress: Progress) -> None:
        """One step is done."""
        if self.call is not None:
            self.call(progress)
