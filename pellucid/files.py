"""JSON files; and folders that appear whole or not at all: written beside their place, then moved.

What a killed process leaves behind, ``.NAME.1f0c2b7a.part``, is cleared away by whoever next writes
into the same parent. A folder that is being written is locked (``flock``), and the system lets the
lock go when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.part")


@contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A new hidden folder next to `folder` to write into; afterwards it is gone or was moved."""
    clear_unfinished(folder.parent)
    beside, lock = _locked_folder(folder)
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def move(beside: Path, folder: Path) -> None:
    """Put the complete folder in its place; a model that is there is moved back on failure."""
    if not folder.exists():
        beside.rename(folder)
        return
    aside = beside.with_suffix(".old")
    folder.rename(aside)
    beside.rename(folder)
    shutil.rmtree(aside)


def clear_unfinished(parent: Path) -> None:
    """Remove what processes that are gone had begun to write into `parent`."""
    if not parent.is_dir():
        return
    for path in parent.iterdir():
        if not _UNFINISHED.fullmatch(path.name) or path.is_symlink():
            continue
        with contextlib.suppress(OSError):  # still locked, or cleared by another process meanwhile
            lock = lock_folder(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked_folder(folder: Path) -> tuple[Path, int | None]:
    """A new folder and the lock on it."""
    while True:
        beside = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.part"
        beside.mkdir(parents=True)
        try:
            lock = lock_folder(beside)
        except OSError:
            continue  # it was cleared away before it could be locked
        if beside.exists():
            return beside, lock


def lock_folder(folder: Path) -> int | None:
    """A lock on a folder: a file descriptor, to be closed. None where the system has no such locks.

    The system lets it go when the process ends, however it ends. Raises BlockingIOError where
    another process holds it, OSError where the folder is not there.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError where it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values
