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
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pellucid.generate.native.kept import Damaged, KeptLibrary, load_content

SOURCES = ("kernels.h", "decode.c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
# Best first: name -> the compiler's flags, which are features that the processor must have.
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
    """Where libraries are kept: ``pellucid/`` in the user's cache folder (XDG_CACHE_HOME).

    Raises NotBuilt where the user has no home folder.
    """
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if stated.is_absolute():  # others are to be ignored (XDG Base Directory Specification)
        return stated / "pellucid"
    try:
        return Path.home() / ".cache" / "pellucid"
    except RuntimeError:
        raise NotBuilt(
            "there is no home folder to keep the decoder in: set XDG_CACHE_HOME"
        ) from None


@cache
def library(instructions: str | None = None) -> ctypes.CDLL:
    """The library for one of `instruction_sets()` (default: the best), compiled if need be.

    A kept library that is damaged is compiled anew, with a RuntimeWarning. Raises NotBuilt where
    there is no C compiler or it fails, and where others could have written what is kept.
    """
    recipe = _recipe(instructions or instruction_sets()[0])
    path = cache_folder() / recipe.name
    try:
        with KeptLibrary(path) as kept:
            return _kept(kept) or _made(kept, recipe)
    except PermissionError as error:
        raise NotBuilt(f"the cache of the decoder is not used: {error}") from None
    except OSError as error:
        raise NotBuilt(f"the decoder cannot be kept in {path.parent}: {error}") from None


def _kept(kept: KeptLibrary) -> ctypes.CDLL | None:
    """The library as it is kept; None where there is none, or a damaged one."""
    try:
        content = kept.read()
        return None if content is None else _loaded(content)
    except Damaged:
        return None


def _made(kept: KeptLibrary, recipe: BuildRecipe) -> ctypes.CDLL:
    """Compile, keep and load, unless another process has done it meanwhile."""
    with kept.locked():
        try:
            content = kept.read()
            if content is not None:
                return _loaded(content)
        except Damaged as damage:
            warnings.warn(
                f"the decoder kept as {kept.folder / kept.name} {damage}: compiling it anew",
                RuntimeWarning,
                stacklevel=3,
            )
        content = recipe.compiled(kept.folder)
        try:
            made = _loaded(content)
        except Damaged as damage:
            raise NotBuilt(f"what {recipe.compiler} compiled {damage}") from None
        kept.write(content)
        return made


def _loaded(content: bytes) -> ctypes.CDLL:
    """The library whose file is `content`; Damaged where it does not load or lacks a function."""
    try:
        return _declared(load_content(content))
    except OSError as error:
        raise Damaged(f"does not load ({error})") from None
    except AttributeError as error:
        raise Damaged(f"lacks a function ({error})") from None


@dataclass(frozen=True)
class BuildRecipe:
    """How a library is made: the compiler (None where there is none) and its flags."""

    compiler: str | None
    flags: tuple[str, ...]
    name: str  # of the file, different for every source, compiler and set of flags

    def compiled(self, folder: Path) -> bytes:
        """The library's content, made in a new folder inside `folder`. NotBuilt, or OSError."""
        if self.compiler is None:
            raise NotBuilt("no C compiler (cc) on this machine: install gcc or clang, or set CC")
        source = Path(__file__).parent / "decode.c"
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            made = Path(inside) / "decode.so"
            command = [self.compiler, *self.flags, "-shared", "-fPIC", str(source), "-o", str(made)]
            try:
                done = subprocess.run(
                    [*command, "-lm", "-lpthread"], capture_output=True, check=False
                )
            except OSError as error:
                raise NotBuilt(f"the compiler {self.compiler} does not start: {error}") from None
            if done.returncode:
                raise NotBuilt(
                    f"{self.compiler} could not compile the decoder: {_first_line(done.stderr)}"
                )
            try:
                return made.read_bytes()
            except OSError as error:
                raise NotBuilt(
                    f"{self.compiler} reported no error, but made no library: {error.strerror}"
                ) from None


def _recipe(name: str) -> BuildRecipe:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    folder = Path(__file__).parent
    flags = [*_OPTIMISE, *(f"-m{flag}" for flag in FLAGS[name])]
    sources = b"".join((folder / source).read_bytes() for source in SOURCES)
    # "sha256": before checksums stood beside libraries, their names were made without it.
    given = f"{compiler} {flags} {platform.machine()} sha256".encode("utf-8", "surrogateescape")
    key = hashlib.sha256(sources + given).hexdigest()
    return BuildRecipe(compiler, tuple(flags), f"decode-{name}-{key[:16]}.so")


def _first_line(output: bytes) -> str:
    """The first line of what a compiler wrote, in whatever encoding; no control characters."""
    text = output.decode("utf-8", "backslashreplace").strip() or "no message"
    return "".join(part if part.isprintable() else "?" for part in text.splitlines()[0])[:500]


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
    """The library while a thread may still compile it; `ready` never waits."""

    def __init__(self) -> None:
        self._made: ctypes.CDLL | None = None
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._build, daemon=True)
        self._thread.start()
        self._thread.join(0.05)  # a library that is there already loads in this time

    def _build(self) -> None:
        try:
            try:
                self._made = library()
            except RuntimeWarning:  # a damaged library, where a filter turns warnings into errors
                self._made = library()
        except NotBuilt as problem:
            self._problem = str(problem)
        except Exception as problem:  # in a thread: it would be lost
            self._problem = f"{type(problem).__name__}: {problem}"

    def ready(self) -> ctypes.CDLL | None:
        """The library, or None: not yet, or never; a RuntimeWarning gives the reason once."""
        if self._problem is not None:
            problem, self._problem = " ".join(self._problem.split()), None
            warnings.warn(
                f"tokens are decoded by the model's own code, not in C: {problem}",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._made


@cache
def building() -> Building:
    """The one `Building` of this process; the first call starts it."""
    return Building()
