"""The C decoder as a shared library: compiled once for this processor, kept between runs.

Which kernels are compiled is decided from what the processor says it can do, so the cache is keyed
by source, compiler and flags, and a home folder shared by different machines holds one each.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

SOURCES = ("kernels.h", "decode.c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
# Best first: what the compiler is told, and what the processor must have for it.
FLAGS = {
    "avx512-bf16": (*_AVX512, "avx512vnni", "avx512bf16", "fma", "f16c"),
    "avx512": (*_AVX512, "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "baseline": (),  # on ARM processors that is NEON
}
_OPTIMISE = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")


class NotBuilt(RuntimeError):
    """There is no library and none can be made; the message says why."""


def instruction_sets() -> tuple[str, ...]:
    """Names of the kernels this processor can run, best first."""
    able = _processor_flags()
    return tuple(name for name, needed in FLAGS.items() if able >= set(needed))


def _processor_flags() -> set[str]:
    """The processor's features as Linux names them, without their underscores; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return {flag.replace("_", "") for flag in flags.split()}


def cache_folder() -> Path:
    """Where libraries are kept: ``pellucid/`` in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pellucid"


@cache
def library(instructions: str | None = None) -> ctypes.CDLL:
    """The library for one of `instruction_sets()` (default: the best), compiled if need be.

    Raises NotBuilt where there is no C compiler or it fails.
    """
    name = instructions or instruction_sets()[0]
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    folder = Path(__file__).parent
    flags = [*_OPTIMISE, *(f"-m{flag}" for flag in FLAGS[name])]
    sources = b"".join((folder / source).read_bytes() for source in SOURCES)
    key = hashlib.sha256(sources + f"{compiler} {flags} {platform.machine()}".encode()).hexdigest()
    path = cache_folder() / f"decode-{name}-{key[:16]}.so"
    if not path.exists():
        if compiler is None:
            raise NotBuilt("no C compiler (cc) on this machine: install gcc or clang, or set CC")
        _compile(compiler, flags, folder / "decode.c", path)
    try:
        return _declared(ctypes.CDLL(str(path)))
    except OSError as error:
        raise NotBuilt(f"{path} does not load: {error}; delete it to compile it anew") from None


def _compile(compiler: str, flags: list[str], source: Path, path: Path) -> None:
    """Compile beside the final name, then rename: no other process ever sees half a library."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *flags, "-shared", "-fPIC", str(source), "-o", str(made)]
            done = subprocess.run(
                [*command, "-lm", "-lpthread"], capture_output=True, text=True, check=False
            )
            if done.returncode:
                first = (done.stderr.strip() or "no message").splitlines()[0]
                raise NotBuilt(f"{compiler} could not compile the decoder: {first}")
            made.replace(path)
    except OSError as error:
        raise NotBuilt(f"the decoder cannot be compiled into {path.parent}: {error}") from None


def _declared(made: ctypes.CDLL) -> ctypes.CDLL:
    made.pellucid_open.restype = ctypes.c_void_p
    made.pellucid_open.argtypes = [ctypes.c_void_p, ctypes.c_int]
    made.pellucid_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    made.pellucid_step.restype = None
    made.pellucid_close.argtypes = [ctypes.c_void_p]
    made.pellucid_close.restype = None
    made.pellucid_multiply.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int, ctypes.c_void_p]
    made.pellucid_multiply.restype = None
    made.pellucid_instructions.restype = ctypes.c_char_p
    return made


class Building:
    """The library while it may still be in the making: asking never waits."""

    def __init__(self) -> None:
        self._made: ctypes.CDLL | None = None
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._build, daemon=True)
        self._thread.start()
        self._thread.join(0.05)  # a library that is there already loads in this time

    def _build(self) -> None:
        try:
            self._made = library()
        except NotBuilt as problem:
            self._problem = str(problem)

    def ready(self) -> ctypes.CDLL | None:
        """The library, or None: not yet, or never."""
        return self._made


@cache
def building() -> Building:
    """The one `Building` of this process; the first call starts it."""
    return Building()
