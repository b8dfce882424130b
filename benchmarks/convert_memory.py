"""How much memory and time a conversion takes, against the size of its files (Linux).

    python benchmarks/convert_memory.py                       Llama 3.2 1B's shape, hf to meta
    python benchmarks/convert_memory.py --shards 2
    python benchmarks/convert_memory.py --source meta --to hf

Writes a random bfloat16 checkpoint into a temporary folder, converts it in a fresh process, and
removes both (5 GB). For each stage it prints the seconds it took and the largest memory of its own
(anon, MB) above what the imports take; then the peak with mapped pages, which the system may drop.
The largest tensor of this shape, the embedding, takes 525 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from load_memory import occupied, write

from pellucid import checkpoints


def measure(source: Path, layout: str, shards: int) -> None:
    """Convert, and print a line for each stage."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is not of interest
    start, begin = occupied(), time.perf_counter()
    largest: dict[str, float] = {}
    first: dict[str, float] = {}

    def watch(stage: str, _done: int, _total: int) -> None:
        first.setdefault(stage, time.perf_counter() - begin)
        largest[stage] = max(largest.get(stage, 0.0), occupied()["anon"] - start["anon"])

    done = checkpoints.convert(
        source, source.parent / "converted", layout, shards=shards, progress=watch
    )
    ends = [*list(first.values())[1:], time.perf_counter() - begin]
    for (stage, at), end in zip(first.items(), ends, strict=True):
        sys.stdout.write(f"{stage:<18}{end - at:7.1f} s   anon {largest[stage]:8,.0f}\n")
    files = done.bytes / 1e6
    peak = occupied()["peak"] - start["rss"]
    sys.stdout.write(
        f"files {files:,.0f} MB; peak above imports {peak:,.0f} MB, {peak / files:.2f} of the "
        f"files; {ends[-1]:.1f} s, {time.process_time():.1f} s of them computing\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", choices=("hf", "meta"), default="hf")
    parser.add_argument("--to", choices=("hf", "meta"), default="meta")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the fresh process
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.to, arguments.shards)
        return
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        write(source, arguments.source, 1)
        command = [sys.executable, __file__, "--measure", str(source), "--to", arguments.to]
        subprocess.run([*command, "--shards", str(arguments.shards)], check=True)


if __name__ == "__main__":
    main()
