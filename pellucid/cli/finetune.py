"""``pellucid finetune``: a trained model learns from text, conversations, labels or preferences."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path

from pellucid.cli.common import print_json
from pellucid.cli.finetune_settings import add_flags, defaults, given, resumed


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where to put it, and a flag for every setting."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, owner/name or a demo (default demo)"
    )
    parser.add_argument("--out", type=Path, metavar="OUT", required=True, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last, bit for bit")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    parser.add_argument("--json", action="store_true", help="a summary as JSON, no progress")
    add_flags(parser)


def finetune(arguments: Namespace) -> int:
    """Fine-tune and save; 130 when interrupted, with what there is saved."""
    from pellucid.cli.finetune_run import clear
    from pellucid.cli.finetune_setup import prepare
    from pellucid.cli.training_run import stopping
    from pellucid.train import run_folder

    out: Path = arguments.out
    if arguments.resume:
        settings = resumed(arguments)
    else:
        settings = Namespace(**(defaults() | given(arguments)))
        check(settings)
    with run_folder.locked(out):
        if not arguments.resume:
            check_out(out, arguments.overwrite)
        run = prepare(settings, out, quiet=arguments.json)
        if arguments.resume:
            run.restore()
        else:
            clear(out)
            run.begin()  # a folder that cannot be written shows now, not after an hour
        with stopping() as stop:
            run.fit(stop)
        summary = run.finish()
    if arguments.json:
        print_json(summary)
    return 130 if summary["interrupted"] else 0


def check(settings: Namespace) -> None:
    """What is quick to complain about: settings that exclude each other."""
    if not settings.data:
        raise ValueError("nothing to learn from: give --data FILE")
    if settings.lora is None and settings.adapter is None:
        for name in ("alpha", "targets", "lora_dropout", "merge", "dtype"):
            if getattr(settings, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is about adapters: give --lora RANK or --adapter DIR")
    elif settings.last_blocks is not None:
        given = "--lora" if settings.adapter is None else "--adapter"
        raise ValueError(f"{given} and --last-blocks are two ways to train a part: give one")
    if settings.adapter is not None and settings.targets:
        raise ValueError("--adapter says which layers are adapted: leave out --targets")


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder with something in it that is not to be replaced."""
    if any(out.iterdir()) and not overwrite:
        raise FileExistsError(
            f"--out {out} is not empty: give a new folder, --resume to go on, or --overwrite"
        )
