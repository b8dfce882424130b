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
        "model", nargs="?", metavar="MODEL", help="folder, owner/name or a demo (default demo)"
    )
    parser.add_argument("--out", type=Path, metavar="OUT", required=True, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last, bit for bit")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    parser.add_argument("--json", action="store_true", help="a summary as JSON, no progress")
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
