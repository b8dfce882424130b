"""Folders and files that only this user can have written.

What lies in a folder that others may write is anybody's: a library in it runs their code. The way
to a folder counts as much as the folder, since who may rename one of its parents may put another
folder in its place. The rules are those by which OpenSSH trusts a file of keys (StrictModes):

    the folder, its files   owned by this user; no other user may write
    every folder above      owned by this user or root; no other user may write, unless it is sticky
                            as /tmp is: there only the owner of an entry may rename it

Whatever is checked is checked on an open descriptor and used through it, so that nothing can be
exchanged in between. Systems without POSIX owners (Windows) are not checked.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# A folder on the way may be entered without being readable; O_PATH (Linux) asks for no more.
_ON_THE_WAY = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def own_folder(path: Path) -> Path:
    """`path`, links resolved, made with mode 0700 where it is missing, its parents likewise.

    Raises OSError, in one line with the remedy, where it cannot be made, is not this user's, or
    where others may write to it or exchange it for another folder.
    """
    if not hasattr(os, "getuid"):
        path.mkdir(parents=True, exist_ok=True)
        return path
    real = Path(os.path.realpath(path))
    os.close(open_own_folder(real))
    return real


def open_own_folder(path: Path) -> int:
    """A descriptor of what `own_folder` gives, to be closed by the caller; errors as there."""
    real = Path(os.path.realpath(path))
    here = os.open(real.anchor, _ON_THE_WAY)
    try:
        passed = Path(real.anchor)
        for name in real.parts[1:]:
            _check_way(passed, os.fstat(here))
            inner = _enter(here, name, passed / name)
            os.close(here)
            here, passed = inner, passed / name
        _check_own(passed, os.fstat(here), "folder")
        try:
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        except OSError as error:
            raise _named(error, passed) from None
    finally:
        os.close(here)


def read_own_file(folder: int, name: str, at_most: int) -> bytes:
    """The content of the regular file `name` in the folder open as `folder`.

    Raises FileNotFoundError where it is missing, PermissionError where it is not this user's, where
    others may write to it, or where it is a link or no regular file, and OSError beyond `at_most`
    bytes.
    """
    # Without O_NONBLOCK, opening a named pipe would wait until another process writes into it.
    flags = os.O_RDONLY | _NO_LINK | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise PermissionError(f"{name} is a link: delete it") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError(f"{name} is no regular file: delete it")
        _check_own(Path(name), found, "file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(at_most + 1)
    finally:
        os.close(descriptor)
    if len(content) > at_most:
        raise OSError(f"{name} has more than {at_most:,} bytes: delete it")
    return content


def _enter(here: int, name: str, shown: Path) -> int:
    """A descriptor of the folder `name` in the folder `here`, made with mode 0700 if missing."""
    try:
        return os.open(name, _ON_THE_WAY | _NO_LINK, dir_fd=here)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _named(error, shown) from None
    try:
        os.mkdir(name, 0o700, dir_fd=here)
    except FileExistsError:
        pass  # another process was faster; its folder is checked like any other
    except OSError as error:
        raise _named(error, shown) from None
    return os.open(name, _ON_THE_WAY | _NO_LINK, dir_fd=here)


def _named(error: OSError, shown: Path) -> OSError:
    """The same error with the whole path, which a descriptor does not know."""
    return type(error)(error.errno, error.strerror, str(shown))


def _check_way(path: Path, found: os.stat_result) -> None:
    """PermissionError where others may exchange what lies in the folder `path`."""
    if found.st_uid not in (0, os.getuid()):
        raise PermissionError(
            f"{path} belongs to user {found.st_uid}, who may exchange what is in it: choose a "
            "folder of your own"
        )
    if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(
            f"others may write in {path} ({_mode(found)}) and exchange what is in it: chmod go-w "
            "it, or choose a folder of your own"
        )


def _check_own(path: Path, found: os.stat_result, kind: str) -> None:
    """PermissionError for a folder or file that is not this user's alone to write."""
    if found.st_uid != os.getuid():
        raise PermissionError(
            f"the {kind} {path} belongs to user {found.st_uid}, not to you ({os.getuid()}): delete "
            "it, or choose a folder of your own"
        )
    if found.st_mode & _OTHERS_WRITE:
        raise PermissionError(
            f"others may write to the {kind} {path} ({_mode(found)}): delete it, or choose a "
            "folder of your own"
        )


def _mode(found: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(found.st_mode):04o}"
