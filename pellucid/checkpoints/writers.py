"""Write tensor files one tensor at a time: every size is known before the first byte is written.

A writer is told what it will get, lays the file out, and then takes each tensor once, in any order.
Nothing is kept in memory, so a file may be as large as the disk.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from pellucid.checkpoints.files import DTYPE_NAMES, Stored

_ALIGNMENT = 64  # bytes; where torch.save begins each tensor, so that it can be mapped


class _Writer:
    """What both formats share: each announced tensor is taken once, as announced."""

    def __init__(self, path: Path, entries: Mapping[str, Stored]) -> None:
        self.path, self._missing = path, dict(entries)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place; ValueError where it is not what was announced."""
        stored = self._missing.pop(name, None)
        if stored is None or (tuple(tensor.shape), tensor.dtype) != (stored.shape, stored.dtype):
            raise ValueError(
                f"{self.path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected "
                f"{stored or 'no such tensor, or not again'}"
            )
        self._put(name, bytes_of(tensor))

    def _put(self, name: str, data: memoryview) -> None:
        raise NotImplementedError

    def _close(self, complete: bool) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._close(complete=kind is None)
        if kind is None and self._missing:
            raise ValueError(f"{self.path}: {len(self._missing)} tensors were never written")


class SafetensorsWriter(_Writer):
    """One ``.safetensors`` file: the header, then the tensors without a gap.

        8 bytes: length of the header │ header (JSON, padded) │ tensor │ tensor │ …

    Wider dtypes come first, so that every tensor is aligned to its own size.
    """

    def __init__(self, path: Path, entries: Mapping[str, Stored]) -> None:
        super().__init__(path, entries)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._begin, end = {}, 0
        for name, stored in sorted(entries.items(), key=lambda each: -each[1].dtype.itemsize):
            begin, end = end, end + size(stored)
            self._begin[name] = begin
            header[name] = {
                "dtype": DTYPE_NAMES[stored.dtype],
                "shape": list(stored.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._data = 8 + len(text)

    def _put(self, name: str, data: memoryview) -> None:
        self._file.seek(self._data + self._begin[name])
        self._file.write(data)

    def _close(self, complete: bool) -> None:
        with self._file:
            if complete:
                _to_disk(self._file)


class PthWriter(_Writer):
    """One ``.pth`` file as ``torch.save`` writes a dict of tensors: a zip of a pickle and the data.

    archive/data.pkl   the dict; where a tensor's values would stand it names a record
    archive/data/0 …   the values, uncompressed, each from a multiple of 64 bytes on

    `same`: name -> another name whose record it shares, as tied parameters do.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, Stored], same: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(path, entries)
        self._root = path.stem
        self._records = {name: str(number) for number, name in enumerate(entries)}
        shared = {name: (self._records[of], entries[of]) for name, of in (same or {}).items()}
        own = {name: (self._records[name], stored) for name, stored in entries.items()}
        self._file = path.open("wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        try:
            self._record("data.pkl", memoryview(_pickled(own | shared)))
            self._record("byteorder", memoryview(b"little"))
            self._record("version", memoryview(b"3\n"))
        except OSError:  # a full disk: an archive left open would try again when it is forgotten
            with contextlib.suppress(OSError, ValueError):
                self._close(complete=False)
            raise

    def _put(self, name: str, data: memoryview) -> None:
        self._record(f"data/{self._records[name]}", data)

    def _record(self, name: str, data: memoryview) -> None:
        entry = zipfile.ZipInfo(f"{self._root}/{name}")
        # What stands before the data: 30 bytes, the name, and as extra fields 20 bytes for sizes
        # above 4 GiB and a filler of at least 4 ("FB", its length, zeros).
        begin = self._zip.start_dir + 30 + len(entry.filename.encode()) + 20 + 4
        filler = -begin % _ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", filler) + bytes(filler)
        with self._zip.open(entry, "w", force_zip64=True) as record:
            record.write(data)

    def _close(self, complete: bool) -> None:
        try:
            self._zip.close()  # writes the list of records
            if complete:
                _to_disk(self._file)
        finally:
            self._file.close()


class _Record:
    """Stands for a tensor's values in the pickle, which only names the record they lie in."""

    def __init__(self, key: str, stored: Stored) -> None:
        self.key, self.stored = key, stored


class _Values:
    """Pickles as a tensor over a record."""

    def __init__(self, record: _Record) -> None:
        self.record = record

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.record.stored.shape
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return _rebuild_tensor_v2, (self.record, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    """Names the record where the values of a tensor would stand."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Record):
            return None
        kind = torch.storage._dtype_to_storage_type_map()[obj.stored.dtype]
        count = prod(obj.stored.shape)
        return "storage", getattr(torch, kind), obj.key, "cpu", count


def _pickled(tensors: Mapping[str, tuple[str, Stored]]) -> bytes:
    """The dict of tensors as `torch.save` pickles it; name -> (record, what lies there)."""
    records = {key: _Record(key, stored) for key, stored in tensors.values()}
    buffer = io.BytesIO()
    values = {name: _Values(records[key]) for name, (key, _) in tensors.items()}
    _Pickler(buffer, protocol=2).dump(values)
    return buffer.getvalue()


def size(stored: Stored) -> int:
    """Bytes that a tensor takes."""
    return prod(stored.shape) * stored.dtype.itemsize


def bytes_of(tensor: Tensor) -> memoryview:
    """The values as they lie in a file, row by row; a copy only where they lie otherwise."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _to_disk(file: io.BufferedWriter) -> None:
    """Wait until the disk has it: a folder must not get its name before its files are whole."""
    file.flush()
    os.fsync(file.fileno())
