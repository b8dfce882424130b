"""The machine around the arithmetic: threads, compiler, memory, disk, GPU, packages."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

from pellucid.bench.machine import describe, total_memory
from pellucid.devices import free_memory
from pellucid.doctor.check import MachineCheck
from pellucid.system import cores

_WRITTEN = 64 << 20  # bytes of memory and of disk that are written and read again
_LITTLE = 2 << 30  # bytes free, of memory or disk, below which it is said
_PACKAGE = re.compile(r"[A-Za-z0-9_.-]+")
_BOUND = re.compile(r"(>=|<)([0-9.]+)")


def threads() -> MachineCheck:
    """PyTorch's threads against the cores that this process may use."""
    used, able = torch.get_num_threads(), cores()
    found = f"{used} of PyTorch, {able} cores to use, {os.cpu_count()} in the machine"
    return MachineCheck("threads", "note" if used > able else "right", found)


def compiler() -> MachineCheck:
    """The C compiler that the decoding step is compiled with."""
    said = describe()["compiler"]
    return MachineCheck("C compiler", "right" if said else "note", said or "none: cc is not found")


def memory() -> MachineCheck:
    """Numbers written into memory and read again; how much is free."""
    free, total = free_memory(torch.device("cpu")), total_memory()
    count = min(_WRITTEN, free // 8) // 8
    written = torch.arange(count, dtype=torch.int64).mul_(0x9E3779B97F4A7C15 - (1 << 64))
    again = written.clone()
    wrong = int((again != written).sum()) + int((again ^ (again - written) != written).sum())
    found = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if wrong:
        return MachineCheck("memory", "wrong", f"{wrong:,} numbers were read as others; {found}")
    return MachineCheck("memory", "note" if free < _LITTLE else "right", found)


def disk() -> MachineCheck:
    """A file written to the folder of temporary files and read again; how much is free."""
    folder = Path(tempfile.gettempdir())
    block = os.urandom(1 << 20)
    try:
        free = shutil.disk_usage(folder).free
        begin = time.perf_counter()
        with tempfile.TemporaryFile(dir=folder) as file:
            digest = hashlib.sha256()
            for place in range(min(_WRITTEN, free // 8) >> 20):
                part = block[place:] + block[:place]
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            same = hashlib.file_digest(file, "sha256").digest() == digest.digest()
        seconds = time.perf_counter() - begin
    except OSError as error:
        return MachineCheck("disk", "wrong", f"{folder} cannot be written: {error}")
    if not same:
        return MachineCheck(
            "disk", "wrong", f"a file in {folder} was read as another than was written"
        )
    found = f"{free / 2**30:.1f} GiB free in {folder}"
    return MachineCheck("disk", "note" if free < _LITTLE else "right", found, seconds=seconds)


def gpu() -> MachineCheck:
    """The GPUs that PyTorch can use."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
        return MachineCheck("GPU", "right", "; ".join(names))
    if shutil.which("nvidia-smi"):
        return MachineCheck("GPU", "note", "there is a driver, but this PyTorch cannot use it")
    return MachineCheck("GPU", "absent", "none")


def packages() -> tuple[MachineCheck, dict[str, str | None]]:
    """Installed versions of what Pellucid needs, against the bounds that it states."""
    try:
        needed = [line for line in metadata.requires("pellucid") or [] if "extra" not in line]
    except metadata.PackageNotFoundError:  # run from its sources, not installed
        needed = []
    found: dict[str, str | None] = {}
    wrong = []
    for line in needed:
        name = _PACKAGE.match(line.strip())
        if name is None:
            continue
        try:
            found[name[0]] = version = metadata.version(name[0])
        except metadata.PackageNotFoundError:
            found[name[0]], version = None, ""
        if not version or not all(_within(version, *bound) for bound in _BOUND.findall(line)):
            wrong.append(f"{line.strip()}, found {version or 'none'}")
    if wrong:
        return MachineCheck("packages", "wrong", f"needed: {'; '.join(wrong)}"), found
    return MachineCheck("packages", "right", f"{len(found)} packages, as needed"), found


def _within(version: str, sign: str, bound: str) -> bool:
    mine, limit = (
        [int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3]]
        for text in (version, bound)
    )
    return mine >= limit if sign == ">=" else mine < limit
