"""This tree against another checkout of Pellucid, in turns in one run: what became slower?

    git worktree add /tmp/before a847fd2
    python benchmarks/versions.py /tmp/before
    python benchmarks/versions.py /tmp/before --only decode,train --rounds 20 --json FILE

Each version is a process of its own that computes only when it is asked, A B and then B A, so that
both meet the same machine. Printed are the median milliseconds of both; the ratio `before / now`,
the median of all pairs and that of the quickest runs, since other work only ever adds time; and
the least and the largest ratio of a pair. Above 1 this tree is faster. Given this tree as the other
checkout it says how far two runs of the same code lie apart, which is what a ratio is to be read
against: on two shared cores 0.3 to 2.7 of a pair, 0.96 to 0.98 of the medians.

    decode      32 tokens of the C decoder after a prompt of 16
    plain       4 decoding steps in PyTorch
    prefill     a prompt of 512 tokens and the first token
    trace       a prompt of 128 tokens, every name recorded
    step        a step of the C decoder that writes down what it computes
    train       a training step of GPT-2's 124M shape, 4 windows of 256 tokens
    help        `pellucid --help`, the whole process
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pellucid.bench.crew import Worker
from pellucid.bench.machine import describe
from pellucid.bench.worker import answer
from pellucid.system import cores

Work = Callable[[], Any]
HERE = Path(__file__).resolve()
MODELS = ("gpt2-124m", "stories15m")
DTYPES = ("float32", "bfloat16")
ON_MODELS = ("decode", "plain", "prefill", "trace", "step")
CASES = [
    *(f"{what} {model} {dtype}" for what in ON_MODELS for model in MODELS for dtype in DTYPES),
    *(f"train 124m {dtype}" for dtype in DTYPES),
    "help",
]  # fmt: skip


class Timed:
    """The commands of a worker: one case, timed each time it is asked for."""

    def __init__(self, case: str, folder: Path, threads: int) -> None:
        what, _, rest = case.partition(" ")
        if what == "help":
            command = [sys.executable, "-m", "pellucid", "--help"]
            self._work: Work = lambda: subprocess.run(command, check=True, capture_output=True)
            return
        import torch

        torch.set_num_threads(threads)
        model, dtype = rest.split()
        if what == "train":
            from train_speed import our_step

            self._work = our_step(model, dtype, "cpu", compiled=False)
            return
        from pellucid import checkpoints

        loaded = checkpoints.load_model(
            checkpoints.open_checkpoint(folder / model), dtype=getattr(torch, dtype)
        )
        self._work = {
            "decode": lambda: generation(loaded, prompt=16, steps=32, fast=True),
            "plain": lambda: generation(loaded, prompt=16, steps=4, fast=False),
            "prefill": lambda: generation(loaded, prompt=limit(loaded, 512), steps=1, fast=True),
            "trace": lambda: traced(loaded, 128),
            "step": recorded_steps(loaded),
        }[what]

    def run(self) -> dict[str, Any]:
        """Once through; its milliseconds."""
        start = time.perf_counter()
        self._work()
        return {"ms": 1e3 * (time.perf_counter() - start)}

    def close(self) -> dict[str, Any]:
        """Nothing is held but memory."""
        return {}


def limit(model: Any, tokens: int) -> int:
    """So many tokens, or fewer where the context is shorter."""
    return min(tokens, model.config.context_length - 1)


def generation(model: Any, *, prompt: int, steps: int, fast: bool) -> None:
    """Greedy tokens after a prompt of the ids 100, 101 …"""
    from pellucid.generate import Sampling, generate_tokens

    rows = [list(range(100, 100 + prompt))]
    sampling = Sampling(temperature=0.0)
    for _ in generate_tokens(model, rows, sampling=sampling, max_new_tokens=steps, fast=fast):
        pass


def traced(model: Any, tokens: int) -> None:
    """A forward pass with every name recorded."""
    import torch

    from pellucid.trace import trace

    with torch.no_grad(), trace(model, fused=False):
        model(torch.arange(100, 100 + tokens)[None])


def recorded_steps(model: Any) -> Work:
    """Eight steps of the C decoder at the end of a prompt of 64, each with a recording."""
    import torch

    from pellucid.generate.fast import FastSteps
    from pellucid.generate.native import Recording
    from pellucid.models import Cache

    cache = Cache(model.config.n_layers)
    with torch.no_grad():
        model(torch.arange(100, 164)[None], cache=cache)
    steps = FastSteps(model, 80, wanted=True)

    def work() -> None:
        for _ in range(8):
            cache.crop(64)
            recording = Recording()
            steps.step([[7]], cache, [0], recording)
            recording.named()

    return work


def write_models(folder: Path) -> None:
    """A folder of random weights for each model, which both versions load."""
    import torch

    from pellucid import checkpoints
    from pellucid.bench.shapes import SHAPES, RandomWeights

    for model in MODELS:
        config = SHAPES[model]
        checkpoints.save(folder / model, config, RandomWeights(config), dtype=torch.float32)


def worker(checkout: Path, case: str, folder: Path, threads: int) -> Worker:
    """The case in a process that imports Pellucid from `checkout`."""
    command = ["env", f"PYTHONPATH={checkout}:{HERE.parent}", sys.executable, str(HERE), "x"]
    command += ["--serve", case, "--folder", str(folder), "--threads", str(threads)]
    return Worker(f"{checkout} {case}", command, threads)


def compare(before: Path, case: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Pairs of both versions; the first two warm up."""
    checkouts = {"before": before, "now": HERE.parents[1]}
    workers = {name: worker(c, case, folder, asked.threads) for name, c in checkouts.items()}
    pairs = []
    for number in range(asked.rounds + 2):
        order = ("before", "now") if number % 2 else ("now", "before")
        pairs.append({name: workers[name].ask("run")["ms"] for name in order})
    for one in workers.values():
        one.close()
    ratios = sorted(pair["before"] / pair["now"] for pair in pairs[2:])
    medians = {name: statistics.median(pair[name] for pair in pairs[2:]) for name in checkouts}
    quickest = {name: min(pair[name] for pair in pairs[2:]) for name in checkouts}
    return {
        "case": case,
        "before_ms": medians["before"],
        "now_ms": medians["now"],
        "ratio": statistics.median(ratios),
        "ratio_of_quickest": quickest["before"] / quickest["now"],
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="a checkout of the other version")
    parser.add_argument("--only", help="cases that begin with one of these words, by commas")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        answer(lambda: Timed(asked.serve, asked.folder, asked.threads))
        return
    prefixes = tuple((asked.only or "").split(","))
    rows = []
    sys.stdout.write(
        f"{'case':<30}{'before ms':>11}{'now ms':>10}{'ratio':>8}{'quickest':>10}  pairs from, to\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for case in (case for case in CASES if case.startswith(prefixes)):
            row = compare(asked.before.resolve(), case, Path(folder), asked)
            rows.append(row)
            sys.stdout.write(
                f"{case:<30}{row['before_ms']:>11.1f}{row['now_ms']:>10.1f}{row['ratio']:>8.3f}"
                f"{row['ratio_of_quickest']:>10.3f}"
                f"  {row['ratio_min']:.2f} to {row['ratio_max']:.2f}\n"
            )
            sys.stdout.flush()
    if asked.json:
        machine = describe() | {"threads": asked.threads}
        asked.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
