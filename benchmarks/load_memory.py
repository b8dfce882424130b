"""How much memory loading a checkpoint takes, against the size of its files (Linux).

    python benchmarks/load_memory.py                          Llama 3.2 1B's shape, Hugging Face
    python benchmarks/load_memory.py --layout meta --shards 2
    python benchmarks/load_memory.py --dtype float32          converted while loading
    python benchmarks/load_memory.py --folder FOLDER          a checkpoint you have

Writes a random bfloat16 checkpoint into a temporary folder (2.5 GB; removed afterwards). A fresh
process then opens it, loads the model and runs one forward pass over 8 tokens, and prints after
each step what it occupies (``/proc/self/status``), in MB:

    anon   memory of its own, which only swapping can take back
    file   pages of mapped files, which the system drops and reads again as it likes
    rss    both together
    peak   largest rss since the imports were done

The ratio is peak above what the imports alone take, over the size of the weight files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pellucid import checkpoints
from pellucid.checkpoints.formats import meta
from pellucid.models import LlamaConfig, RopeConfig

CONFIG = LlamaConfig(  # Llama 3.2 1B
    vocab_size=128256,
    context_length=131072,
    width=2048,
    n_layers=16,
    n_heads=32,
    n_kv_heads=8,
    head_dim=64,
    hidden_width=8192,
    rope=RopeConfig(theta=500000.0, type="llama3", factor=32.0, original_context=8192),
    tied=True,
)
PARAMS = (
    '{"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32, "n_kv_heads": 8,'
    ' "n_layers": 16, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": true,'
    ' "vocab_size": 128256}'
)


class RandomWeights(Mapping[str, Tensor]):
    """Parameter name -> random tensor; all are views of one, so that none needs memory."""

    def __init__(self, config: LlamaConfig) -> None:
        self.shapes = checkpoints.parameter_shapes(config)
        largest = max(torch.Size(shape).numel() for shape in self.shapes.values())
        generator = torch.Generator().manual_seed(0)
        self.block = torch.randn(largest, generator=generator).mul_(0.02).bfloat16()

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.block[: torch.Size(shape).numel()].view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write(folder: Path, layout: str, shards: int) -> None:
    """The random checkpoint in one of the layouts."""
    weights = RandomWeights(CONFIG)
    if layout == "hf":
        size = 2 * sum(torch.Size(shape).numel() for shape in weights.shapes.values())
        checkpoints.save(folder, CONFIG, weights, max_shard_bytes=-(-size // shards) + 2**29)
        return
    folder.mkdir()
    (folder / "params.json").write_text(PARAMS)
    for shard in range(shards):
        tensors = {}
        for entry in meta.table(CONFIG, embed_dim=0):
            whole = weights[entry.parameter]
            part = whole if entry.dim is None else whole.chunk(shards, entry.dim)[shard]
            tensors[entry.stored] = part.clone(memory_format=torch.contiguous_format)
        torch.save(tensors, folder / f"consolidated.{shard:02}.pth")


def occupied() -> dict[str, float]:
    """What this process occupies now, in MB."""
    keys = {"RssAnon": "anon", "RssFile": "file", "VmRSS": "rss", "VmHWM": "peak"}
    lines = Path("/proc/self/status").read_text().splitlines()
    split = (line.split() for line in lines)
    return {keys[word[0][:-1]]: int(word[1]) / 1000 for word in split if word[0][:-1] in keys}


def measure(folder: Path, dtype: str | None) -> None:
    """Open, load, one forward pass; a line after each, and the ratio."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is not of interest
    start = report("imports")
    checkpoint = checkpoints.open_checkpoint(folder)
    report("open_checkpoint")
    model = checkpoints.load_model(checkpoint, dtype=getattr(torch, dtype) if dtype else None)
    report("load_model")
    with torch.no_grad():
        model(torch.arange(1, 9)[None])
    end = report("forward, 8 tokens")
    files = checkpoint.file_bytes / 1e6
    ratio = (end["peak"] - start["rss"]) / files
    sys.stdout.write(
        f"weight files {files:,.0f} MB; peak above imports / files = {ratio:.3f}; "
        f"peak / files = {end['peak'] / files:.3f}\n"
    )


def report(step: str) -> dict[str, float]:
    """One line of the table."""
    now = occupied()
    columns = "".join(f"{key} {now[key]:8,.0f}   " for key in ("anon", "file", "rss", "peak"))
    sys.stdout.write(f"{step:<20}{columns.rstrip()}\n")
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layout", choices=("hf", "meta"), default="hf")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--dtype", help="convert while loading; default: as stored")
    parser.add_argument("--folder", type=Path, help="measure this checkpoint, write none")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the fresh process
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not arguments.folder:
            write(folder, arguments.layout, arguments.shards)
        command = [sys.executable, __file__, "--measure", str(folder)]
        command += ["--dtype", arguments.dtype] if arguments.dtype else []
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
