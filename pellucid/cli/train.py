"""``pellucid train``: a model from raw text, saved where every other verb can read it."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pellucid.cli.common import console, print_json

if TYPE_CHECKING:
    from pellucid.cli.training_run import Run
    from pellucid.train.settings_table import Setting, Value

# What may be changed when a run goes on: nothing that changes its steps.
MAY_CHANGE = {"stop", "device", "save_every", "sample_every", "prompt", "tensorboard", "plot"}
MAY_CHANGE |= {"trace_every", "only", "trace_tensors"}
MAY_CHANGE |= {"parallel", "tensor", "recompute", "rank_timeout"}  # who computes what, not what


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, and what is about this one call."""
    from pellucid.train.settings_table import SECTIONS, SETTINGS

    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="RUN", required=True, help="the run's folder")
    group.add_argument("--preset", metavar="NAME", help="a recipe: book-gpt2, stories-15m …")
    group.add_argument("--config", type=Path, metavar="FILE", help="settings from a TOML file")
    group.add_argument("--resume", action="store_true", help="go on from RUN/last, bit for bit")
    group.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    group.add_argument(
        "--tokenise-only", action="store_true", help="write RUN/tokens, which a later run maps"
    )
    group.add_argument("--json", action="store_true", help="a summary as JSON instead of progress")
    for section in SECTIONS:
        group = parser.add_argument_group(f"[{section}]")
        for setting in SETTINGS:
            if setting.section == section:
                _flag(group, setting)


def _flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """Absent from the namespace unless given, so that a file's value is not overruled."""
    shown = f"{setting.help} ({_default(setting)})".replace("%", "%%")
    options: dict[str, Any] = {"help": shown, "default": argparse.SUPPRESS}
    if setting.kind is bool:
        group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, **options)
        return
    if setting.kind is list:
        metavar = "GLOB" if setting.name == "only" else "PATH"
        options |= {"nargs": "+", "metavar": metavar, "action": "extend"}
    elif setting.choices:
        options |= {"choices": setting.choices}
    else:
        options |= {"type": setting.kind, "metavar": "N" if setting.kind is not str else "TEXT"}
    group.add_argument(setting.flag, **options)


def _default(setting: Setting) -> str:
    if setting.default is None:
        return setting.otherwise or "none"
    if setting.kind is bool:
        return "yes" if setting.default else "no"
    return f"{setting.default:g}" if setting.kind in (int, float) else repr(setting.default)


def train(arguments: argparse.Namespace) -> int:
    """Train and save; 130 when interrupted, with what there is saved."""
    from pellucid.train.parallel import ranks_launched

    if arguments.tokenise_only:
        return _tokenise_only(arguments)
    if ranks_launched():
        return _train_on_ranks(arguments)
    from pellucid.cli.training_run import stopping
    from pellucid.cli.training_setup import clear
    from pellucid.train import run_folder

    settings = _settings(arguments)
    with run_folder.locked(arguments.out), TemporaryDirectory() as folder:
        _make_room(arguments, settings)
        run = _prepared(arguments, settings, Path(folder))
        if not arguments.resume:
            clear(arguments.out)
            run.begin()  # a folder that cannot be written shows now, not after an hour
        with stopping() as stop:
            run.fit(stop)
        return _closing(arguments, run)


def _tokenise_only(arguments: argparse.Namespace) -> int:
    """Tokenise, and leave the rest to a run with the same text and tokenizer."""
    from pellucid.cli.training_setup import TOKENS, read_text, tokenizer_for
    from pellucid.train import run_folder
    from pellucid.train.parallel import ranks_launched

    settings = _settings(arguments)
    if not (settings.data and settings.begin):
        raise ValueError("--tokenise-only is for --data: other text is tokenised in memory")
    if ranks_launched():
        raise ValueError("--tokenise-only starts processes of its own: leave out torchrun")
    with run_folder.locked(arguments.out), TemporaryDirectory() as folder:
        tokenizer = tokenizer_for(settings, Path(folder))
        text = read_text(settings, tokenizer, arguments.out, quiet=arguments.json)
    summary = {
        "folder": str(settings.tokens or arguments.out / TOKENS),
        "vocab_size": tokenizer.vocab_size,
        "training_tokens": len(text.training),
        "held_out_tokens": len(text.held_out),
    }
    if arguments.json:
        print_json(summary)
    else:
        console().print(
            f"{summary['training_tokens']:,} tokens of text and {summary['held_out_tokens']:,} "
            f"held out, of {summary['vocab_size']:,} kinds, in {summary['folder']}",
            markup=False,
        )
    return 0


def _train_on_ranks(arguments: argparse.Namespace) -> int:
    """One of the processes of ``torchrun … -m pellucid train``."""
    from pellucid.cli.training_ranks import go_on_if_restarted, layout, on_ranks, quiet_unless_first
    from pellucid.cli.training_run import stopping
    from pellucid.train import run_folder
    from pellucid.train.parallel import ranks_launched
    from pellucid.train.parallel.ranks import joined

    with quiet_unless_first():
        go_on_if_restarted(arguments)
        settings = _settings(arguments)
        layout(settings, ranks_launched())  # what cannot be shared out shows before ranks meet
    with (
        joined(settings.device, settings.rank_timeout) as ranks,
        run_folder.locked(arguments.out) if ranks.first else nullcontext(),
        TemporaryDirectory() as folder,
    ):
        if ranks.first:
            _make_room(arguments, settings)
        run = on_ranks(
            settings,
            arguments.out,
            ranks,
            lambda: _prepared(arguments, settings, Path(folder)),
            resume=arguments.resume,
        )
        with stopping() as stop:
            run.fit(stop)
        return _closing(arguments, run) if ranks.first else 0


def _settings(arguments: argparse.Namespace) -> argparse.Namespace:
    return resumed(arguments) if arguments.resume else resolved(arguments)


def _make_room(arguments: argparse.Namespace, settings: argparse.Namespace) -> None:
    from pellucid.cli.training_setup import TOKENS, clear

    if arguments.resume:
        return
    check_out(arguments.out, arguments.overwrite)
    if arguments.overwrite and settings.tokens is None:
        clear(arguments.out, TOKENS)  # of an earlier run with another tokenizer


def _prepared(arguments: argparse.Namespace, settings: argparse.Namespace, folder: Path) -> Run:
    from pellucid.cli.training_setup import go_on, prepare

    begin = go_on if arguments.resume else prepare
    return begin(settings, arguments.out, folder, quiet=arguments.json)


def _closing(arguments: argparse.Namespace, run: Run) -> int:
    summary = run.summary()
    if arguments.json:
        print_json(summary)
    else:
        run.display.closing(summary)
    return 130 if summary["interrupted"] else 0


def given_flags(arguments: argparse.Namespace) -> dict[str, Value]:
    """The settings that stand on the command line, checked like those of a file."""
    from pellucid.train.settings import checked
    from pellucid.train.settings_table import SETTINGS

    return {
        setting.name: checked(setting, getattr(arguments, setting.name), setting.flag)
        for setting in SETTINGS
        if hasattr(arguments, setting.name)
    }


def resolved(arguments: argparse.Namespace) -> argparse.Namespace:
    """Defaults, then the preset, then the file, then the flags: the later one wins."""
    from pellucid.train import settings

    given: dict[str, Value] = {}
    if arguments.preset:
        given |= settings.preset(arguments.preset)
    if arguments.config:
        given |= settings.read(arguments.config)
    given |= given_flags(arguments)
    return settings.resolve(given)


def resumed(arguments: argparse.Namespace) -> argparse.Namespace:
    """The settings of the run that is gone on with; flags may change only what changes no step."""
    from pellucid.train import run_folder, settings
    from pellucid.train.state import check_settings

    path = arguments.out / "config.toml"
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {arguments.out} holds no run (no config.toml in it)")
    check_settings(arguments.out / run_folder.LAST, path)
    written = settings.defaults() | settings.read(path)
    for name, value in given_flags(arguments).items():
        if name not in MAY_CHANGE and value != written[name]:
            flag = settings.BY_NAME[name].flag
            raise ValueError(
                f"--resume goes on with {path}, where {name} is {written[name]!r}: leave out {flag}"
            )
        written[name] = value
    return argparse.Namespace(**written)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder with something in it that nobody said to replace."""
    if {path.name for path in out.iterdir()} - {"tokens"} and not overwrite:
        raise FileExistsError(
            f"--out {out} is not empty: give a new folder, --resume to go on, or --overwrite"
        )
