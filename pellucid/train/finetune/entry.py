"""A whole fine-tuning run as a call: ``pellucid.finetune("demo", data=["a.json"], out="out")``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pellucid.train import run_folder
from pellucid.train.fields import states_settings
from pellucid.train.finetune.prepare import prepare
from pellucid.train.finetune.run import OURS, Finetuning
from pellucid.train.finetune.settings import CONFIG, FinetuneSettings, resolve, resumed
from pellucid.train.listener import Callback, Listener
from pellucid.train.loop import Progress
from pellucid.train.prepare import clear
from pellucid.train.run import stopping
from pellucid.train.state import check_settings


@states_settings(FinetuneSettings)
def finetune(
    model: str | Path | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress], object] | None = None,
    **settings: Any,
) -> Finetuning:
    """Fine-tune a model, as ``pellucid finetune`` does, and save what comes of it in `out`.

    model        a folder, ``owner/name`` or a demo; "demo" unless given
    resume       go on from ``out/last``, bit for bit
    overwrite    replace a run that is in `out`
    on_progress  called with each step's `Progress`
    settings     by their names, such as ``data``, ``lora``, ``lr``: the fields of
                 `FinetuneSettings`

    Returns the run: its ``model`` with the best weights, ``tokenizer``, ``losses``, ``folder`` and
    ``summary()``. Raises ValueError or OSError, in one line, for what cannot be done.
    """
    given = settings if model is None else settings | {"model": str(model)}
    return carry_out(given, Path(out), Callback(on_progress), resume=resume, overwrite=overwrite)


def carry_out(
    given: Mapping[str, Any], out: Path, listener: Listener, *, resume: bool, overwrite: bool
) -> Finetuning:
    """Fine-tune and save, reporting to `listener`; gives the run when it has ended."""
    settings = resumed(out, given) if resume else resolve(given)
    if resume:
        check_settings(out / run_folder.LAST, out / CONFIG)
    with run_folder.locked(out):
        if not resume:
            _check_out(out, overwrite)
        run = _begun(settings, out, listener, resume=resume)
        with stopping() as stop:
            run.fit(stop)
        run.finish()
        return run


def _begun(
    settings: FinetuneSettings, out: Path, listener: Listener, *, resume: bool
) -> Finetuning:
    run = prepare(settings, out, listener, resume=resume)
    if resume:
        run.restore()
    else:
        clear(out, *OURS)
        run.begin()  # a folder that cannot be written shows now, not after an hour
    return run


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder with something in it that is not to be replaced."""
    if any(out.iterdir()) and not overwrite:
        raise FileExistsError(
            f"--out {out} is not empty: give a new folder, --resume to go on, or --overwrite"
        )
