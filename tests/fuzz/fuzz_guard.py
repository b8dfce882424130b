"""A process that may write into one folder only, and whose inputs may cost and do only so much.

Two fences around the folder, set up before the first input and never lifted again:

    Landlock    the Linux kernel's own (5.13 and later): writing anywhere else fails, whoever asks
    audit hook  Python's: the same for what Python opens, removes or renames, on every system; and
                programs, libraries and network connections that an input starts are counted

What a flag fuzzer offers as an output (``/dev/null``, a system file) so stays what it is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls of Linux
_WRITES = sum(1 << bit for bit in (1, *range(4, 15)))  # LANDLOCK_ACCESS_FS_*: all but reading
_NO_NEW_PRIVILEGES = 38
_REMOVING = {"os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1}
_REMOVING |= {"os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.chown": 1, "shutil.rmtree": 1}
_STARTING = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"}
_STARTING |= {"socket.connect", "socket.bind", "pty.spawn"}


class Hang(BaseException):
    """An input took longer than it may; no reader's ``except Exception`` hides it."""


class Guard:
    """The fences and what went against them. `kernel`: whether Landlock stands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.started: list[str] = []
        self.kernel = _landlock(self.folder)
        self._watching = True
        sys.addaudithook(self._hook)

    @contextmanager
    def of_own(self) -> Iterator[None]:
        """While the fuzzer itself works, and not an input."""
        self._watching = False
        try:
            yield
        finally:
            self._watching = True

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event in _STARTING:
            self.started.append(f"{event} {given[:1]!r:.200}")
            raise PermissionError(f"an input started something: {event}")
        if event == "open" and isinstance(given[0], str | bytes | os.PathLike):
            path, mode, flags = given
            writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if flags & writing or (mode and set("wax+") & set(mode)):
                self._demand_inside(path)
        elif event in _REMOVING:
            for path in given[: _REMOVING[event]]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._demand_inside(path)

    def _demand_inside(self, path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if real != "/dev/null" and not real.startswith(f"{self.folder}{os.sep}"):
            raise PermissionError(13, "outside the fuzzer's folder", os.fsdecode(path))


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Hang where what is inside works longer, and once more each second where that is caught.

    Work is processor time of this process, which other processes do not lengthen; one that waits
    takes none, so twelve times as long by the clock is a hang too.
    """

    def ring(number: int, frame: object) -> None:
        raise Hang(f"longer than {seconds:g} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, 12))
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, times in timers:
        signal.setitimer(timer, times * seconds, 1.0)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def most_memory() -> int:
    """Bytes that this process has held at most so far.

    Not `ru_maxrss`, which a process inherits from the larger one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _landlock(folder: Path) -> bool:
    """Take from this process, for ever, the right to write outside `folder`; False where it cannot.

    Reading stays allowed everywhere, writing to /dev/null too.
    """
    if sys.platform != "linux":
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    handled = ctypes.c_uint64(_WRITES)
    rules = call(_CREATE_RULESET, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    if rules < 0:
        return False

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))

    try:
        for path, allowed in ((folder, _WRITES), (Path("/dev/null"), 1 << 1 | 1 << 14)):
            parent = os.open(path, os.O_PATH)
            rule = Beneath(allowed, parent)
            added = call(_ADD_RULE, rules, 1, ctypes.byref(rule), 0)
            os.close(parent)
            if added:
                return False
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            return False
        return call(_RESTRICT_SELF, rules, 0) == 0
    finally:
        os.close(rules)
