"""What ``pellucid diff --self-test`` prints: the runs that were reported wrongly, then shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from pellucid.diff.selftest.run import Table


def print_table(out: Console, table: Table) -> None:
    """A paragraph for each run that the diff reported wrongly, then a line for each share."""
    wrong = [row for row in table.rows if not row.right]
    width = max((len(row.fault) for row in wrong), default=0)
    for row in wrong:
        seen = "weights shown" if row.shown else "weights hidden"
        text = Text("✗ ", style="red").append(row.fault.ljust(width), style="not red")
        text.append(f"  {row.model}, {row.dtype}, {seen}", style="not red dim")
        out.print(text, soft_wrap=True)
        out.print(f"    expected {_finding(row.first, row.cause)}", markup=False, soft_wrap=True)
        found = _finding(row.found_first, row.found_cause)
        out.print(f"    found    {found}: {row.verdict}", markup=False, soft_wrap=True)
    numbers = table.summary()
    room = max(map(len, numbers))
    out.print(f"{len(table.rows):,} runs, {len(wrong):,} reported wrongly", style="bold")
    for what, number in numbers.items():
        counted = what.endswith(("faults", "misplaced", "controls", "fired"))
        shown = f"{number:,.0f}" if counted else f"{100 * number:.1f} %"
        out.print(f"{what.ljust(room)}  {shown:>8}", markup=False)


def _finding(first: str, cause: str) -> str:
    return f"{cause or 'no cause'} at {first}" if first else "nothing"
