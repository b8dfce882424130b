"""How fast and how lean training is, against nanoGPT's model compiled, in turns in one run.

    python benchmarks/train_speed.py                        two shapes, both precisions
    python benchmarks/train_speed.py --shape 124m-full --precision bfloat16 --rounds 1   memory
    python benchmarks/train_speed.py --shape 124m --precision bfloat16 --rounds 3
    python benchmarks/train_speed.py --compile              ours with compiled blocks as well

Each trainer is a process of its own that computes only when it is asked for a step: A B A B, so
that both meet the same machine. A step is what a trainer does: forward, backward, clipping, AdamW.
Printed are, for each, the median of its steps as tokens/s, as model FLOP utilisation (MFU) against
the matrix products this machine does in the same minute, and the process' largest memory; then the
ratios to the peer. The peer is benchmarks/nanogpt_like.py, which says what it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {
    # vocabulary, context, width, layers, heads, batch, dropout
    "384": (65, 256, 384, 6, 6, 16, 0.2),
    "124m": (50304, 256, 768, 12, 12, 4, 0.0),
    "124m-full": (50304, 1024, 768, 12, 12, 12, 0.0),  # nanoGPT's own batch and context
}
GOALS = {"float32": 1.0, "bfloat16": 1.3}


def peer_step(shape: str, precision: str, device: str) -> Callable[[], None]:
    """nanoGPT's training step, its model compiled."""
    import torch
    from nanogpt_like import PeerConfig, PeerGPT, peer_optimizer

    vocab, context, width, layers, heads, batch, dropout = SHAPES[shape]
    torch.manual_seed(1)
    model: Any = PeerGPT(PeerConfig(vocab, context, width, layers, heads, dropout)).to(device)
    optimizer = peer_optimizer(model, device)
    compiled = torch.compile(model)
    tokens = torch.randint(vocab, (batch, context + 1), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def our_step(shape: str, precision: str, device: str, *, compiled: bool) -> Callable[[], None]:
    """One step of `pellucid train`."""
    import torch

    from pellucid.models import GPTConfig
    from pellucid.train import Batch, Schedule, TrainConfig, new_model, train
    from pellucid.train.precision import keep_freed_memory

    vocab, context, width, layers, heads, batch, dropout = SHAPES[shape]
    config = GPTConfig(
        vocab_size=vocab,
        context_length=context,
        width=width,
        n_layers=layers,
        n_heads=heads,
        embed_dropout=dropout,
        attn_dropout=dropout,
        resid_dropout=dropout,
    )
    keep_freed_memory()  # as pellucid train does
    model = new_model(config, 1).to(device)
    tokens = torch.randint(vocab, (batch, context + 1))

    class Same:
        def at(self, step: int) -> Batch:
            return Batch(tokens[:, :-1], tokens[:, 1:])

    many = 10**6
    settings = TrainConfig(
        schedule=Schedule(peak=6e-4, final=6e-5, warmup=10, steps=many),
        batch=batch,
        micro_batch=batch,
        bfloat16=precision == "bfloat16",
        compile=compiled,
        eval_every=many,
    )
    steps = train(model, Same(), tokens, settings)

    def step() -> None:
        next(steps)

    return step


def worker(kind: str, shape: str, precision: str, device: str) -> None:
    """Compute a step for each line on stdin; answer with its seconds and the memory so far."""
    if kind == "nanogpt":
        step = peer_step(shape, precision, device)
    else:
        step = our_step(shape, precision, device, compiled=kind == "ours-compiled")
    for line in sys.stdin:
        began = time.perf_counter()
        if line.strip() == "peak":
            answer = machine_peak(precision, device)
        else:
            step()
            answer = time.perf_counter() - began
        sys.stdout.write(json.dumps([answer, peak_memory(device)]) + "\n")
        sys.stdout.flush()


def machine_peak(precision: str, device: str) -> float:
    """FLOP/s of matrix products in this precision."""
    import torch

    from pellucid.train.utilisation import measured_peak

    return measured_peak(torch.device(device), getattr(torch, precision), size=2048, seconds=1.0)


def peak_memory(device: str) -> float:
    """Largest memory of this process so far, in MB; on a GPU the largest it allocated there."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1e3
    return float("nan")


class Worker:
    """A trainer in a process of its own."""

    def __init__(self, kind: str, shape: str, precision: str, device: str, threads: int) -> None:
        here = Path(__file__).resolve()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": f"{here.parent}:{here.parents[1]}",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(here), "--worker", kind, shape, precision, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.memory = 0.0

    def ask(self, what: str = "step") -> float:
        """Seconds of a step, or what else it is asked for."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a trainer ended early")
        answer, self.memory = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compare(asked: argparse.Namespace, shape: str, precision: str) -> list[dict[str, Any]]:
    """One shape in one precision: a row for each trainer."""
    _, context, width, layers, _, batch, _ = SHAPES[shape]
    vocab = SHAPES[shape][0]
    kinds = ["nanogpt", "ours", *(["ours-compiled"] if asked.compile else [])]
    workers = {kind: Worker(kind, shape, precision, asked.device, asked.threads) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for worker in workers.values():
        for _ in range(2):  # compiles, allocates
            worker.ask()
    peaks = []
    for _ in range(asked.rounds):
        for kind, worker in workers.items():
            seconds[kind].append(worker.ask())
    peaks = [workers["ours"].ask("peak") for _ in range(2)]
    memory = {kind: worker.memory for kind, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    weights = vocab * width + layers * 12 * width * width
    flops = (6 * weights + 12 * layers * width * context) * batch * context
    rows = []
    for kind in kinds:
        median = statistics.median(seconds[kind])
        rows.append(
            {
                "shape": shape,
                "precision": precision,
                "trainer": kind,
                "tokens_per_second": batch * context / median,
                "mfu": flops / median / max(peaks),
                "memory_mb": memory[kind],
                "speed_ratio": statistics.median(seconds["nanogpt"]) / median,
                "memory_ratio": memory[kind] / memory["nanogpt"],
                "seconds": seconds[kind],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=(*SHAPES, "all"), default="all")
    parser.add_argument("--precision", choices=(*GOALS, "all"), default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="ours with compiled blocks too")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(*asked.worker)
        return
    shapes = ["384", "124m"] if asked.shape == "all" else [asked.shape]
    precisions = list(GOALS) if asked.precision == "all" else [asked.precision]
    sys.stdout.write(
        f"{'shape':<10}{'precision':<10}{'trainer':<15}{'tokens/s':>9}{'MFU':>6}{'MB':>8}"
        f"{'speed':>7}{'memory':>8}\n"
    )
    rows = []
    for shape in shapes:
        for precision in precisions:
            for row in compare(asked, shape, precision):
                rows.append(row)
                sys.stdout.write(
                    f"{shape:<10}{precision:<10}{row['trainer']:<15}"
                    f"{row['tokens_per_second']:>9,.0f}{row['mfu']:>6.0%}{row['memory_mb']:>8,.0f}"
                    f"{row['speed_ratio']:>7.2f}{row['memory_ratio']:>8.2f}\n"
                )
                sys.stdout.flush()
    if asked.json:
        machine = {"processor": platform.processor(), "threads": asked.threads}
        asked.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
