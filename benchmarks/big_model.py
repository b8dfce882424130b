"""A model larger than memory: walk, trace and generate under a memory limit (Linux).

    python benchmarks/big_model.py                     Llama 3 8B's shape, 16 GB, limit 3 GiB
    python benchmarks/big_model.py --layers 4          fewer blocks: 3.8 GB
    python benchmarks/big_model.py --layout meta --shards 2
    python benchmarks/big_model.py --folder FOLDER     a checkpoint you have

Writes a random bfloat16 checkpoint (really written: no holes) into a temporary folder, removed
afterwards. Each measurement is a fresh process in a memory cgroup of its own, made by hand (root;
version 1 or 2). The limit counts everything the process causes to be in memory, file cache
included. Without the right to make one it runs without a limit and says so. Before each, the file
cache forgets the files (posix_fadvise). In turns, so that each stands beside a plain read:

    read       the weight files once, 8 MiB at a time
    generate   with --stream-weights, seconds per pass: the prompt, then one token at a time
    trace      one pass, every name of every layer
    walk       from the prompt to the next token

"peak" is the process's largest resident set (VmHWM), mapped files included; "anonymous" is the part
of it, at the end, that only swapping could take back.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from load_memory import RandomWeights, occupied

import pellucid
from pellucid import checkpoints
from pellucid.checkpoints.formats import meta
from pellucid.families.shapes import shape

KINDS = ("generate", "trace", "walk")
PROMPT = "the answer to the ultimate question of life, the universe, and everything is "
PARAMS = (
    '{"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 32, "n_kv_heads": 8,'
    ' "n_layers": %d, "norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256}'
)
DEMO = Path(pellucid.__file__).parent / "demos" / "stdlib"


def write(folder: Path, layers: int, layout: str, shards: int) -> None:
    """The random checkpoint, with the demo's tokenizer, whose ids are within the vocabulary."""
    config = replace(shape("llama-3-8b").config, n_layers=layers)
    weights = RandomWeights(config)
    checkpoints.save(folder, config, weights, tokenizer_from=DEMO)
    if layout == "meta":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        (folder / "config.json").unlink()
        (folder / "params.json").write_text(PARAMS % layers)
        for shard in range(shards):
            tensors = {
                entry.stored: weights[entry.parameter]
                .chunk(1 if entry.dim is None else shards, entry.dim or 0)[
                    0 if entry.dim is None else shard
                ]
                .clone()
                for entry in meta.table(config, embed_dim=0)
            }
            torch.save(tensors, folder / f"consolidated.{shard:02}.pth")
    os.sync()


@contextmanager
def memory_limit(limit: int) -> Iterator[Path | None]:
    """A memory cgroup with this limit, removed afterwards; None where it cannot be made."""
    for root, leaf in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
                       (Path("/sys/fs/cgroup"), "memory.max")):  # fmt: skip
        group = root / f"pellucid-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / leaf).write_text(str(limit))
            yield group
            return
        except FileNotFoundError:  # the other version's file
            continue
        finally:
            group.rmdir()
    yield None


def forget_files(files: tuple[Path, ...]) -> None:
    """Take the files out of the file cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(kind: str, folder: Path, tokens: int, threads: int) -> None:
    """In the fresh process: run once and print the seconds, then the memory."""
    torch.set_num_threads(threads)
    checkpoint = checkpoints.open_checkpoint(folder)
    files = checkpoint.weights.paths
    forget_files(files)
    took = [read_once(files)] if kind == "read" else list(timed(kind, folder, tokens))
    now = occupied()
    passes = "  ".join(f"{seconds:6.2f}" for seconds in took)
    rate = checkpoint.file_bytes / 1e9 / (sum(took) / len(took))
    sys.stdout.write(
        f"{kind:<10}{passes} s   {rate:5.2f} GB/s of weights   "
        f"peak {now['peak']:,.0f} MB, anonymous {now['anon']:,.0f} MB\n"
    )


def read_once(files: tuple[Path, ...]) -> float:
    """Seconds to read the files from beginning to end."""
    room = memoryview(bytearray(8 << 20))
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    return time.perf_counter() - start


def timed(kind: str, folder: Path, tokens: int) -> Iterator[float]:
    """Seconds of each pass over the weights."""
    lm = pellucid.load(folder, stream=True)
    start = time.perf_counter()
    if kind == "generate":
        for _ in lm.stream(PROMPT, max_new_tokens=tokens, temperature=0.0):
            now = time.perf_counter()
            yield now - start
            start = now
        return
    if kind == "trace":
        lm.trace(PROMPT)
    else:
        for _ in lm.walk(PROMPT):
            pass
    yield time.perf_counter() - start


def main() -> None:
    """Write, measure in turns, remove."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--layout", choices=("hf", "meta"), default="hf")
    parser.add_argument("--shards", type=int, default=1, help="of Meta's layout")
    parser.add_argument("--limit", type=float, default=3.0, metavar="GIB")
    parser.add_argument("--tokens", type=int, default=3, help="to generate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", type=Path, help="measure this checkpoint, write none")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the fresh process
    parser.add_argument("--cgroup", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        if arguments.cgroup:
            (arguments.cgroup / "cgroup.procs").write_text(str(os.getpid()))
        measure(arguments.measure, arguments.folder, arguments.tokens, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not arguments.folder:
            write(folder, arguments.layers, arguments.layout, arguments.shards)
        size = checkpoints.open_checkpoint(folder).file_bytes
        with memory_limit(int(arguments.limit * 2**30)) as group:
            told = f"limit {arguments.limit} GiB (cgroup)" if group else "no limit could be set"
            sys.stdout.write(f"weight files {size / 1e9:.1f} GB, {told}, file cache cold\n")
            sys.stdout.flush()
            turns = [each for kind in arguments.kinds for each in ("read", kind)]
            for kind in (*turns, "read"):
                command = [sys.executable, __file__, "--measure", kind, "--folder", str(folder)]
                command += ["--tokens", str(arguments.tokens)]
                command += ["--threads", str(arguments.threads)]
                command += ["--cgroup", str(group)] if group else []
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
