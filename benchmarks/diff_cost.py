"""What a diff of two models costs: peak memory and time, against their size and one forward pass.

    python benchmarks/diff_cost.py                     Llama 3.2 1B's shape, bfloat16 on both sides
    python benchmarks/diff_cost.py --fault             B has an unrelated embedding table
    python benchmarks/diff_cost.py --dtype-b float32   B converted while loading
    python benchmarks/diff_cost.py --dialect-b meta    B rounds elsewhere, hence everywhere else
    python benchmarks/diff_cost.py --tokens 128

Writes two random checkpoints into a temporary folder (5 GB; removed afterwards). A fresh process
loads both, times one forward pass of each over the same tokens, then runs the diff and prints

    peak     largest resident set of the diff, mapped weight files included (Linux), in GiB
    beyond   peak without the weights of both sides; the goal is 1.5 GiB
    passes   CPU time of the diff in forward passes of the slower side; the goal is 6
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from load_memory import CONFIG, RandomWeights, occupied
from torch import Tensor

from pellucid import checkpoints
from pellucid.diff import compare, from_model

MB, GIB = 1e6, 2**30


class OtherEmbedding(RandomWeights):
    """The same weights with the embedding table backwards: related to nothing."""

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        return tensor.flip(0) if name == "embed.weight" else tensor


def measure(folders: tuple[Path, Path], asked: argparse.Namespace) -> None:
    """Load both, one pass of each, the diff; print what it took."""
    tokens, threads = asked.tokens, asked.threads
    torch.set_num_threads(threads)
    dtype = getattr(torch, asked.dtype_b) if asked.dtype_b else None
    a, b = (checkpoints.open_checkpoint(folder) for folder in folders)
    models = [
        checkpoints.load_model(a),
        checkpoints.load_model(b, dtype=dtype, dialect=asked.dialect_b),
    ]
    weights = sum(
        tensor.numel() * tensor.itemsize
        for model in models
        for tensor in model.state_dict().values()
    )
    rows = torch.randint(CONFIG.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    passes = [_fastest_pass(model, rows) for model in models]
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    stages: list[tuple[float, str]] = []
    start, computing = time.perf_counter(), time.process_time()
    report = compare(
        from_model(models[0], "A"),
        from_model(models[1], "B"),
        rows.tolist(),
        progress=lambda stage: stages.append((time.perf_counter() - start, stage)),
    )
    took, computed = time.perf_counter() - start, time.process_time() - computing
    peak = occupied()["peak"] * MB
    lines = [
        f"verdict    {report.summary()}",
        f"forward    A {passes[0]:.2f} s, B {passes[1]:.2f} s of CPU ({tokens} tokens)",
        f"weights    {weights / GIB:.2f} GiB of both sides",
        f"peak       {peak / GIB:.2f} GiB",
        f"beyond     {(peak - weights) / GIB:.2f} GiB",
        f"time       {took:.2f} s, {computed:.2f} s of CPU on {threads} threads",
        f"passes     {computed / max(passes):.2f}",
        "stages     " + ", ".join(f"{stage} from {at:.1f} s" for at, stage in stages),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _fastest_pass(model: torch.nn.Module, rows: Tensor) -> float:
    """CPU seconds; the first of three passes reads the weights from disk."""
    taken = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()
            model(rows)
            taken.append(time.process_time() - start)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype-b", help="convert B while loading; default: as stored")
    parser.add_argument("--dialect-b", help="default: hf, as A")
    parser.add_argument("--fault", action="store_true", help="B has another embedding table")
    parser.add_argument("--layers", type=int, default=CONFIG.n_layers, help="(16, as the 1B)")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)  # fresh process
    arguments = parser.parse_args()
    if arguments.measure:
        measure(tuple(arguments.measure), arguments)
        return
    config = replace(CONFIG, n_layers=arguments.layers)
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch) / "a", Path(scratch) / "b"
        weights = OtherEmbedding if arguments.fault else RandomWeights
        checkpoints.save(folders[0], config, RandomWeights(config))
        checkpoints.save(folders[1], config, weights(config))
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", *map(str, folders)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
