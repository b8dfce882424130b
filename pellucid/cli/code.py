"""``pellucid code MODEL``: the forward of exactly this model as one plain file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pellucid.cli.arguments import add_shape_argument, add_shared


def code_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, whose rounding, and where to."""
    add_shape_argument(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="Python file to write (default: print it)"
    )
    add_shared(parser, "--dialect", "--force")


def code(arguments: argparse.Namespace) -> None:
    """Print the file, or write it whole."""
    from pellucid import source
    from pellucid.files import write_text

    target = arguments.output
    if target is None:
        sys.stdout.write(source.code(arguments.model, dialect=arguments.dialect))
        return
    if target.exists() and not arguments.force:
        raise ValueError(f"{target} is there already: --force replaces it")
    if target.is_dir() or not target.absolute().parent.is_dir():
        why = "it is a folder" if target.is_dir() else f"there is no folder {target.parent}"
        raise ValueError(f"{target}: {why}; give a file to write, such as model.py")
    write_text(target, source.code(arguments.model, dialect=arguments.dialect))
