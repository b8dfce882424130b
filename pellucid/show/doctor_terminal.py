"""What ``pellucid doctor`` prints: a table of checks, and what would be faster with what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from pellucid.doctor import MachineReport

_STYLES = {"right": "green", "wrong": "bold red", "note": "yellow", "absent": "dim"}


def print_doctor(out: Console, report: MachineReport) -> None:
    """The machine, each check with what was found, advice, and the sum of it all."""
    about = report.machine
    out.print(Text(about["cpu"], "bold"), Text(f"  {about['system']}", "dim"))
    versions = " · ".join(f"{name} {about[name]}" for name in ("pellucid", "torch", "python"))
    out.print(Text(f"{versions}; kernels may use {', '.join(about['flags']) or 'no flags'}"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for column in ("examined", "", "found"):
        table.add_column(column, overflow="fold")
    for check in report.checks:
        state = Text(check.state, _STYLES[check.state])
        table.add_row(Text(check.name), state, Text(check.found))
    out.print(table)
    for line in report.advice:
        out.print(Text(f"· {line}"), soft_wrap=True)
    wrong = [check.name for check in report.checks if check.state == "wrong"]
    out.print()
    if wrong:
        out.print(Text(f"WRONG: {'; '.join(wrong)}: results of this machine cannot be relied on"))
    else:
        out.print(Text("This machine computes correctly, as far as was examined."))
