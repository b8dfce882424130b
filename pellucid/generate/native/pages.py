"""Matrices on large memory pages: fewer page tables to walk while all weights stream by.

A checkpoint is mapped with the file's pages of 4 KB, so that a first token comes at once. Who goes
on writing gains by pages of 2 MB: a tenth to a fifth on the machine it was measured on
(benchmarks/LOG.md). But the system must find and clear those pages, which takes between a fifth of
a second and two seconds per gigabyte. So the large matrices move when the decoding so far would
have gained what the move costs, a part with each step and none held twice.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

PAGE = 2 << 20
PART = 32 << 20  # bytes copied at a time
_GAIN = 0.1  # of a step's time, expected of large pages
_FIRST_RATE = 4e9  # bytes/s of moving, before anything was moved
_SMALLEST = 2 * PAGE
_DONTNEED, _HUGEPAGE = 4, 14  # Linux's madvise(2)
_MAPPING = re.compile(r"(?P<low>[0-9a-f]+)-(?P<high>[0-9a-f]+) \S+ \S+ \S+ (?P<inode>\d+)")


@cache
def _madvise() -> Callable[[int, int, int], bool] | None:
    """madvise(address, bytes, advice) -> whether it was taken; None where there is none."""
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda address, size, advice: call(address, size, advice) == 0


class Account:
    """Decoding time against the cost of moving: whether the move has paid by now.

    The ski-rental rule: however long the text becomes, this takes at most twice the time of the
    best choice with the length known beforehand.
    """

    def __init__(self) -> None:
        self._decoded = self._moving = 0.0  # seconds
        self._moved = 0  # bytes

    def decoded(self, seconds: float) -> None:
        """A step took so long."""
        self._decoded += seconds

    def moved(self, bytes_: int, seconds: float) -> None:
        """So much moved in that time."""
        self._moved += bytes_
        self._moving += seconds

    def pays(self, left: int) -> bool:
        """Whether to move on, `left` bytes before the end."""
        rate = self._moved / self._moving if self._moving else _FIRST_RATE
        return _GAIN * self._decoded >= self._moving + left / rate


_accounts: weakref.WeakKeyDictionary[nn.Module, Account] = weakref.WeakKeyDictionary()


def account(model: nn.Module) -> Account:
    """The one account of a model, over all its generations."""
    return _accounts.setdefault(model, Account())


def worth_moving(tensor: Tensor) -> bool:
    """Whether a matrix is large, lies row by row, and does not begin with a large page already."""
    large = tensor.nbytes >= _SMALLEST and tensor.is_contiguous()
    return _madvise() is not None and large and tensor.data_ptr() % PAGE != 0


Ranges = list[tuple[int, int]]  # of addresses, first and end


def moving(tensor: Tensor, unwritten: Ranges) -> Iterator[Tensor | None]:
    """Copy a matrix to large pages: None after each PART, the copy at the end.

    What was copied of a file that is mapped, and not written into since (`unwritten_files`),
    is handed back to the system as it goes: a later read gets it from the file. Ends
    without a copy where the system gives no large pages.
    """
    advise = _madvise()
    assert advise is not None, "asked where there are no large pages"
    room = torch.empty(tensor.nbytes + PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % PAGE
    target = room[begin : begin + tensor.nbytes]
    if not advise(target.data_ptr(), tensor.nbytes // PAGE * PAGE, _HUGEPAGE):
        return
    source = tensor.detach().view(-1).view(torch.uint8)
    for first in range(0, tensor.nbytes, PART):
        some = source[first : first + PART]
        target[first : first + PART].copy_(some)
        begin = -(-some.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (some.data_ptr() + some.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end and any(low <= begin and end <= high for low, high in unwritten):
            advise(begin, end - begin, _DONTNEED)
        if first + PART < tensor.nbytes:
            yield None
    yield target.view(tensor.dtype).view(tensor.shape)


def unwritten_files() -> Ranges:
    """Where files are mapped of which no page has been changed in memory (Linux's smaps)."""
    found: Ranges = []
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return found
    inside: tuple[int, int] | None = None
    for line in lines:
        mapping = _MAPPING.match(line)
        if mapping:
            of_a_file = int(mapping["inode"]) > 0
            inside = (int(mapping["low"], 16), int(mapping["high"], 16)) if of_a_file else None
        elif inside and line.startswith("Private_Dirty:") and int(line.split()[1]) == 0:
            found.append(inside)
    return found
