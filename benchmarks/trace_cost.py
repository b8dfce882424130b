"""What a full trace costs: every name of a GPT-2 124M pass against the plain fused pass.

    python benchmarks/trace_cost.py [--shape gpt2] [--tokens 128] [--rounds 12] [--threads 1]

Random weights of the named shape, in turns in one process (plain, traced, plain, traced …); printed
are the median times, the ratio of each pair, and what the trace holds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from pellucid.models import build, initialise
from pellucid.models.shapes import shape
from pellucid.trace import trace


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="gpt2", help="a name of pellucid.models.shapes")
    parser.add_argument("--dialect", default="hf")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = shape(arguments.shape).config
    model = build(config, arguments.dialect).eval()
    initialise(model, torch.Generator().manual_seed(0))
    tokens = torch.randint(config.vocab_size, (1, arguments.tokens))
    pairs = []
    for turn in range(arguments.rounds + 2):
        start = time.perf_counter()
        with torch.no_grad():
            model(tokens)
        middle = time.perf_counter()
        with trace(model) as seen:
            model(tokens)
        end = time.perf_counter()
        if turn >= 2:  # the first two warm up
            pairs.append((middle - start, end - middle))
    plain, traced = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    sys.stdout.write(
        f"plain {plain * 1e3:.0f} ms, traced {traced * 1e3:.0f} ms, medians of {len(pairs)}\n"
        f"ratio {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f}); "
        f"{len(seen)} tensors, {seen.nbytes / 1e6:.0f} MB\n"
    )


if __name__ == "__main__":
    main()
