"""What a GGUF file of llama.cpp says of itself: its keys, and where each tensor lies.

    "GGUF" │ version │ tensors │ keys │ key, type, value … │ name, sizes, type, offset … │ data …
     4 B      u32       u64      u64                                          each at `alignment`

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Sizes stand innermost first: a matrix
of shape (out, in) is written as in, out. The `gguf` package reads this too, but takes the numbers
in a file at their word: a list said to have 2^60 entries fills the memory. Here every size is held
against the bytes that are left before anything is made of it. No package is needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pellucid.files import check_ordinary

MAGIC, ALIGNMENT = b"GGUF", 32
_VERSIONS = (2, 3)
# ggml's number of a tensor's type -> its name, values in a block, bytes of a block (ggml.c)
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
# the number of a value's type -> struct format; what else there is: 8 string, 9 array
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MOST_AXES = 4


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """Where a tensor lies: shape outermost first, name of its type, first byte and bytes."""

    shape: tuple[int, ...]
    type: str
    begin: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """The keys of a file and its tensors by name, in the order of the file."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_header(path: Path) -> GGUFHeader:
    """The keys and the tensors of a file, none of their data.

    A float32 number is given as the shortest decimal that means it: 1e-05, not
    9.999999747378752e-06. Lists stay as they are. ValueError, in one line, for another format, for
    a version, a type or a
    byte order that is not read, and for sizes that the file does not have.
    """
    import mmap

    size = check_ordinary(path)
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path}: not a GGUF file (it does not begin with GGUF)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            try:
                return _read(path, _Bytes(mapped, size))
            except (ValueError, struct.error) as error:
                words = str(error)
                words = words if words.startswith(str(path)) else f"{path}: {words}"
                raise ValueError(words) from None


def _read(path: Path, data: _Bytes) -> GGUFHeader:
    (version,) = data.take("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        how = "big-endian" if swapped in _VERSIONS else f"version {version}"
        raise ValueError(f"GGUF {how}; Pellucid reads versions 2 and 3, little-endian")
    n_tensors, n_keys = data.take("QQ")
    data.demand(24 * n_tensors + 12 * n_keys, f"{n_tensors:,} tensors and {n_keys:,} keys")
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        name = data.text("a key's name")
        if name in keys:
            raise ValueError(f"the key {name} stands there twice")
        keys[name] = data.value(data.take("I")[0], name)
    stated = [_tensor(data) for _ in range(n_tensors)]
    alignment = keys.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}; expected a power of two")
    start = -(-data.place // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in stated:
        if name in tensors:
            raise ValueError(f"the tensor {name} stands there twice")
        tensors[name] = _placed(name, shape, kind, start + offset, alignment)
    _check_places(tensors, data.size)
    return GGUFHeader(path=path, keys=keys, tensors=tensors)


def _tensor(data: _Bytes) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of the next tensor."""
    name = data.text("a tensor's name")
    (axes,) = data.take("I")
    if not 1 <= axes <= _MOST_AXES:
        raise ValueError(f"{name} has {axes} axes; expected 1 to {_MOST_AXES}")
    shape = data.take(f"{axes}Q")[::-1]
    kind, offset = data.take("IQ")
    return name, shape, kind, offset


def _placed(name: str, shape: tuple[int, ...], kind: int, begin: int, alignment: int) -> GGUFTensor:
    if kind not in TYPES:
        known = ", ".join(word for word, *_ in TYPES.values())
        raise ValueError(f"{name} has the unknown type {kind}; Pellucid reads {known}")
    word, block, block_bytes = TYPES[kind]
    if shape[-1] % block:
        raise ValueError(f"{name} is {shape} in {word}, whose rows are blocks of {block} values")
    if begin % alignment:
        raise ValueError(f"{name} begins at byte {begin}, which is no multiple of {alignment}")
    nbytes = prod(shape) // block * block_bytes
    return GGUFTensor(shape=shape, type=word, begin=begin, nbytes=nbytes)


def _check_places(tensors: dict[str, GGUFTensor], size: int) -> None:
    """ValueError for tensors beyond the end of the file or on top of each other."""
    expected = max((each.begin + each.nbytes for each in tensors.values()), default=0)
    if expected > size:
        raise ValueError(
            f"{size:,} bytes, but its header describes {expected:,}; the download was cut short"
        )
    end, before = 0, ""
    for name, each in sorted(tensors.items(), key=lambda item: item[1].begin):
        if each.begin < end:
            raise ValueError(f"{name} begins at byte {each.begin}, inside {before}")
        end, before = each.begin + each.nbytes, name


class _Bytes:
    """The bytes of a header, taken one after the other; what is not there is never asked for."""

    def __init__(self, mapped: Any, size: int) -> None:
        self.mapped, self.size, self.place = mapped, size, 4

    def demand(self, count: int, what: str) -> None:
        """ValueError where fewer bytes are left."""
        left = self.size - self.place
        if count > left:
            raise ValueError(
                f"cut short or damaged: {what} would take {count:,} bytes from byte "
                f"{self.place:,} on, and {left:,} are left"
            )

    def take(self, layout: str) -> tuple[Any, ...]:
        """Numbers of a struct format."""
        width = struct.calcsize(f"<{layout}")
        self.demand(width, "numbers")
        found = struct.unpack_from(f"<{layout}", self.mapped, self.place)
        self.place += width
        return found

    def text(self, what: str) -> str:
        """A string; bytes that are no UTF-8 are replaced, as in old files' vocabularies."""
        (length,) = self.take("Q")
        self.demand(length, what)
        self.place += length
        return self.mapped[self.place - length : self.place].decode("utf-8", "replace")

    def value(self, kind: int, name: str) -> Any:
        """A key's value."""
        if kind == _STRING:
            return self.text(name)
        if kind != _ARRAY:
            (number,) = self.numbers(kind, 1, name)
            return shortest(number) if kind == _FLOAT32 else number
        inner, length = self.take("IQ")
        if inner == _STRING:
            self.demand(8 * length, f"{length:,} strings of {name}")
            return [self.text(name) for _ in range(length)]
        return self.numbers(inner, length, name)

    def numbers(self, kind: int, count: int, name: str) -> list[Any]:
        """So many numbers of a type."""
        if kind not in _SCALARS:
            raise ValueError(f"{name} has values of the unknown type {kind}")
        self.demand(count * struct.calcsize(f"<{_SCALARS[kind]}"), f"{count:,} numbers of {name}")
        return list(self.take(f"{count}{_SCALARS[kind]}"))


def shortest(number: float) -> float:
    """The number of fewest digits that is `number` in float32."""
    for digits in range(1, 10):
        short = float(f"{number:.{digits}g}")
        try:
            if struct.pack("<f", short) == struct.pack("<f", number):
                return short
        except OverflowError:  # the largest float32, rounded up
            continue
    return number
