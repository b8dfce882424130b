"""``pellucid finetune``: a trained model learns from text, conversations, labels or preferences."""

from __future__ import annotations

import argparse
from pathlib import Path

from pellucid.cli.common import console, print_json
from pellucid.cli.flags import add_flags, given


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where to put it, and a flag for every setting."""
    from pellucid.train.finetune.settings import FinetuneSettings

    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model to fine-tune: a folder, owner/name on the Hub, or a demo (default demo)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="OUT", required=True, help="folder that the run is written to"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run from its last checkpoint, OUT/last, bit for bit",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that OUT holds already"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a summary as one JSON object, no progress"
    )
    add_flags(parser, FinetuneSettings)


def finetune(arguments: argparse.Namespace) -> int:
    """Fine-tune and save; 130 when interrupted, with what there is saved."""
    from pellucid.show.training_terminal import FinetuneDisplay
    from pellucid.train.finetune.entry import carry_out
    from pellucid.train.finetune.settings import FinetuneSettings

    settings = given(arguments, FinetuneSettings)
    if arguments.model is not None:
        settings["model"] = arguments.model
    display = FinetuneDisplay(console(stderr=arguments.json), quiet=arguments.json)
    run = carry_out(
        settings, arguments.out, display, resume=arguments.resume, overwrite=arguments.overwrite
    )
    if arguments.json:
        print_json(run.summary())
    return 130 if run.interrupted else 0
