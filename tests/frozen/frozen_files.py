"""Folders as they were written, and put back where they can be used.

A run's folder holds absolute paths and ``*.bin`` files of token ids. In the repository a path reads
``@HERE@`` and the files are called ``*.bin.kept``, for no ``*.bin`` may be committed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

PLACE = "@HERE@"
TEXTS = (".toml", ".json", ".csv")


def keep(folder: Path, kept: Path, here: Path) -> None:
    """Copy what a program wrote into `folder`, without the paths that lead there."""
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept, symlinks=True)
    for path in sorted(kept.rglob("*.bin")):
        path.rename(path.with_name(path.name + ".kept"))
    _replace(kept, str(here), PLACE)


def put_back(kept: Path, folder: Path, here: Path) -> None:
    """Copy a kept folder to where it can be used, as if it had been written there."""
    shutil.copytree(kept, folder, symlinks=True)
    for path in sorted(folder.rglob("*.bin.kept")):
        path.rename(path.with_suffix(""))
    _replace(folder, PLACE, str(here))
    index = folder / "tokens" / "index.json"
    if index.is_file():  # it knows the text by path, size and time
        said = json.loads(index.read_text(encoding="utf-8"))
        text, facts = here / "text.txt", (here / "text.txt").stat()
        known = f"{text}\0{facts.st_size}\0{facts.st_mtime_ns}\n"
        said["text"] = hashlib.sha256(known.encode()).hexdigest()
        index.write_text(json.dumps(said), encoding="utf-8")


def _replace(folder: Path, old: str, new: str) -> None:
    """`new` for `old` in every text, and the checksums of the files that this changes."""
    texts = [path for path in folder.rglob("*") if path.suffix in TEXTS and path.is_file()]
    sums = {}
    for path in texts:
        before = path.read_bytes()
        after = before.replace(old.encode(), new.encode())
        if after != before:
            path.write_bytes(after)
            sums[hashlib.sha256(before).hexdigest()] = hashlib.sha256(after).hexdigest()
    for path in texts:
        before = after = path.read_text(encoding="utf-8")
        for then, now in sums.items():
            after = after.replace(then, now)
        if after != before:
            path.write_text(after, encoding="utf-8")


def log(run: Path) -> list[list[str]]:
    """What a run's log says of each step that does not depend on the clock."""
    with (run / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = ("step", "tokens", "rate", "loss", "gradient_norm", "held_out_loss")
    return [[row[key] for key in keys] for row in rows]
