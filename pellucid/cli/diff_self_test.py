"""``pellucid diff --self-test``: break healthy models in known ways and see what the diff says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from pellucid.cli.common import console, print_json

if TYPE_CHECKING:
    from pellucid.diff.selftest.run import Row, Table


def self_test(models: Sequence[str], as_json: bool, progress: Callable[[str], None]) -> int:
    """Seed every fault in `models`, or in two random ones; 0 where what is promised is kept.

    Promised: in float32 every fault is detected, nowhere is one located in a wrong tensor, and no
    control fires.
    """
    from pellucid.diff.selftest.run import run_benchmark
    from pellucid.diff.selftest.subjects import from_language_model
    from pellucid.language_model import load

    subjects = [from_language_model(load(model)) for model in models]
    table = run_benchmark(subjects or None, progress=progress)
    if all(row.control for row in table.rows):
        raise ValueError("no fault applies to these models: nothing was tested")
    numbers = table.summary()
    if as_json:
        print_json({"summary": numbers, "rows": [_told(row) for row in table.rows]})
    else:
        _show(table)
    broken = [what for what in numbers if what.endswith(("misplaced", "fired")) and numbers[what]]
    return 1 if broken or numbers["float32 detected"] < 1 else 0


def _told(row: Row) -> dict[str, Any]:
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


def _show(table: Table) -> None:
    """What was not told right, then the shares."""
    out = console()
    wrong = [row for row in table.rows if not row.right]
    width = max((len(row.fault) for row in wrong), default=0)
    for row in wrong:
        seen = "weights shown" if row.shown else "weights hidden"
        text = Text("✗ ", style="red").append(row.fault.ljust(width), style="not red")
        text.append(f"  {row.model}, {row.dtype}, {seen}", style="not red dim")
        out.print(text, soft_wrap=True)
        out.print(f"    expected {_sentence(row.first, row.cause)}", markup=False, soft_wrap=True)
        found = _sentence(row.found_first, row.found_cause)
        out.print(f"    found    {found}: {row.verdict}", markup=False, soft_wrap=True)
    numbers = table.summary()
    room = max(map(len, numbers))
    out.print(f"{len(table.rows):,} runs, {len(wrong):,} not told right", style="bold")
    for what, number in numbers.items():
        counted = what.endswith(("faults", "misplaced", "controls", "fired"))
        shown = f"{number:,.0f}" if counted else f"{100 * number:.1f} %"
        out.print(f"{what.ljust(room)}  {shown:>8}", markup=False)


def _sentence(first: str, cause: str) -> str:
    return f"{cause or 'no cause'} at {first}" if first else "nothing"
