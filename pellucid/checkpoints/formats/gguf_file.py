"""GGUF, the file format of llama.cpp: a file is written in one pass, and its header read back.

    "GGUF" │ version │ tensors │ keys │ key, type, value … │ name, sizes, type, offset … │ data …
     4 B      u32       u64      u64                                            each at 32 B

Format: ggml's docs/gguf.md, version 3, little-endian. Sizes stand innermost first: a matrix of
shape (out, in) is written as in, out.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's numbers of the types we write
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# ggml's number of a value's type -> struct format; what else there is: 8 string, 9 array
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_UINT32, _FLOAT32, _STRING, _ARRAY = 4, 6, 8, 9


@dataclass(frozen=True, kw_only=True)
class Announced:
    """A tensor to write: its name, shape (outermost first), type, and what gives its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: Callable[[], bytes | memoryview]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What stands before the data: the keys, and of each tensor its shape, type and bytes.

    The bytes of a tensor reach to the next one, alignment included.
    """

    keys: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, int]
    nbytes: dict[str, int]


def write(path: Path, keys: dict[str, int | float | str], tensors: Iterable[Announced]) -> None:
    """Write a file beside its place, one tensor at a time, and move it there when it is whole.

    int values become uint32, float float32. ValueError for a tensor with other bytes than
    announced.
    """
    tensors = list(tensors)
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys)))
            for key, value in keys.items():
                file.write(_text(key) + _value(value))
            offset = 0
            for tensor in tensors:
                sizes = tensor.shape[::-1]
                file.write(_text(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
                file.write(struct.pack("<IQ", TYPES[tensor.dtype], offset))
                offset = _aligned(offset + tensor.nbytes)
            for tensor in tensors:
                file.write(bytes(_aligned(file.tell()) - file.tell()))
                written = file.write(tensor.data())
                if written != tensor.nbytes:
                    raise ValueError(
                        f"{path}: {tensor.name} has {written} bytes, expected {tensor.nbytes} for "
                        f"{tensor.shape} in {tensor.dtype}"
                    )
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_header(path: Path) -> Header:
    """The keys and the tensors of a file, none of their data; ValueError for another format."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path}: not a GGUF file (it does not begin with GGUF)")
        _, n_tensors, n_keys = _read(file, "IQQ")
        keys = {}
        for _ in range(n_keys):
            name = _read_text(file)
            keys[name] = _read_value(file, _read(file, "I")[0])
        shapes, types, offsets = {}, {}, {}
        for _ in range(n_tensors):
            name = _read_text(file)
            (axes,) = _read(file, "I")
            shapes[name] = _read(file, f"{axes}Q")[::-1]
            types[name], offsets[name] = _read(file, "IQ")
        alignment = keys.get("general.alignment", ALIGNMENT)
        start = -(-file.tell() // alignment) * alignment
    size = path.stat().st_size - start
    ends = [*sorted(offsets.values()), size]
    following = dict(itertools.pairwise(ends))
    nbytes = {name: following[offset] - offset for name, offset in offsets.items()}
    return Header(keys=keys, shapes=shapes, types=types, nbytes=nbytes)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: int | float | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)


def _read(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_text(file: BinaryIO) -> str:
    return file.read(_read(file, "Q")[0]).decode()


def _read_value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _read_text(file)
    if kind == _ARRAY:
        inner, length = _read(file, "IQ")
        return [_read_value(file, inner) for _ in range(length)]
    return _read(file, _SCALARS[kind])[0]
