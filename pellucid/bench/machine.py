"""The machine: what it is, how fast it reads memory, how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pellucid.system import cores

# What kernels choose by: vector widths, bfloat16 and int8 dot products, matrix tiles.
FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve",
)  # fmt: skip
_READ_BYTES = 512 << 20  # many times any cache of one processor


def describe() -> dict[str, Any]:
    """What a reader of the numbers must know: processor, cores, memory, versions, date."""
    import torch

    import pellucid

    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": [info.get(k) for k in ("cpu family", "model", "stepping")],
        "architecture": platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": cores(),
        "cores_seen": os.cpu_count(),
        "memory_bytes": total_memory(),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _compiler(),
        "pellucid": pellucid.__version__,
        "commit": _commit(),
    }


def total_memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _caches() -> dict[str, str]:
    """Level and kind -> size, as the kernel states them for the first core."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        found[f"L{level} {kind}"] = size
    return found


def _first_line(command: list[str], where: Path | None = None) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)
    return done.stdout.partition("\n")[0] or None if done.returncode == 0 else None


def _compiler() -> str | None:
    return _first_line([os.environ.get("CC") or "cc", "--version"])


def _commit() -> str | None:
    return _first_line(["git", "rev-parse", "--short", "HEAD"], Path(__file__).parent)


class Machine:
    """The two limits, measured with `threads` threads; holds the buffer that is read."""

    def __init__(self, threads: int, read_bytes: int = _READ_BYTES) -> None:
        import torch

        self._torch, self._threads = torch, threads
        torch.set_num_threads(threads)
        # Written once, so that every page is there; 8 divides it: two views of the same bytes.
        read_bytes = min(read_bytes, total_memory() // 8) // 8 * 8
        self._floats = torch.full((read_bytes // 4,), 1.0)

    def bandwidth(self, repeats: int = 5) -> dict[str, float]:
        """Bytes/s that plain reductions of a large buffer read: best and median of `repeats`.

        A sum, a sum in blocks, a maximum: what is wanted is how fast memory can be read, not how
        fast one kernel adds, so the fastest of them counts.
        """
        rows = 16 * self._threads
        blocks = self._floats[: len(self._floats) // rows * rows].view(rows, -1)
        ways: list[Callable[[], object]] = [
            self._floats.sum,
            lambda: blocks.sum(-1),
            self._floats.amax,
        ]
        rates = [[self._floats.nbytes / _seconds(way) for _ in range(repeats)] for way in ways]
        fastest = max(rates, key=max)
        return {"best": max(fastest), "median": statistics.median(fastest)}

    def gemm(self, dtype: str, sizes: tuple[int, ...] = (1024, 2048, 4096)) -> dict[str, Any]:
        """FLOP/s of a square matrix product in `dtype`: the best over `sizes`, and each of them."""
        rates = {}
        for size in sizes:
            a, b = (self._torch.randn(size, size).to(getattr(self._torch, dtype)) for _ in "ab")
            self._torch.mm(a, b)
            repeats = 3 if size < 4096 else 2
            fastest = min(_seconds(lambda a=a, b=b: self._torch.mm(a, b)) for _ in range(repeats))
            rates[size] = 2 * size**3 / fastest
        return {"best": max(rates.values()), "by_size": {str(k): v for k, v in rates.items()}}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
