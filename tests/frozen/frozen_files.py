"""Folders as they were written, and put back where they can be used.

A run's folder holds absolute paths and ``*.bin`` files of token ids. In the repository a path reads
``@HERE@`` and the files are called ``*.bin.kept``, for no ``*.bin`` may be committed.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

PLACE = "@HERE@"
TEXTS = (".toml", ".json", ".csv")


def keep(folder: Path, kept: Path, here: Path) -> None:
    """Copy what a program wrote into `folder`, without the paths that lead there."""
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept, symlinks=True)
    for path in sorted(kept.rglob("*")):
        if path.suffix == ".bin":
            path.rename(path.with_name(path.name + ".kept"))
        elif path.suffix in TEXTS and not path.is_symlink():
            _replace(path, str(here), PLACE)


def put_back(kept: Path, folder: Path, here: Path) -> None:
    """Copy a kept folder to where it can be used, with the paths of this place."""
    shutil.copytree(kept, folder, symlinks=True)
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(".bin.kept"):
            path.rename(path.with_suffix(""))
        elif path.suffix in TEXTS and not path.is_symlink():
            _replace(path, PLACE, str(here))


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    if old in text:
        path.write_text(text.replace(old, new), encoding="utf-8")


def log(run: Path) -> list[list[str]]:
    """What a run's log says of each step that does not depend on the clock."""
    with (run / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = ("step", "tokens", "rate", "loss", "gradient_norm", "held_out_loss")
    return [[row[key] for key in keys] for row in rows]
