"""The self-test as one call: faults seeded in models, and whether the diff keeps its promises.

Promised is that in float32 every fault is detected, that no fault is located in a wrong tensor, and
that no control, which changes nothing that counts, is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pellucid import language_model
from pellucid.diff.selftest import run
from pellucid.diff.selftest.subjects import from_language_model

if TYPE_CHECKING:
    from pathlib import Path

    from pellucid.diff.selftest.run import Row, Table


def self_test(
    models: Sequence[str | Path] = (), progress: Callable[[str], None] = lambda what: None
) -> Table:
    """Seed every fault in each of `models`, or in two random ones, and diff it with the original.

    progress  called with what is being run. ValueError where no fault applies to the models.
    """
    subjects = [from_language_model(language_model.load(model)) for model in models]
    table = run.run_benchmark(subjects or None, progress=progress)
    if all(row.control for row in table.rows):
        raise ValueError("no fault applies to these models: nothing was tested")
    return table


def keeps_promises(table: Table) -> bool:
    """Whether the rows of a self-test are what the diff promises."""
    numbers = table.summary()
    broken = [what for what in numbers if what.endswith(("misplaced", "fired")) and numbers[what]]
    return not broken and numbers["float32 detected"] >= 1


def table_as_json(table: Table) -> dict[str, Any]:
    """The object of ``pellucid diff --self-test --json``: shares, and a row per run."""
    return {"summary": table.summary(), "rows": [_row_as_json(row) for row in table.rows]}


def _row_as_json(row: Row) -> dict[str, Any]:
    found = {"first": row.found_first, "cause": row.found_cause, "static": row.found_static}
    return {
        "fault": row.fault,
        "model": row.model,
        "dtype": row.dtype,
        "weights_shown": row.shown,
        "control": row.control,
        "right": row.right,
        "verdict": row.verdict,
        "expected": {"first": row.first, "cause": row.cause, "static": row.static},
        "found": found,
    }
