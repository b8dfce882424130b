"""``pellucid info``: what a model is made of, counted and drawn, without loading a weight."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pellucid.cli.arguments import add_shape_argument, add_shared
from pellucid.cli.output import console, print_json
from pellucid.cli.streams import can_encode
from pellucid.files import check_output, write_whole


def info_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and what to show of it."""
    add_shape_argument(parser)
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="count KV cache and FLOPs for N tokens (default: the model's whole context)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--svg", type=Path, metavar="FILE", help="also draw the model's structure, as an SVG file"
    )
    group.add_argument(
        "--no-diagram", action="store_true", help="print the numbers without the diagram"
    )
    add_shared(group, "--json", "--force")


def info(arguments: argparse.Namespace) -> None:
    """Print the census and the diagram of a model."""
    from pellucid.checkpoints.model_report import model_report
    from pellucid.show.diagram import structure
    from pellucid.show.info_terminal import print_diagram, print_report

    if arguments.svg is not None:
        check_output(arguments.svg, arguments.force, "--svg")
    report = model_report(arguments.model, arguments.tokens)
    drawn = structure(report.config, arguments.tokens)
    if arguments.svg:
        from pellucid.show.diagram_svg import svg

        write_whole(arguments.svg, svg(drawn, report.title))
    if arguments.json:
        print_json(report.to_json())
        return
    out = console()
    print_report(out, report)
    if not arguments.no_diagram:
        print_diagram(out, drawn, ascii_only=not can_encode("╭┃⊕ᵀ√", sys.stdout))
    if arguments.svg:
        out.print(f"The picture: {arguments.svg}")
