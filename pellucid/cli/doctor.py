"""``pellucid doctor``: is this machine computing correctly, and what would make it faster?"""

from __future__ import annotations

import argparse

from pellucid.cli.arguments import add_shared
from pellucid.cli.output import console, print_json, progress_line


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """How to say it; there is nothing to choose."""
    add_shared(parser.add_argument_group("output"), "--json")


def doctor(arguments: argparse.Namespace) -> int:
    """Examine and print; status 1 where something is wrong."""
    from pellucid.doctor import examine_machine
    from pellucid.show.doctor_terminal import print_doctor

    with progress_line() as progress:
        report = examine_machine(progress)
    if arguments.json:
        print_json(report.to_json())
    else:
        print_doctor(console(), report)
    return 0 if report.right else 1
