"""Tensor files: shapes and dtypes known at once, each tensor memory-mapped when it is read.

Both formats are mapped privately (copy on write): writing into a tensor that was read, as training
does, changes memory and never the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import pickle
import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pellucid.files import parse_object

Shape = tuple[int, ...]

# safetensors' names of dtypes; the ones a Llama or GPT-2 is stored in
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_POINTER = b"version https://git-lfs"
# Linux's numbers for madvise(2); Python names some of them, and only where the system has them
_NORMAL, _RANDOM, _WILLNEED, _DONTNEED = 0, 1, 3, 4
_POPULATE_READ = 22  # since Linux 5.14
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit


@dataclass(frozen=True)
class Stored:
    """What a file says about one of its tensors."""

    shape: Shape
    dtype: torch.dtype


class TensorFile(Protocol):
    """One file, or one folder of files that together hold each tensor once."""

    entries: dict[str, Stored]
    paths: tuple[Path, ...]

    def read(self, name: str) -> Tensor:
        """The tensor, mapped; nothing else is read."""
        ...

    def reopened(self) -> TensorFile:
        """The same file through a mapping of its own, which no other reader can write into."""
        ...


class SafetensorsFile:
    """One ``.safetensors`` file. ValueError where its header does not fit its bytes."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.paths = path, (path,)
        _refuse_pointer(path)
        self._places = _places(path)
        try:
            with safe_open(path, framework="pt") as handle:
                self.entries = {name: self._stored(handle, name) for name in self._places}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        self._size = path.stat().st_size
        self._bytes = self._mapped()

    def _stored(self, handle: Any, name: str) -> Stored:
        stored = handle.get_slice(name)
        dtype = stored.get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(
                f"{self.path}: {name} has dtype {dtype}; expected one of {', '.join(_DTYPES)}"
            )
        return Stored(tuple(stored.get_shape()), _DTYPES[dtype])

    def read(self, name: str) -> Tensor:
        """The tensor, mapped, not a byte of it read yet (the library's own reads the first)."""
        stored, (begin, end) = self.entries[name], self._places[name]
        if end == begin:
            return torch.empty(stored.shape, dtype=stored.dtype)
        nothing = torch.empty(0, dtype=stored.dtype, device="cpu")
        return nothing.set_(self._bytes[begin:end]).view(stored.shape)

    def reopened(self) -> SafetensorsFile:
        """The same file through a mapping of its own."""
        fresh = copy(self)
        fresh._bytes = self._mapped()
        return fresh

    def _mapped(self) -> Any:
        """The whole file in memory, private (not shared): not a byte of it is read yet."""
        return torch.UntypedStorage.from_file(str(self.path), False, self._size)


class SafetensorsFolder:
    """Several safetensors files that share out the tensors of one model between them."""

    def __init__(self, files: dict[str, SafetensorsFile]) -> None:
        self.files = files  # tensor name -> the file that holds it
        self.entries = {name: file.entries[name] for name, file in files.items()}
        self.paths = tuple(dict.fromkeys(file.path for file in files.values()))

    def read(self, name: str) -> Tensor:
        """The tensor, mapped; nothing else is read."""
        return self.files[name].read(name)

    def reopened(self) -> SafetensorsFolder:
        """The same files through mappings of their own."""
        fresh = {id(file): file.reopened() for file in self.files.values()}
        return SafetensorsFolder({name: fresh[id(file)] for name, file in self.files.items()})


class PthFile:
    """One ``.pth`` file of ``torch.save``: a zip archive with a pickle, so untrusted input.

    It is read by torch's restricted unpickler, which knows tensors and plain containers and
    refuses every other object before anything of it runs. ValueError where it refuses, where the
    archive is not whole, and where it is no flat dict of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.paths = path, (path,)
        self._tensors = self._loaded()
        self.entries = {
            name: Stored(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor, mapped; nothing else is read."""
        return self._tensors[name]

    def reopened(self) -> PthFile:
        """The same file through a mapping of its own."""
        return PthFile(self.path)

    def _loaded(self) -> dict[str, Tensor]:
        _refuse_pointer(self.path)
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise ValueError(
                f"{self.path}: refused, nothing of it was run: its pickle asks for more than "
                "tensors; get the file from a source you trust, or as safetensors"
            ) from None
        except Exception as error:  # torch names no class of its own for a broken archive
            size = self.path.stat().st_size
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{self.path}: not a whole .pth archive ({size:,} bytes; {why[:160]}); "
                "download or save it again"
            ) from None
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
        ):
            raise ValueError(
                f"{self.path}: expected a dict of tensors by name, as in Meta's releases, "
                f"found a {type(found).__name__} of something else"
            )
        for name, tensor in found.items():
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
                raise ValueError(
                    f"{self.path}: {name} is no dense tensor with values (its layout: "
                    f"{tensor.layout}, device {tensor.device}); save it dense"
                )
        return found


def _refuse_pointer(path: Path) -> None:
    """ValueError for what ``git clone`` leaves without Git LFS, and for a pipe or a device."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file; expected one with tensors in it")
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path}: only a Git LFS pointer; fetch the file itself: git lfs pull")


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> where a tensor begins and ends in a safetensors file, in bytes.

    ValueError where the header does not fit the file's size.

    The library finds that too, but without the numbers; it also finds holes and overlaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{path}: not a whole safetensors file: it has {size:,} bytes and says its header "
                f"alone takes {length:,}"
            )
        try:
            stated = parse_object(file.read(length).decode(), str(path))
            stated.pop("__metadata__", None)
            first = 8 + length
            places = {
                name: (first + each["data_offsets"][0], first + each["data_offsets"][1])
                for name, each in stated.items()
            }
            expected = max((end for _, end in places.values()), default=first)
            wrong = size != expected
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise ValueError(f"{path}: its header is not a safetensors header") from None
    if wrong:
        raise ValueError(
            f"{path}: {size:,} bytes, but its header describes {expected:,}; "
            f"{'the download was cut short' if size < expected else 'something was appended'}"
        )
    return places


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN and the sign of zero included."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def forget_pages(tensor: Tensor) -> None:
    """Hand a mapped tensor's memory back to the system, once a copy of its values has been made.

    The pages were read from a file and are read from there again when needed, so only
    tensors that were not written into may be forgotten. Does nothing where the system is not
    Linux. Without it a checkpoint that needs re-arranging would occupy memory twice.
    """
    _advise(tensor, _DONTNEED, whole_pages=True)


def read_pages(tensor: Tensor) -> None:
    """Bring a mapped tensor into memory now, in one go; does nothing where there is no Linux.

    The kernel then reads far ahead and maps large pieces at once. Touching the pages one after the
    other, as a matrix product does, reads a file that is not in memory at half the speed or less.
    """
    if not tensor.is_contiguous():  # a transposed matrix: all of what it is a view of
        tensor = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
    if not _advise(tensor, _POPULATE_READ):
        _advise(tensor, _WILLNEED)


@contextlib.contextmanager
def single_rows(tensor: Tensor) -> Iterator[None]:
    """Within it a row that is looked at is read alone, not with the megabytes that surround it."""
    _advise(tensor, _RANDOM)
    try:
        yield
    finally:
        _advise(tensor, _NORMAL)


def _advise(tensor: Tensor, advice: int, *, whole_pages: bool = False) -> bool:
    """Tell the kernel about a tensor's pages, or only those it fills; whether it took the advice.

    False where the system is not Linux or its kernel too old to know the advice.
    """
    if not sys.platform.startswith("linux") or not tensor.nbytes or not tensor.is_contiguous():
        return False
    page = mmap.PAGESIZE
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if whole_pages:
        begin, end = -(-begin // page) * page, end // page * page
    else:
        begin, end = begin // page * page, -(-end // page) * page
    if end <= begin:
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    return madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice) == 0
