"""Tokenise text once, into files that are memory-mapped ever after.

    FOLDER/index.json              what was tokenised, with which tokenizer, into how many shards
    FOLDER/training-00000.bin      token ids, raw, little-endian, two or four bytes each
    FOLDER/training-00000.starts   the places in it where documents begin
    FOLDER/held_out-00000.…        the same for what is held out
    FOLDER/shard-00000.json        written last: counts and SHA-256 of shard 0

A shard is whole if its record, ``shard-N.json``, is there. Each file is written under another name,
flushed to the disk and renamed, the record after the files it speaks of, so that a run that is
killed leaves whole shards and leftovers that no run reads; the next run goes on behind them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pellucid.files import lock_folder, read_json
from pellucid.system import cores
from pellucid.tokenizers import Tokenizer
from pellucid.train.data.documents import TextFormat, find_files
from pellucid.train.data.spans import (
    HELD_OUT,
    SPAN_BYTES,
    TRAINING,
    Span,
    SpanPlan,
    plan_spans,
    shards,
)
from pellucid.train.data.token_source import TokenFile, TokenFiles, token_dtype

FORMAT = 1
INDEX = "index.json"
SHARD_BYTES = 64 << 20  # of text; about 30 MB of tokens
Report = Callable[[int, int], None]
# All kinds of pieces that tokenizers part: a digest of two that only merge differently differs.
_PROBE = (
    "The cat's 1234567 caf\xe9s\n\n\tif (x  !=  y):\r\n   return '\u4f60\u597d \U0001f642'  <s> "
)


_COUNTS = {"tokens": int, "documents": int, "text_bytes": int, "sha256": str}  # of a split


class Corpus(NamedTuple):
    """Tokenised text: what to train on, and what is held out."""

    training: TokenFiles
    held_out: TokenFiles


@dataclass(frozen=True, kw_only=True)
class TokeniseRequest:
    """What the shards of a folder hold; the index keeps it, and another request is refused."""

    format: int
    tokenizer: str  # digest
    vocab_size: int
    begin: int  # token in front of each document
    end: int | None  # token behind each document
    text: str  # digest of the files' names, sizes and times
    text_key: str
    separator: str | None
    hold_out: int
    shard_bytes: int


def tokenise(
    paths: Iterable[str | Path],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    begin: int,
    end: int | None = None,
    layout: TextFormat | None = None,
    hold_out: int = 40,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Report | None = None,
) -> Corpus:
    """Tokenise files and folders of text into `folder`, or open what is already there.

    Goes on where an earlier call was killed. The shards do not depend on `workers`.

    begin     token id that is put in front of each document; end: one behind it, if any
    layout    how documents lie in the files
    hold_out  each so-many-th document is held out whole, none with 0; with fewer documents than
              that, the last tenth of each
    workers   processes; None: one for each processor that may be used
    report    called with the bytes of text done and those of all, after each shard

    Raises ValueError where the folder holds something else (another tokenizer, changed text) or a
    damaged shard, for no text at all and text that is not UTF-8; OSError for a full disk.
    """
    layout, folder = layout or TextFormat(), Path(folder)
    files = find_files(paths)
    request = TokeniseRequest(
        format=FORMAT,
        tokenizer=tokenizer_digest(tokenizer),
        vocab_size=tokenizer.vocab_size,
        begin=begin,
        end=end,
        text=_files_digest(files),
        text_key=layout.text_key,
        separator=layout.separator,
        hold_out=hold_out,
        shard_bytes=shard_bytes,
    )
    index = _read_index(folder)
    if index is not None:
        _check_same(folder, index, asdict(request))
    if index is None or not _whole(folder, index["shards"]):
        planned = plan_spans(files, layout, hold_out, min(SPAN_BYTES, shard_bytes))
        groups = shards(planned.spans, shard_bytes)
        if not groups:
            raise ValueError("no text to train on: expected files with text in them")
        writer = Writer(folder, tokenizer, begin, end, planned._replace(spans=[]))
        with _naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with _cleared(folder):
                _write_json(folder / INDEX, {**asdict(request), "shards": len(groups)})
                _write_shards(writer, groups, workers, report)
    return _open(folder, request.tokenizer, verify=True)


def open_corpus(folder: str | Path, tokenizer: Tokenizer, *, verify: bool = True) -> Corpus:
    """The tokens that `tokenise` wrote to `folder`, mapped.

    With `verify` all of it is read once and held against its SHA-256, about a second per GB;
    without, only the sizes of the files are.
    Raises ValueError for a folder that is not whole, is damaged or belongs to another tokenizer.
    """
    return _open(Path(folder), tokenizer_digest(tokenizer), verify=verify)


def _open(folder: Path, tokenizer: str, *, verify: bool) -> Corpus:
    index = _read_index(folder)
    if index is None:
        raise ValueError(f"{folder} holds no tokenised text: expected {INDEX} in it")
    _check_same(folder, index, {"format": FORMAT, "tokenizer": tokenizer})
    dtype = token_dtype(index["vocab_size"])
    found: dict[str, list[TokenFile]] = {TRAINING: [], HELD_OUT: []}
    for number in range(index["shards"]):
        record = _record_path(folder, number)
        if not record.exists():
            raise ValueError(
                f"{folder} is not whole: {record.name} of {index['shards']} shards is missing; "
                "tokenise again to go on"
            )
        counts = _read_json(record, dict.fromkeys(found, dict))
        for split, files in found.items():
            _check_kinds(record, counts[split], _COUNTS)
            named = {name: counts[split][name] for name in _COUNTS}
            files.append(TokenFile(path=_tokens_path(folder, split, number), **named))
    corpus = Corpus(*(TokenFiles(files, dtype) for files in found.values()))
    for source in corpus:
        source.check(digests=verify)
    return corpus


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what a tokenizer does: the text of every token, and how it cuts a probe."""
    parts = [sorted(tokenizer.specials.items()), tokenizer.encode(_PROBE)]
    for token in range(tokenizer.vocab_size):
        try:
            parts.append(tokenizer.token_string(token))
        except ValueError:  # a gap
            parts.append(None)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Writer:
    """Writes shards; what a process needs for it. The plan comes without its spans."""

    folder: Path
    tokenizer: Tokenizer
    begin: int
    end: int | None
    plan: SpanPlan

    def write(self, number: int, spans: list[Span]) -> int:
        """Tokenise the spans of one shard into its files; returns their bytes of text."""
        dtype = token_dtype(self.tokenizer.vocab_size)
        behind = [] if self.end is None else [self.end]
        sides = {
            split: _Side(_tokens_path(self.folder, split, number), dtype, self.begin)
            for split in (TRAINING, HELD_OUT)
        }
        try:
            for span in spans:
                for split, begins, ends, text in self.plan.pieces(span):
                    ids = self.tokenizer.encode(text)
                    ids += behind if ends else []
                    sides[split].add(ids, len(text.encode()), begins)
            counts = {split: side.close() for split, side in sides.items()}
        finally:
            for side in sides.values():
                side.abandon()
        _write_json(_record_path(self.folder, number), counts)
        return sum(span.stop - span.start for span in spans)


class _Side:
    """One split of one shard while it is written, under names that end in ``.part``."""

    def __init__(self, path: Path, dtype: np.dtype, begin: int) -> None:
        self.path, self.dtype, self.begin = path, dtype, begin
        self._temporary = _temporary(path)
        self._file: BinaryIO = self._temporary.open("wb")
        self._starts = array("Q")
        self._sha256 = hashlib.sha256()
        self.tokens = self.text_bytes = 0

    def add(self, ids: list[int], text_bytes: int, begins: bool) -> None:
        """Append the tokens of a text; the list is kept and must not change."""
        if begins:
            self._starts.append(self.tokens)
            ids.insert(0, self.begin)
        # An array takes the list in half the time that numpy does: tokenising is no slower for it.
        data = np.frombuffer(array("I", ids), np.uint32).astype(self.dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)
        self.tokens += len(ids)
        self.text_bytes += text_bytes

    def close(self) -> dict[str, object]:
        """Put the files under their names; returns what the record says of them."""
        _settle(self._file, self._temporary, self.path)
        starts = self.path.with_suffix(".starts")
        data = np.frombuffer(self._starts, np.uint64).astype("<u8").tobytes()
        self._sha256.update(data)
        _write_bytes(starts, data)
        return {
            "tokens": self.tokens,
            "documents": len(self._starts),
            "text_bytes": self.text_bytes,
            "sha256": self._sha256.hexdigest(),
        }

    def abandon(self) -> None:
        """Leave nothing unfinished behind; after `close` there is nothing to leave."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _write_shards(
    writer: Writer, groups: list[list[Span]], workers: int | None, report: Report | None
) -> None:
    missing = [n for n in range(len(groups)) if not _record_path(writer.folder, n).exists()]
    sizes = [sum(span.stop - span.start for span in spans) for spans in groups]
    done, total = sum(sizes) - sum(sizes[n] for n in missing), sum(sizes)
    workers = min(workers or cores(), len(missing))
    if workers < 2:
        for number in missing:
            done += writer.write(number, groups[number])
            if report:
                report(done, total)
        return
    # Started afresh, not forked: a fork copies threads' locks as they happen to be.
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (writer,)) as pool:
        pending = [pool.submit(_write, number, groups[number]) for number in missing]
        try:
            for future in as_completed(pending):
                done += future.result()
                if report:
                    report(done, total)
        except BrokenProcessPool:
            raise OSError(
                f"a process that tokenised into {writer.folder} was killed, perhaps for its "
                "memory: run again to go on from the last whole shard, with fewer workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_of_this_process: list[Writer] = []  # sent once to each, with its large vocabulary


def _begin(writer: Writer) -> None:
    """Ctrl-C reaches every process of a terminal; only the first acts on it, after whole shards."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _of_this_process[:] = [writer]


def _write(number: int, spans: list[Span]) -> int:
    return _of_this_process[0].write(number, spans)


def _files_digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        facts = file.stat()
        found.update(f"{os.path.abspath(file)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return found.hexdigest()


def _check_same(folder: Path, index: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError for the first thing in which the folder's index differs from what is wanted."""
    for key, value in wanted.items():
        found = index.get(key)
        if found == value:
            continue
        what = {
            "tokenizer": "was written with another tokenizer",
            "text": "holds other files of text, or they have changed since",
        }.get(key, f"was written with {key} {found!r}, not {value!r}")
        raise ValueError(f"{folder} {what}: give another folder, or delete this one")


def _whole(folder: Path, count: int) -> bool:
    return all(_record_path(folder, number).exists() for number in range(count))


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX
    return _read_json(path, {"vocab_size": int, "shards": int}) if path.exists() else None


def _read_json(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The JSON object in a file of ours; ValueError where one of `kinds` is none in it."""
    try:
        found = read_json(path)
    except ValueError:
        raise ValueError(f"{path} is damaged: delete it and tokenise again") from None
    _check_kinds(path, found, kinds)
    return found


def _check_kinds(path: Path, found: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        value = found.get(name)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 1 << 62):
            raise ValueError(
                f"{path} is damaged: {name} is {str(value)[:60]}; delete it and tokenise again"
            )


def _tokens_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05}.bin"


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.json"


def _temporary(path: Path) -> Path:
    """A name that no other process takes, on this machine or another that shares the disk."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


@contextmanager
def _cleared(folder: Path) -> Iterator[None]:
    """Without what killed processes had begun; where another one is writing, all stays."""
    try:
        lock = lock_folder(folder)
    except OSError:
        lock = None
    for path in folder.glob("*.????????.part") if lock is not None else ():
        path.unlink(missing_ok=True)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _write_json(path: Path, value: object) -> None:
    _write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """An OSError of a full disk names no path: add it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _write_bytes(path: Path, data: bytes) -> None:
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            _settle(file, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _settle(file: BinaryIO, temporary: Path, path: Path) -> None:
    """Flush a file, then rename it: after a power cut no file of that name is cut short."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    temporary.replace(path)
