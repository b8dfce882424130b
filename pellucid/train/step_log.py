"""``log.csv``: a line for every step of a run, with enough digits to tell two runs apart."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pellucid.train.loop import Progress

COLUMNS = ("step", "tokens", "seconds", "rate", "loss", "gradient_norm", "held_out_loss")
Write = Callable[[Progress, Mapping[str, float]], None]


@contextmanager
def step_log(path: Path, done: int, more: Sequence[str] = ()) -> Iterator[Write]:
    """A log to write steps to: called with how a step went and the values of `more` columns.

    Lines of the `done` first steps stay, as a run that goes on finds them; later ones are dropped:
    it will write them again. Columns of `more` are empty where a step has no value for them.
    """
    lines: list[list[str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            lines = [line for line in list(csv.reader(file))[1:] if int(line[0]) <= done]
    with path.open("w", newline="", encoding="utf-8", buffering=1) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*COLUMNS, *more))
        writer.writerows(lines)

        def write(progress: Progress, values: Mapping[str, float]) -> None:
            held_out = progress.held_out_loss
            others = (progress.loss, progress.gradient_norm, held_out, *map(values.get, more))
            writer.writerow(
                (
                    progress.step,
                    progress.tokens,
                    f"{progress.seconds:.1f}",
                    f"{progress.rate:.4e}",
                    *("" if value is None else f"{value:.6f}" for value in others),
                )
            )

        yield write
