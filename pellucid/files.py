"""Text, JSON, TOML and YAML as every reader takes them; files and folders that appear whole.

What is written appears whole or not at all: it is written beside its place, then moved.

What a killed process leaves behind, ``.NAME.1f0c2b7a.part``, is removed by the next write into the
same parent folder. A folder that is being written is locked (``flock``), and the system releases
the lock when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_TEXT = 200_000_000  # bytes; the largest tokenizer.json of a release has 35 million
MOST_DIGITS = 100  # of a whole number; transformers writes 10^30 for "no limit"
_MODEL_SUFFIXES = (".pth", ".gguf", ".bin", ".model", ".tiktoken")
_MODEL_FILE = re.compile(
    r"(config|params|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|encoder"
    r"|model\.safetensors\.index|adapter_config)\.json|merges\.txt|vocab\.bpe|chat_template\.jinja"
    r"|(model(-\d+-of-\d+)?|adapter_model|consolidated)\.safetensors"
)
_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
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
    beside.chmod(folder.stat().st_mode & 0o7777)
    aside = beside.with_suffix(".old")
    folder.rename(aside)
    beside.rename(folder)
    shutil.rmtree(aside)


def refuse_current(folder: Path) -> None:
    """ValueError for the folder that the process stands in, or one around it.

    A new folder takes its place, and the process would be left in a folder that has no path.
    """
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents):
        raise ValueError(f"{folder}: you are in this folder; give a new folder for the model")


def check_output(path: Path, force: bool, flag: str) -> None:
    """ValueError where a verb may not write a file, asked before anything is computed.

    A file that is there needs `force`; one that a model consists of is never replaced. Devices and
    pipes are written into. `flag` begins the message.
    """
    if _stream(path) is not None:
        return
    real = path.resolve()
    if path.is_dir() or not real.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {real.parent}"
        raise ValueError(f"{flag} {path}: {why}; give a file to write")
    if not real.is_file():
        return
    if is_model_file(real):
        raise ValueError(f"{flag} {path}: this file is part of a model; give another name")
    if not force:
        raise ValueError(f"{flag} {path}: is there already: --force replaces it")


def is_model_file(path: Path) -> bool:
    """Whether a file is one that models consist of, by its name and what lies beside it."""
    if path.suffix in _MODEL_SUFFIXES or _MODEL_FILE.fullmatch(path.name):
        return True
    index = path.with_name("model.safetensors.index.json")
    listed = index.read_text("utf-8", "replace") if index.is_file() else ""
    return path.suffix == ".safetensors" and path.name in listed


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """A new hidden file to write into, which takes the place of `path` once it is whole.

    It follows links and gets the mode of the file it replaces, else what the umask leaves. What is
    no ordinary file, such as a pipe, is written into instead; ``/dev/stdout`` always is, also where
    a shell has opened a file as standard output.
    """
    stream = _stream(path)
    path = path.resolve() if stream is None else path
    ordinary = stream is None and (path.is_file() or not path.exists())
    parent = path.parent if ordinary else Path(tempfile.gettempdir())
    beside = parent / f".{secrets.token_hex(4)}.part.{path.name}"
    try:
        yield beside
        if not ordinary:
            with beside.open("rb") as written, _opened(path, stream) as out:
                shutil.copyfileobj(written, out)
        else:
            beside.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _stream(path: Path) -> int | None:
    """The number of the open file that a path such as ``/dev/stdout`` stands for; None: none."""
    if str(path) in _STREAMS:
        return _STREAMS[str(path)]
    open_file = str(path.parent) in ("/dev/fd", "/proc/self/fd") and path.name.isdecimal()
    return int(path.name) if open_file and path.exists() else None


def _opened(path: Path, stream: int | None) -> BinaryIO:
    if stream is None:
        return path.open("wb")
    sys.stdout.flush()  # what was printed before comes before
    return open(os.dup(stream), "wb")


def write_whole(path: Path, text: str) -> None:
    """A text file in UTF-8, whole or not at all; see `file_beside`."""
    with file_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


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


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete or absent: beside its place, then moved there."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file; ValueError where it is not one.

    missing: what is returned where there is no such file; None: OSError.
    """
    if missing is not None and not path.is_file():
        return missing
    return parse_object(read_text(path), str(path))


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The object that JSON text holds, which an error calls `where`."""
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a JSON object, found a {type(values).__name__}")
    return values


def parse_json(text: str, where: str) -> Any:
    """What JSON text holds, which an error calls `where`.

    ValueError, in one line, for what is no JSON, nested too deep, or no number that can be
    computed with: one of more than a hundred digits.
    """
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {_reason(error)}") from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables that TOML text holds, which an error calls `where`; ValueError as `parse_json`."""
    try:
        values = tomllib.loads(text)
        json.dumps(values, default=str)  # refuses what is nested too deep to be looked through
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not TOML: {_reason(error)}") from None
    _check_numbers(values, where)
    return values


def parse_yaml(text: str, where: str) -> Any:
    """What YAML text holds, plain values only, which an error calls `where`.

    ValueError as `parse_json`, and for an alias (``*name``): a line of them can stand for
    gigabytes.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has an alias, *name: write the value out")
            return super().compose_node(parent, index)

    try:
        values = Plain(text).get_single_data()
    except yaml.YAMLError as error:
        reason = _reason(error)
    except (ValueError, RecursionError, TypeError) as error:  # a date of month 13; a list as key
        reason = _reason(error)
    else:
        _check_numbers(values, where)
        return values
    raise ValueError(f"{where} is not YAML: {reason}")


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, {digits[:8]}…")
    return int(digits)


_JSON = json.JSONDecoder(parse_int=_whole)


def _check_numbers(value: Any, where: str) -> None:
    """ValueError for whole numbers beyond `MOST_DIGITS` digits, anywhere inside."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inside:
        _check_numbers(each, where)
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        raise ValueError(f"{where}: a number of more than {MOST_DIGITS} digits")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return " ".join(str(error).split())[:300]


def read_bytes(path: Path) -> bytes:
    """The bytes of a settings or tokenizer file.

    ValueError, before anything is read, for what is no ordinary file (a pipe would be waited for,
    a device never ends) and for one larger than any such file is.
    """
    size = check_ordinary(path)
    if size > LARGEST_TEXT:
        raise ValueError(f"{path}: {size:,} bytes of text; expected {LARGEST_TEXT:,} or fewer")
    return path.read_bytes()


def check_ordinary(path: Path) -> int:
    """The bytes in an ordinary file; ValueError for a folder, a pipe or a device."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path}: not a file; expected one with text in it")
    return about.st_size


def read_text(path: Path) -> str:
    """A file's text without a byte order mark; ValueError as `read_bytes`, or if not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
