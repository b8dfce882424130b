"""From opening a checkpoint to its first token, against reading its bytes once (Linux).

    python benchmarks/first_token.py                    Llama 3.2 1B's shape in bfloat16, 2.5 GB
    python benchmarks/first_token.py --prompt 128 --rounds 5
    python benchmarks/first_token.py --folder FOLDER    a checkpoint you have

Writes a random checkpoint into a temporary folder, removed afterwards. Each measurement is a fresh
process whose imports are done; in turns: read, open, read, open … "cold": the file cache has just
forgotten the files (posix_fadvise), "warm": they have just been read.

    read    the weight files once, 8 MiB at a time
    mapped  open_checkpoint and load_model: everything but the weights' bytes
    first   until the first token after a prompt of --prompt tokens is there, `mapped` included
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from big_model import DEMO, forget_files, read_once
from load_memory import CONFIG, RandomWeights, occupied

from pellucid import checkpoints
from pellucid.generate import Sampling, generate_tokens


def measure(kind: str, folder: Path, cold: bool, prompt: int, threads: int) -> dict[str, float]:
    """In the fresh process: seconds, and the peak of resident memory above the imports in MB."""
    torch.set_num_threads(threads)
    files = tuple(sorted((*folder.glob("*.safetensors"), *folder.glob("*.pth"))))
    if cold:
        forget_files(files)
    else:
        read_once(files)
    if kind == "read":
        return {"read": read_once(files)}
    gc.freeze()  # a collection of what the imports made takes 90 ms, whenever it comes
    before = occupied()["rss"]
    start = time.perf_counter()
    checkpoint = checkpoints.open_checkpoint(folder)
    model = checkpoints.load_model(checkpoint)
    mapped = time.perf_counter() - start
    tokens = [100 + token for token in range(prompt)]
    next(generate_tokens(model, [tokens], sampling=Sampling(temperature=0.0), max_new_tokens=2))
    first = time.perf_counter() - start
    return {"mapped": mapped, "first": first, "peak": occupied()["peak"] - before}


def main() -> None:
    """Write, measure in turns, print medians, remove."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompt", type=int, default=8, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="measure this checkpoint, write none")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # the fresh process
    arguments = parser.parse_args()
    if arguments.measure:
        kind, state = arguments.measure
        found = measure(
            kind, arguments.folder, state == "cold", arguments.prompt, arguments.threads
        )
        json.dump(found, sys.stdout)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if not arguments.folder:
            checkpoints.save(folder, CONFIG, RandomWeights(CONFIG), tokenizer_from=DEMO)
            os.sync()
        size = checkpoints.open_checkpoint(folder).file_bytes / 1e6
        sys.stdout.write(f"weight files {size:,.0f} MB, prompt of {arguments.prompt} tokens\n")
        for state in ("cold", "warm"):
            rounds = []
            for _ in range(arguments.rounds):
                turn: dict[str, float] = {}
                for kind in ("read", "first"):
                    command = [sys.executable, __file__, "--folder", str(folder)]
                    command += ["--measure", kind, state, "--prompt", str(arguments.prompt)]
                    command += ["--threads", str(arguments.threads)]
                    turn |= json.loads(subprocess.check_output(command, text=True))
                rounds.append(turn)
            middle = {key: statistics.median(turn[key] for turn in rounds) for key in rounds[0]}
            ratios = sorted(turn["first"] / turn["read"] for turn in rounds)
            sys.stdout.write(
                f"{state}: read {middle['read']:.2f} s, mapped {middle['mapped']:.3f} s, first "
                f"token {middle['first']:.2f} s; first / read {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}); peak / files {middle['peak'] / size:.3f}\n"
            )


if __name__ == "__main__":
    main()
