"""A run's folder: whole checkpoints, whatever happens while one is written.

    RUN/
      config.toml     the resolved settings
      log.csv         a line for every step
      last, best      links to the newest and the best checkpoint: each a model's folder
      checkpoints/
        last-00000400/      model files, and training/ with what it takes to go on
        last-00000200/      the one before it, in case the last is damaged
        best-00000350/      model files

A checkpoint is written into a folder of its own beside the others, made durable and renamed; then
the link is replaced, which is one step of the file system. Killed at any moment, or on a full disk,
``RUN/last`` leads to a whole checkpoint: the new one or the one before.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pellucid.files import lock_folder
from pellucid.train.state import read_state

CHECKPOINTS = "checkpoints"
LAST, BEST = "last", "best"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """No other process writes into the folder `run` meanwhile; it is made if it is not there.

    The system lets the lock go when this process ends, however it ends. Raises OSError, in one
    line, where another process has it, or `run` is a file.
    """
    there = run.exists()
    if there and not run.is_dir():
        raise NotADirectoryError(f"--out {run} is a file: expected a folder")
    run.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_folder(run)
    except BlockingIOError:
        raise OSError(
            f"--out {run} is in use: another run writes into it; wait for its end, or give another "
            "folder"
        ) from None
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
        if not there:
            with suppress(OSError):  # what was refused leaves no folder behind
                run.rmdir()


def publish(run: Path, name: str, step: int, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder and make ``run/name`` lead to it.

    Of the newest checkpoints the one before it stays, of the best none. Raises OSError, in one line
    that says what is left, where it cannot be written.
    """
    place = run / CHECKPOINTS
    final = _unused(place / f"{name}-{step:08}")
    stays = {final.name}
    if name == LAST:
        stays.add((run / name).resolve().name)
    part = place / f".{final.name}.{secrets.token_hex(4)}.part"
    try:
        with saving(run, step):
            place.mkdir(parents=True, exist_ok=True)
            write(part)
            make_durable(part)
            part.rename(final)
            make_durable(place, deep=False)
            _link(run / name, final)
    finally:
        for left in place.glob(f"{part.name}*"):  # and what `write` had beside it
            shutil.rmtree(left, ignore_errors=True)
    for folder in place.iterdir():
        if folder.name not in stays and re.fullmatch(rf"\.*{name}-\d{{8,}}[-.\w]*", folder.name):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def saving(run: Path, step: int) -> Iterator[None]:
    """An OSError inside says which step could not be saved, and what there is to go on from."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"step {step} could not be saved: {error}; {kept(run)}") from None


def _unused(folder: Path) -> Path:
    """`folder`, or with a number behind it if a run was here before."""
    found, number = folder, 1
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def _link(link: Path, target: Path) -> None:
    """Let `link` lead to `target`, in one step, wherever it leads now."""
    new = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    try:
        new.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
        os.replace(new, link)
    finally:
        new.unlink(missing_ok=True)
    make_durable(link.parent, deep=False)


def kept(run: Path) -> str:
    """What a run can go on from, for a message: ``RUN/last holds step 400``."""
    found = step_of(run / LAST)
    return f"{run / LAST} holds step {found}" if found is not None else f"{run} holds no checkpoint"


@contextmanager
def reading_last(run: Path) -> Iterator[Path]:
    """Gives ``RUN/last`` to go on from; an error inside names the checkpoint before it, if whole.

    Raises FileNotFoundError where there is no ``RUN/last``.
    """
    last = run / LAST
    try:
        if not last.is_dir():
            raise FileNotFoundError(f"--resume: {kept(run)}")
        yield last
    except (ValueError, OSError) as error:
        whole = next(filter(_is_whole, _others(run)), None)
        if whole is None:
            raise
        link = shlex.join(["ln", "-sfn", f"{CHECKPOINTS}/{whole.name}", str(last)])
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{error}; the checkpoint of step {step_of(whole)} is whole: to go on from there, "
            f"{link} and --resume again"
        ) from None


def _others(run: Path) -> list[Path]:
    """Checkpoints to go on from besides ``RUN/last``, the newest first."""
    found = [path for path in (run / CHECKPOINTS).glob(f"{LAST}-*") if step_of(path) is not None]
    used = (run / LAST).resolve()
    return sorted((path for path in found if path.resolve() != used), reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        read_state(folder)
    except (ValueError, OSError):
        return False
    return True


def step_of(link: Path) -> int | None:
    """The step of the checkpoint that a link leads to; None where there is none."""
    if not link.is_dir():
        return None
    found = re.fullmatch(r"\w+-(\d{8,})(-\d+)?", link.resolve().name)
    return int(found[1]) if found else None


def make_durable(path: Path, *, deep: bool = True) -> None:
    """Have the system write a folder to the disk, with everything in it if `deep`."""
    for inside in sorted(path.rglob("*")) if deep else ():
        _sync(inside)
    _sync(path)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
