"""``pellucid train``: a model from raw text, saved where every other verb can read it."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.cli.arguments import add_run_arguments, add_shared
from pellucid.cli.flags import add_flags, given
from pellucid.cli.output import console, print_json, progress_bar

if TYPE_CHECKING:
    from pellucid.show.training_terminal import Display
    from pellucid.train.entry import RunRequest


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, and what is about this one call."""
    from pellucid.train.settings import TrainSettings, presets

    group = parser.add_argument_group("run")
    add_run_arguments(group)
    group.add_argument(
        "--preset",
        metavar="NAME",
        help=f"shipped recipe to begin from: {', '.join(presets())}",
    )
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file of settings, which flags override"
    )
    group.add_argument(
        "--tokenise-only",
        action="store_true",
        help="write RUN/tokens and end; a later run reads the tokens from there",
    )
    add_shared(group, "--json")
    add_flags(parser, TrainSettings)


def train(arguments: argparse.Namespace) -> int:
    """Train and save; 130 when interrupted, with what there is saved."""
    from pellucid.train.entry import carry_out

    if arguments.tokenise_only:
        return _tokenise_only(arguments)
    run = carry_out(_request(arguments), _display(arguments))
    if arguments.json and run.crew.first:
        print_json(run.summary())
    return 130 if run.interrupted and run.crew.first else 0


def _display(arguments: argparse.Namespace) -> Display:
    from pellucid.show.training_terminal import Display

    quiet = arguments.json
    return Display(console(stderr=quiet), quiet=quiet, work_bar=partial(progress_bar, quiet=quiet))


def _request(arguments: argparse.Namespace) -> RunRequest:
    """What the arguments ask for; of several ranks only the first says what is wrong with it."""
    from pellucid.cli import USER_ERRORS
    from pellucid.train.entry import request
    from pellucid.train.settings import TrainSettings

    try:
        return request(
            given(arguments, TrainSettings),
            arguments.out,
            preset=arguments.preset,
            config=arguments.config,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
        )
    except USER_ERRORS:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise SystemExit(2) from None


def _tokenise_only(arguments: argparse.Namespace) -> int:
    """Tokenise, and leave the rest to a run with the same text and tokenizer."""
    from pellucid.train.entry import tokenise_only

    summary = tokenise_only(_request(arguments), _display(arguments))
    if arguments.json:
        print_json(summary)
        return 0
    console().print(
        f"{summary['training_tokens']:,} tokens to train on and {summary['held_out_tokens']:,} "
        f"for validation, of {summary['vocab_size']:,} kinds, in {summary['folder']}",
        markup=False,
    )
    return 0
