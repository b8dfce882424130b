"""What a full trace costs: every name, against the plain fused pass.

    python benchmarks/trace_cost.py [--shape gpt2] [--tokens 128] [--rounds 12] [--threads 1]
    python benchmarks/trace_cost.py --decode 32     decoding steps with the KV cache, after a prompt
    python benchmarks/trace_cost.py --clock cpu     the process's own time: for a busy machine

Random weights of the named shape, in turns in one process (plain, traced, plain, traced …); printed
are the median times, the ratio of each pair, and what the trace holds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from pellucid.families.shapes import shape
from pellucid.models import Cache, Model, build, initialise
from pellucid.trace import Trace, set_step, trace

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@torch.no_grad()
def seconds(
    model: Model, tokens: torch.Tensor, decode: int, traced: bool, clock: Callable[[], float]
) -> tuple[float, Trace | None]:
    """Time of one pass over `tokens` (1, T), or of each of so many decoding steps after it."""
    cache = Cache(model.config.n_layers) if decode else None
    with trace(model) if traced else nullcontext() as seen:
        start = clock()
        model(tokens, cache=cache, last=cache is not None)
        if not decode:
            return clock() - start, seen
        start = clock()
        for step in range(1, decode + 1):
            set_step(step)
            model(tokens[:, step : step + 1], cache=cache, last=True)
        return (clock() - start) / decode, seen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="gpt2", help="a name of pellucid.families.shapes")
    parser.add_argument("--dialect", default="hf")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--decode", type=int, default=0, metavar="STEPS")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = shape(arguments.shape).config
    model = build(config, arguments.dialect).eval()
    initialise(model, torch.Generator().manual_seed(0))
    model.to(getattr(torch, arguments.dtype))
    tokens = torch.randint(config.vocab_size, (1, arguments.tokens))
    clock, pairs, seen = CLOCKS[arguments.clock], [], None
    for turn in range(arguments.rounds + 1):
        plain, _ = seconds(model, tokens, arguments.decode, False, clock)
        traced, seen = seconds(model, tokens, arguments.decode, True, clock)
        if turn >= 1:  # the first warms up
            pairs.append((plain, traced))
    plain, traced = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    assert seen is not None, "the last run was traced"
    sys.stdout.write(
        f"plain {plain * 1e3:.1f} ms, traced {traced * 1e3:.1f} ms, medians of {len(pairs)}\n"
        f"ratio {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f}); "
        f"{len(seen)} tensors, {seen.nbytes / 1e6:.0f} MB\n"
    )


if __name__ == "__main__":
    main()
