"""``pellucid trace``: every named tensor of a run, in a file."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from pellucid.cli.arguments import add_model_arguments, add_shared, load_model, read_prompt
from pellucid.cli.output import print_report
from pellucid.files import check_output


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid trace``."""
    add_model_arguments(parser)
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="text to run the model on, - to read it from standard input",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="safetensors file to write the tensors to",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="GLOB",
        help="write only tensors with names such as 'layers.*.attn.pattern' (repeatable; default: "
        "every tensor)",
    )
    parser.add_argument(
        "--generate",
        type=int,
        default=0,
        metavar="N",
        help="after the prompt, generate N tokens and trace each decoding step too (default: 0)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--all", action="store_true", help="list every tensor, not one line for all layers"
    )
    add_shared(group, "--json", "--force")


def trace(arguments: argparse.Namespace) -> None:
    """Record a run into a trace file and list what is in it."""
    from pellucid.models.finite import is_finite, why_not_finite
    from pellucid.show.trace_terminal import listing, trace_as_json

    target = arguments.output
    check_output(target, arguments.force, "-o")
    if arguments.generate < 0:
        raise ValueError(f"--generate {arguments.generate}: expected 0 or more decoding steps")
    if arguments.prompt is None:
        raise ValueError("there is no PROMPT: give the text to run the model on")
    prompt = read_prompt(arguments.prompt)
    if not prompt:
        raise ValueError("the prompt is empty: give some text")
    model = load_model(arguments)
    recorded = model.trace(prompt, only=arguments.only or "*", generate=arguments.generate)
    if not recorded:
        globs = ", ".join(arguments.only or "*")
        raise ValueError(
            f"no tensor of this run is called {globs}: names look like layers.0.attn.q or logits"
        )
    if "logits" in recorded and not is_finite(recorded["logits"]):
        warnings.warn(f"the logits are not numbers: {why_not_finite(model.model)}", stacklevel=1)
    recorded.save(target)
    report, lines = trace_as_json(recorded, target), listing(recorded, target, every=arguments.all)
    print_report(report, lines, as_json=arguments.json)
