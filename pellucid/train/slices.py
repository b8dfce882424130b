"""Tensors that several processes hold in slices, written by each into a file of its own.

    state-00001-of-00002.safetensors   NAME: the slice that the first process has
    state-00002-of-00002.safetensors   NAME: the slice that the second has

The index of all files is JSON: of each tensor its shape, its dtype, and in which file which slice
begins where. Any number of processes reads any slices of it from the memory-mapped files. A process
that is alone has slices that are whole tensors, in ``state.safetensors``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pellucid.checkpoints.files import DTYPE_NAMES, SafetensorsFile

Numbers = tuple[int, ...]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}  # "float32" -> it


class Slice(NamedTuple):
    """What one process has of a tensor: `values`, which begin at `offset` in the whole `shape`.

    writes  whether it is the one among the processes with the same slice that writes it
    """

    values: Tensor
    offset: Numbers
    shape: Numbers
    writes: bool = True


def whole(tensor: Tensor) -> Slice:
    """A tensor that a process has all of."""
    return Slice(tensor, (0,) * tensor.ndim, tuple(tensor.shape))


@dataclass(frozen=True)
class SlicedTensor:
    """One tensor of the index: where in which file its slices begin."""

    shape: Numbers
    dtype: torch.dtype
    offsets: dict[str, Numbers] = field(default_factory=dict)  # file -> begin of its slice

    def as_json(self) -> dict[str, Any]:
        """What `read_index` takes again."""
        kind = str(self.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "dtype": kind, "slices": self.offsets}


class WrittenSlices(NamedTuple):
    """What one process wrote: the name and SHA-256 of its file, and the index of what is in it."""

    file: str
    sha256: str
    entries: dict[str, SlicedTensor]


def write_slices(file: Path, tensors: Mapping[str, Slice]) -> WrittenSlices:
    """Write what this process is to write of its `tensors`. OSError where that fails."""
    mine = {n: held for n, held in tensors.items() if held.writes and held.values.numel()}
    values = {name: held.values.detach().cpu().contiguous() for name, held in mine.items()}
    file.touch()
    mode = file.stat().st_mode  # the library would make a file that only its owner reads
    try:
        save_file(values, file)
        file.chmod(mode)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{file.name}: {error}") from None
    index = {
        name: SlicedTensor(held.shape, held.values.dtype, {file.name: held.offset})
        for name, held in mine.items()
    }
    return WrittenSlices(file.name, digest(file), index)


def joined_index(parts: list[WrittenSlices]) -> dict[str, SlicedTensor]:
    """The index of all processes' files."""
    index: dict[str, SlicedTensor] = {}
    for part in parts:
        for name, entry in part.entries.items():
            index.setdefault(name, SlicedTensor(entry.shape, entry.dtype)).offsets.update(
                entry.offsets
            )
    return index


def read_index(found: Any, where: str) -> dict[str, SlicedTensor]:
    """The index from JSON; ValueError, in one line, for what is none."""
    try:
        return {name: _entry(stored) for name, stored in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: {error} in its index of tensors") from None


def _entry(stored: Any) -> SlicedTensor:
    dtype, shape = DTYPES[stored["dtype"]], _numbers(stored["shape"])
    offsets = {plain_name(file): _numbers(begin) for file, begin in stored["slices"].items()}
    if any(len(begin) != len(shape) for begin in offsets.values()):
        raise ValueError(f"a slice of another number of axes than {list(shape)}")
    return SlicedTensor(shape, dtype, offsets)


def _numbers(found: Any) -> Numbers:
    if not isinstance(found, list) or not all(type(n) is int and 0 <= n < 2**62 for n in found):
        raise ValueError(f"{found!r} where whole numbers belong")
    return tuple(found)


def plain_name(file: Any) -> str:
    """The name of a file beside the index; ValueError for a path that leads elsewhere."""
    if not isinstance(file, str) or Path(file).name != file or file in (".", ".."):
        raise ValueError(f"{file!r} is not the name of a file beside it")
    return file


class Slices(Mapping[str, Tensor]):
    """Stored tensors by name, each put together from its slices when it is asked for.

    read_file  (file, name, offset) -> the slice of tensor `name` that begins at `offset`
    """

    def __init__(
        self, index: Mapping[str, SlicedTensor], read_file: Callable[[str, str, Numbers], Tensor]
    ) -> None:
        self.index, self._read_file = index, read_file

    @classmethod
    def in_folder(cls, folder: Path, index: Mapping[str, SlicedTensor]) -> Slices:
        """Of safetensors files, which are memory-mapped when the first slice of them is read."""
        opened: dict[str, SafetensorsFile] = {}

        def read_file(file: str, name: str, offset: Numbers) -> Tensor:
            if file not in opened:
                opened[file] = SafetensorsFile(folder / file)
            if name not in opened[file].entries:
                raise ValueError(f"{folder / file} is damaged: {name} is not in it")
            return opened[file].read(name)

        return cls(index, read_file)

    def read(self, name: str, offset: Numbers, shape: Numbers) -> Tensor:
        """The slice of tensor `name` that begins at `offset` and has this shape, in new memory.

        ValueError where the files do not have all of it.
        """
        entry = self.index[name]
        found, filled = torch.empty(shape, dtype=entry.dtype), 0
        for file, begin in entry.offsets.items():
            stored = self._read_file(file, name, begin)
            if stored.ndim != len(shape) or stored.dtype != entry.dtype:
                raise ValueError(f"{file} is damaged: its {name} is not what the index says")
            first = tuple(map(max, begin, offset))
            ends = zip(begin, stored.shape, offset, shape, strict=True)
            last = tuple(min(b + s, o + n) for b, s, o, n in ends)
            if all(f < e for f, e in zip(first, last, strict=True)):
                found[_between(first, last, offset)] = stored[_between(first, last, begin)]
                filled += prod(e - f for f, e in zip(first, last, strict=True))
        if filled != found.numel():
            raise ValueError(f"the stored {name} has {filled} of {found.numel()} values asked for")
        return found

    def __getitem__(self, name: str) -> Tensor:
        shape = self.index[name].shape
        return self.read(name, (0,) * len(shape), shape)

    def __contains__(self, name: object) -> bool:
        return name in self.index  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def _between(first: Numbers, last: Numbers, begin: Numbers) -> tuple[slice, ...]:
    """From `first` to `last`, in a tensor that begins at `begin`."""
    return tuple(slice(f - b, e - b) for f, e, b in zip(first, last, begin, strict=True))


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
