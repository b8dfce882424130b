"""A library kept from run to run beside its checksum, in a folder that only this user can write.

    decode-avx2-1f0c2b7a….so           mode 0600
    decode-avx2-1f0c2b7a….so.sha256    of the whole file, in hexadecimal

What is loaded is the content that was read and checked, not the path: a file can be exchanged or
cut between a check and a load, and a library that is cut while it is mapped kills the process
(SIGBUS).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pellucid.ownership import open_own_folder, own_folder, read_own_file

MOST_BYTES = 64 << 20  # of a library; ours has about 200 KB
_LOCK_SECONDS = 60.0  # wait so long for a process that compiles; then compile as well


class Damaged(ValueError):
    """What is kept is not what was written; the message says how that shows."""


class KeptLibrary:
    """One library in a folder; a context manager that closes its descriptor of the folder."""

    def __init__(self, path: Path) -> None:
        """Make its folder, with mode 0700, where there is none. OSError as `open_own_folder`."""
        self.name, self.folder = path.name, Path(os.path.realpath(path.parent))
        self._descriptor = open_own_folder(self.folder)

    def __enter__(self) -> KeptLibrary:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self) -> bytes | None:
        """The library's content, or None where there is none.

        Raises Damaged where it does not have its checksum, PermissionError where another user
        may have written the file, OSError where it cannot be read.
        """
        try:
            content = read_own_file(self._descriptor, self.name, MOST_BYTES)
        except FileNotFoundError:
            return None
        try:
            stated = read_own_file(self._descriptor, self._checksum_name, 1024)
        except FileNotFoundError:
            raise Damaged("has no checksum beside it") from None
        if stated.strip() != _checksum(content):
            raise Damaged("is not what its checksum says")
        return content

    def write(self, content: bytes) -> None:
        """Keep `content`. After a crash, whenever it comes, nothing or a damaged pair is found."""
        self._write(self.name, content)
        self._write(self._checksum_name, _checksum(content) + b"\n")
        os.fsync(self._descriptor)

    @property
    def _checksum_name(self) -> str:
        return f"{self.name}.sha256"

    def _write(self, name: str, content: bytes) -> None:
        beside = f".{name}.{secrets.token_hex(4)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(beside, flags, 0o600, dir_fd=self._descriptor)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside, dir_fd=self._descriptor)
            raise

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While one process compiles, others wait for what it makes; without locks all compile."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        # A descriptor of its own: closing it lets the lock go.
        lock = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._descriptor)
        try:
            until = time.monotonic() + _LOCK_SECONDS
            while time.monotonic() < until:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.05)
                    continue
                except OSError:
                    pass  # a file system without locks
                break
            yield
        finally:
            os.close(lock)


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def load_content(content: bytes) -> ctypes.CDLL:
    """The shared library whose file is `content`. OSError where it is none."""
    if not hasattr(os, "memfd_create"):
        return _load_copy(content)
    try:
        memory = os.memfd_create("pellucid-decode")
    except OSError:  # not allowed here
        return _load_copy(content)
    path = f"/proc/self/fd/{memory}"
    with open(memory, "wb", closefd=False) as file:
        file.write(content)
    if not os.path.exists(path):  # no /proc here
        os.close(memory)
        return _load_copy(content)
    # The descriptor stays open with the library. The loader knows libraries by their path, and
    # would give this one again for another content under the same number.
    return ctypes.CDLL(path)


def _load_copy(content: bytes) -> ctypes.CDLL:
    """By way of a file in a new folder that no other user can enter or exchange."""
    with tempfile.TemporaryDirectory() as made:
        path = own_folder(Path(made)) / "decode.so"
        path.write_bytes(content)
        return ctypes.CDLL(str(path))
