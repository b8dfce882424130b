"""``pellucid finetune``: a trained model learns from text, conversations, labels or preferences."""

from __future__ import annotations

import argparse

from pellucid.cli.arguments import add_model, add_run_arguments, add_shared
from pellucid.cli.flags import add_flags, given
from pellucid.cli.output import console, print_json


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where to put it, and a flag for every setting."""
    from pellucid.train.finetune.settings import FinetuneSettings

    group = parser.add_argument_group("run")
    add_model(parser, group, "model to fine-tune", default=None)
    add_run_arguments(group)
    add_shared(group, "--json")
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
