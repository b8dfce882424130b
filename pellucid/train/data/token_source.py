"""Where batches take their tokens from: a tensor, or files that are mapped and never read whole."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

OPEN_FILES = 128  # mapped at a time; each takes a file descriptor
_STARTS_DTYPE = np.dtype("<u8")


class TokenSource(Protocol):
    """One long row of token ids, N = len(source)."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Token ids start … stop - 1, int64, 0 <= start <= stop <= N."""
        ...

    def document_starts(self, start: int, stop: int) -> Tensor:
        """Those of the places start … stop - 1 at which a document begins, in order, int64."""
        ...


class TokenTensor:
    """Tokens in memory; a document begins at each `begin` token, or only at 0 without one."""

    def __init__(self, tokens: Tensor, begin: int | None = None) -> None:
        self.tokens, self.begin = tokens, begin

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> Tensor:
        """Token ids start … stop - 1."""
        return self.tokens[start:stop].long()

    def document_starts(self, start: int, stop: int) -> Tensor:
        """Those of the places start … stop - 1 that hold the begin token."""
        if self.begin is None:
            return torch.zeros(int(start == 0 < stop), dtype=torch.long)
        return (self.tokens[start:stop] == self.begin).nonzero().flatten() + start


class TokenFile(NamedTuple):
    """A file of raw little-endian token ids, and a file of the places where documents begin.

    ``train-00000.bin`` holds `tokens` ids, ``train-00000.starts`` one unsigned 64-bit place for
    each of its `documents`; `sha256` is that of the first followed by the second.
    """

    path: Path
    tokens: int
    documents: int
    text_bytes: int
    sha256: str

    @property
    def starts_path(self) -> Path:
        """The file of the places where documents begin."""
        return self.path.with_suffix(".starts")

    def check(self, dtype: np.dtype, *, digest: bool) -> None:
        """ValueError where a file is missing, of another size or (with `digest`) other content."""
        sizes = {
            self.path: self.tokens * dtype.itemsize,
            self.starts_path: self.documents * _STARTS_DTYPE.itemsize,
        }
        for path, expected in sizes.items():
            found = path.stat().st_size if path.exists() else None
            if found != expected:
                what = "is missing" if found is None else f"has {found:,} bytes"
                raise self._damaged(path, f"{what}, expected {expected:,}")
        if digest and self.digest() != self.sha256:
            raise self._damaged(self.path, "has other content than was written (SHA-256)")

    def digest(self) -> str:
        """SHA-256 of both files as they are now."""
        found = hashlib.sha256()
        for path in (self.path, self.starts_path):
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
        return found.hexdigest()

    def _damaged(self, path: Path, what: str) -> ValueError:
        number = self.path.stem.rpartition("-")[2]
        record = self.path.with_name(f"shard-{number}.json")
        return ValueError(
            f"{path} {what}: delete {record} and tokenise again, which writes this shard anew"
        )


class TokenFiles:
    """Memory-mapped token files, read as one row; only what is asked for is read from the disk."""

    def __init__(self, files: Sequence[TokenFile], dtype: np.dtype) -> None:
        self.files = [file for file in files if file.tokens]
        self.dtype = dtype
        self._ends = list(accumulate(file.tokens for file in self.files))
        self._tokens = lru_cache(OPEN_FILES)(self._map_tokens)
        self._starts = lru_cache(OPEN_FILES)(self._map_starts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return sum(file.documents for file in self.files)

    @property
    def text_bytes(self) -> int:
        """Bytes of the text in UTF-8, for bits per byte."""
        return sum(file.text_bytes for file in self.files)

    def check(self, *, digests: bool = True) -> None:
        """ValueError for the first file that is not as it was written."""
        for file in self.files:
            file.check(self.dtype, digest=digests)

    def read(self, start: int, stop: int) -> Tensor:
        """Token ids start … stop - 1."""
        parts = [self._tokens(number)[a:b] for number, a, b in self._within(start, stop)]
        whole = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self.dtype)])
        return torch.from_numpy(whole.astype(np.int64))

    def document_starts(self, start: int, stop: int) -> Tensor:
        """Those of the places start … stop - 1 at which a document begins."""
        found = [np.empty(0, np.int64)]
        for number, a, b in self._within(start, stop):
            places = self._starts(number)
            first, last = np.searchsorted(places, np.array([a, b], _STARTS_DTYPE))
            found.append(places[first:last].astype(np.int64) + self._begin(number))
        return torch.from_numpy(np.concatenate(found))

    def _begin(self, number: int) -> int:
        return self._ends[number] - self.files[number].tokens

    def _within(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(file, from, to) for each file that holds some of start … stop - 1."""
        assert 0 <= start <= stop <= len(self), f"{start} … {stop} of {len(self)} tokens"
        found = []
        number = bisect.bisect_right(self._ends, start)
        while start < stop:
            begin, end = self._begin(number), min(stop, self._ends[number])
            found.append((number, start - begin, end - begin))
            start, number = end, number + 1
        return found

    def _map_tokens(self, number: int) -> np.ndarray:
        return _map(self.files[number].path, self.dtype)

    def _map_starts(self, number: int) -> np.ndarray:
        return _map(self.files[number].starts_path, _STARTS_DTYPE)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))  # a plain array is sliced in half the time


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest little-endian dtype that holds all ids: two bytes up to 65,536 of them."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
