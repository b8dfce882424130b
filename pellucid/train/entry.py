"""A whole training run as one call: ``pellucid.train(data=["book.txt"], steps=100, out="run")``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pellucid.train import run_folder
from pellucid.train.fields import states_settings
from pellucid.train.listener import Callback, Listener
from pellucid.train.loop import Progress
from pellucid.train.parallel import ranks_launched
from pellucid.train.prepare import (
    TOKENS,
    clear,
    go_on,
    make_room,
    prepare,
    read_text,
    tokenizer_for,
)
from pellucid.train.pretraining import Pretraining
from pellucid.train.run import stopping
from pellucid.train.settings import CONFIG, TrainSettings, resolve, resumed
from pellucid.train.state import check_settings


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What is to be trained, and where."""

    settings: TrainSettings
    out: Path
    resume: bool
    overwrite: bool


@states_settings(TrainSettings)
def train_model(
    *,
    out: str | Path,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress], object] | None = None,
    **settings: Any,
) -> Pretraining:
    """Train a model from raw text, as ``pellucid train`` does, and save it in the folder `out`.

    preset, config  a recipe that ships, and a TOML file of settings
    resume          go on from ``out/last``, bit for bit
    overwrite       replace a run that is in `out`
    on_progress     called with each step's `Progress`: losses in nats per token
    settings        by their names, such as ``data``, ``steps``, ``lr``: the fields of
                    `TrainSettings`; they go over `config`, which goes over the preset

    Returns the run: its ``model``, ``tokenizer``, ``losses``, ``folder`` and ``summary()``. Ctrl-C
    finishes the step and saves. Raises ValueError or OSError, in one line, for what cannot be done.
    """
    asked = request(
        settings, Path(out), preset=preset, config=config, resume=resume, overwrite=overwrite
    )
    return carry_out(asked, Callback(on_progress))


def request(
    given: Mapping[str, Any],
    out: Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> RunRequest:
    """The settings of a run that is to begin or to go on, found and checked.

    Under torchrun also whether ranks can share it, before they meet.
    """
    if ranks_launched():
        from pellucid.train.parallel.run import after_restart

        resume, overwrite = after_restart(out, resume, overwrite)
    if resume:
        settings = resumed(out, given)
        check_settings(out / run_folder.LAST, out / CONFIG)
    else:
        settings = resolve(given, recipe=preset, config=config)
    if ranks_launched():
        from pellucid.train.parallel.run import layout

        layout(settings, ranks_launched())
    return RunRequest(settings=settings, out=out, resume=resume, overwrite=overwrite)


def carry_out(asked: RunRequest, listener: Listener) -> Pretraining:
    """Train and save, in this process or with the others that torchrun started."""
    settings, out = asked.settings, asked.out
    if ranks_launched():
        from pellucid.train.parallel.run import train_on_ranks

        return train_on_ranks(
            settings, out, listener, resume=asked.resume, overwrite=asked.overwrite
        )
    with run_folder.locked(out), TemporaryDirectory() as folder:
        if asked.resume:
            run = go_on(settings, out, Path(folder), listener)
        else:
            make_room(settings, out, asked.overwrite)
            run = prepare(settings, out, Path(folder), listener)
            clear(out)
            run.begin()  # a folder that cannot be written shows now, not after an hour
        with stopping() as stop:
            run.fit(stop)
        return run


def tokenise_only(asked: RunRequest, listener: Listener) -> dict[str, Any]:
    """Tokenise for a later run with the same text and tokenizer; counts of what there is then."""
    settings, out = asked.settings, asked.out
    if not (settings.data and settings.begin):
        raise ValueError("--tokenise-only is for --data: other text is tokenised in memory")
    if ranks_launched():
        raise ValueError("--tokenise-only starts processes of its own: leave out torchrun")
    with run_folder.locked(out), TemporaryDirectory() as folder:
        tokenizer = tokenizer_for(settings, Path(folder))
        text = read_text(settings, tokenizer, out, listener)
    return {
        "folder": str(settings.tokens or out / TOKENS),
        "vocab_size": tokenizer.vocab_size,
        "training_tokens": len(text.training),
        "held_out_tokens": len(text.held_out),
    }
