"""``pellucid walk``: from a text to the next token, one named tensor at a time."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.cli.arguments import add_model_arguments, add_page_argument, add_shared, read_prompt
from pellucid.cli.output import console, print_json, shows_progress
from pellucid.files import check_output

if TYPE_CHECKING:
    from pellucid.prompt_walk import PromptWalk
    from pellucid.show.walk_files import WalkFiles
    from pellucid.show.walk_terminal import WalkPrinter
    from pellucid.walk import Step


def walk_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid walk``."""
    add_model_arguments(parser)
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="text whose next token is worked out, - to read it from standard input "
        "(default: an example)",
    )
    group = parser.add_argument_group("what is shown in full")
    group.add_argument(
        "--layer", type=int, default=0, metavar="N", help="show layer N in full (default: 0)"
    )
    group.add_argument(
        "--head",
        type=int,
        default=0,
        metavar="N",
        help="show attention head N in full (default: 0)",
    )
    group.add_argument("--all", action="store_true", help="show every head of every layer")
    group.add_argument(
        "--source",
        action="store_true",
        help="show under each step the lines of `pellucid code` that compute it",
    )
    add_shared(parser, "--no-bos")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--plots", type=Path, metavar="DIR", help="also draw the steps, as PNG files in DIR"
    )
    add_page_argument(group, "the walk")
    add_shared(group, "--json", "--force")


def walk(arguments: argparse.Namespace) -> None:
    """Show every step between a prompt and its next token; the model is never loaded whole."""
    from pellucid.prompt_walk import walk_prompt
    from pellucid.show.walk_files import WalkFiles
    from pellucid.show.walk_terminal import WalkPrinter
    from pellucid.source.step_lines import StepLines

    if arguments.source and arguments.json:
        raise ValueError("--source shows code between the steps, which --json has no place for")
    if arguments.html is not None:
        check_output(arguments.html, arguments.force, "--html")
    if arguments.plots is not None and arguments.plots.exists() and not arguments.plots.is_dir():
        raise ValueError(f"--plots {arguments.plots}: a folder was expected, this is a file")
    if arguments.plots is not None and not arguments.force and any(arguments.plots.glob("*.png")):
        raise ValueError(f"--plots {arguments.plots}: has figures already: --force replaces them")
    steps = walk_prompt(
        arguments.model,
        None if arguments.prompt is None else read_prompt(arguments.prompt),
        layer=arguments.layer,
        head=arguments.head,
        everything=arguments.all,
        bos=False if arguments.no_bos else None,
        dtype=arguments.dtype,
        device=arguments.device,
        dialect=arguments.dialect,
        adapter=arguments.adapter,
    )
    code = StepLines(steps.config, steps.dialect)  # resolves nothing before it is asked
    files = WalkFiles(
        steps.token_strings, plots=arguments.plots, page=arguments.html, lines=code.lines
    )
    if arguments.json:
        entries = [step.to_json() for step in _shown(steps, files)]
        files.write(steps.to_json())
        print_json(steps.to_json(entries))
        return
    shown = partial(code.lines, most=3) if arguments.source else None
    printer = WalkPrinter(console(), steps.tokens, steps.token_strings, shown)
    for step in _shown(steps, files, printer):
        printer.print_step(step)
    printer.print_result(steps.result)
    files.write(steps.to_json())
    printer.print_files(files.written())


def _shown(
    steps: PromptWalk, files: WalkFiles, printer: WalkPrinter | None = None
) -> Iterator[Step]:
    """The steps, each taken into the files; the current layer on a terminal meanwhile."""
    from pellucid.show.walk_terminal import layer_status

    # The printer's own console: two on one terminal would write into each other's lines.
    out = console() if printer is None else printer.console
    out = out if out.is_terminal else console(stderr=True)
    with layer_status(out, steps.n_layers if shows_progress(out) else 0) as show:
        for step in steps:
            show(step.address)
            yield step
            files.add(step)
