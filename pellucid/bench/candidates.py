"""Which engines can run here: the interpreter that has each, and the files it reads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from pellucid.bench.crew import WorkerError, worker_environment
from pellucid.bench.engines import Spec, specs
from pellucid.bench.shapes import hf_folder
from pellucid.checkpoints import Weights, open_checkpoint
from pellucid.checkpoints.formats.gguf_tokenizer import NONE
from pellucid.checkpoints.formats.gguf_writing import write_gguf
from pellucid.files import folder_beside
from pellucid.models import Config

# Without a choice: what people would run, in a minute or so.
DEFAULT = (
    "pellucid/eager/bfloat16", "pellucid/fast/*", "transformers/bfloat16", "litgpt/bfloat16",
    "llama.cpp/*",
)  # fmt: skip
_GGUF_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An engine with the interpreter to run it in."""

    spec: Spec
    python: str


def choose(globs: Sequence[str]) -> list[Spec]:
    """The engines whose names fit a glob, in the order of the table; all globs must fit some.

    ValueError that lists the names where one fits nothing.
    """
    known = specs()
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            raise ValueError(
                f"no engine is called {glob!r}: expected a glob over {', '.join(known)}"
            )
    return [spec for name, spec in known.items() if any(fnmatchcase(name, g) for g in globs)]


def available(
    chosen: Sequence[Spec], peer_pythons: Sequence[str]
) -> tuple[list[Candidate], dict[str, str]]:
    """Those that can run, and why each of the others cannot."""
    found: dict[str, str | None] = {}
    candidates, skipped = [], {}
    for spec in chosen:
        if spec.package not in found:
            found[spec.package] = _interpreter_with(spec.package, [sys.executable, *peer_pythons])
        python = found[spec.package]
        if python is None:
            skipped[spec.name] = f"no {spec.package} in this interpreter (or give --peer-python)"
        else:
            candidates.append(Candidate(spec=spec, python=python))
    return candidates, skipped


def _interpreter_with(package: str, pythons: Sequence[str]) -> str | None:
    """The first interpreter that finds the package; ValueError for one that does not run."""
    question = f"from importlib.util import find_spec; print(find_spec({package!r}) is not None)"
    for python in pythons:
        try:
            done = subprocess.run(
                [python, "-c", question], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"{python}: not a Python interpreter that runs ({error})") from None
        if done.stdout.strip() == "True":
            return python
    return None


def files_for(candidate: Candidate, home: Path, config: Config) -> Path:
    """What the engine reads, written into `home` unless it is there.

    ValueError or WorkerError where the shape cannot be written in its format.
    """
    kind, _, dtype = candidate.spec.files.partition(":")
    if kind == "hf":
        return hf_folder(home, config, dtype)
    path = home / f"model-{dtype}.gguf"
    if path.exists():
        return path
    weights = open_checkpoint(hf_folder(home, config, "bfloat16")).weights
    if dtype in _GGUF_TYPES:
        _write(path, config, weights, _GGUF_TYPES[dtype])
        return path
    source = home / "model-bf16.gguf"
    if not source.exists():
        _write(source, config, weights, "BF16")
    _quantise(candidate.python, source, path, dtype)
    return path


def _write(path: Path, config: Config, weights: Weights, kind: str) -> None:
    """A whole file or none; token ids are all that is needed, so it has no vocabulary."""
    with folder_beside(path) as beside:
        write_gguf(beside / path.name, config, weights.__getitem__, kind, NONE)
        (beside / path.name).replace(path)


def _quantise(python: str, source: Path, target: Path, kind: str) -> None:
    """In the peer's interpreter, which has llama.cpp."""
    done = subprocess.run(
        [python, "-m", "pellucid.bench.engines.llama_cpp", str(source), str(target), kind],
        capture_output=True,
        text=True,
        check=False,
        env=worker_environment(torch.get_num_threads()),
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise WorkerError(f"{target.name}: {words[-1]}")


def size_of(path: Path) -> int:
    """Bytes of a file, or of the weight files of a folder."""
    return sum(file.stat().st_size for file in weight_files(path))


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights."""
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))
