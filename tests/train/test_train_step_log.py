"""The log of a run: what goes on finds the lines it has done, and none it has to do again."""

from __future__ import annotations

import csv
from pathlib import Path

from pellucid.train import Progress
from pellucid.train.step_log import COLUMNS, step_log


def progress(step: int, held_out: float | None = None) -> Progress:
    return Progress(
        step=step,
        tokens=10 * step,
        seconds=0.5,
        rate=1e-3,
        loss=1.23456789,
        gradient_norm=2.0,
        held_out_loss=held_out,
        best=False,
        ending=False,
    )


def test_lines_and_what_a_resumed_run_keeps_of_them(tmp_path: Path):
    path = tmp_path / "log.csv"
    with step_log(path, 0, ["accuracy"]) as write:
        write(progress(1), {})
        write(progress(2, 3.0), {"accuracy": 0.5})
        write(progress(3), {})
        assert len(path.read_text().splitlines()) == 4  # a killed run has lost none
    with step_log(path, 2, ["accuracy"]) as write:
        write(progress(3, 2.5), {"accuracy": 0.75})
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == (*COLUMNS, "accuracy")
    assert rows[0] == ["1", "10", "0.5", "1.0000e-03", "1.234568", "2.000000", "", ""]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[2][-2:] == ["2.500000", "0.750000"]
    with step_log(path, 0):
        pass
    assert path.read_text() == ",".join(COLUMNS) + "\n"
