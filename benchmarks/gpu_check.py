"""One look at a GPU in under eight minutes: is every family right on it, and how near its limits.

    make gpu-check                            on the GPU; without one, small shapes on the CPU
    python benchmarks/gpu_check.py --only families decode --out check.json

Needs what Pellucid needs and nothing else. Each part is tried alone: one that fails says so and the
others run. The result is one JSON object: the machine, and for each part its numbers, seconds and
error. Rates are shares of what this device reaches in the same run: copies of large tensors for
bandwidth, square bfloat16 products for arithmetic. Parts past the time limit (--minutes) are left
out, and named.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pellucid
from pellucid.families import read_config
from pellucid.families.shapes import shape
from pellucid.generate.compiled import CompiledSteps
from pellucid.models import Cache, Config, GPTConfig, Model, build
from pellucid.models.census import census
from pellucid.train import Batch, Schedule, TrainConfig, new_model, train
from pellucid.train.plan_report import plan_training

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from family_samples import SAMPLES  # the tiny models of the tests
from tiny import random_model, random_tokens

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
AIMS = {"decode 1b": 0.80, "decode 8b": 0.85, "train mfu": 0.55}


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], times: int) -> float:
    """Median seconds of a call, after one that warms up."""
    work()
    wait()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


@contextmanager
def fresh_memory() -> Iterator[None]:
    """Nothing of the part before is held, and the peak counts from here."""
    gc.collect()
    torch._dynamo.reset()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield


# ── The machine ─────────────────────────────────────────────────────────────────────────────────


def machine() -> dict[str, Any]:
    found = {
        "device": torch.cuda.get_device_name() if GPU else platform.processor() or "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pellucid": pellucid.__version__,
        "cuda": torch.version.cuda,
    }
    if GPU:
        found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


def limits() -> dict[str, float]:
    """Bytes/s of reading and writing large tensors, FLOP/s of bfloat16 products."""
    size = 2**30 if GPU else 2**26
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in "ab")
    copy = seconds(lambda: target.copy_(source), 10)
    side = 8192 if GPU else 1024
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=DEVICE) for _ in "ab")
    product = seconds(lambda: a @ b, 10)
    return {"bytes_per_second": 2 * size / copy, "flops": 2 * side**3 / product}


# ── Right? ──────────────────────────────────────────────────────────────────────────────────────


def families() -> dict[str, Any]:
    """Every family's tiny model in float32 here, in float64 on the CPU, with a cache and without.

    The error is that of the logits over their largest value; TF32 is off, as PyTorch has it.
    """
    errors = {}
    for name, values in SAMPLES.items():
        model = random_model(read_config(values, name), torch.float64)
        tokens = random_tokens(model.config, 2, 21)
        starts = torch.tensor([0, 5])
        with torch.no_grad():
            expected = model(tokens, starts=starts)[:, -1]
            here = deepcopy(model).float().to(DEVICE)
            whole = here(tokens.to(DEVICE), starts=starts.to(DEVICE))[:, -1]
            cache = Cache(model.config.n_layers)
            for part in (tokens[:, :9], tokens[:, 9:20], tokens[:, 20:]):
                stepped = here(part.to(DEVICE), cache=cache, starts=starts.to(DEVICE))[:, -1]
        errors[name] = max(
            float((seen.double().cpu() - expected).abs().max() / expected.abs().max())
            for seen in (whole, stepped)
        )
    worst = max(errors, key=lambda name: errors[name])
    return {
        "families": len(errors),
        "worst": worst,
        "relative_error": errors[worst],
        "wrong": sorted(name for name, error in errors.items() if not error <= 1e-4),
    }


def compiled_steps() -> dict[str, Any]:
    """The compiled step of every family against the model's own, in float32."""
    errors = {}
    for name, values in SAMPLES.items():
        torch._dynamo.reset()
        model = random_model(read_config(values, name), torch.float32).to(DEVICE)
        tokens = random_tokens(model.config, 2, 12).to(DEVICE)
        plain, fixed = Cache(model.config.n_layers), Cache(model.config.n_layers)
        with torch.no_grad():
            for cache in (plain, fixed):
                model(tokens[:, :9], cache=cache)
            steps = CompiledSteps(model, fixed, 16, backend=None if GPU else "eager")
            pairs = [
                (
                    model(column[:, None], cache=plain)[:, -1],
                    steps.step(column.tolist(), fixed, [0, 0]),
                )
                for column in tokens[:, 9:].T
            ]
        errors[name] = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    worst = max(errors, key=lambda name: errors[name])
    return {
        "worst": worst,
        "relative_error": errors[worst],
        "wrong": sorted(name for name, error in errors.items() if not error <= 1e-4),
    }


def diff_in_bfloat16() -> dict[str, Any]:
    """Two demos in bfloat16, one on each device: rounding only; with another eps: found."""
    prompt, verdicts = "The capital of France is", {}
    for name in ("demo", "demo-gpt2"):
        here = pellucid.load(name, dtype="bfloat16", device=DEVICE)
        there = pellucid.load(name, dtype="bfloat16")
        verdicts[name] = pellucid.diff(there, here, prompt=prompt).verdict
        for part in here.model.modules():
            if hasattr(part, "eps"):
                part.eps = 0.05
        verdicts[f"{name}, eps 0.05"] = pellucid.diff(there, here, prompt=prompt).verdict
    return {"verdicts": verdicts}


# ── Fast? ───────────────────────────────────────────────────────────────────────────────────────


def small(config: Config) -> Config:
    """A shape for the CPU, where this script itself is tried."""
    return replace(config, n_layers=2, vocab_size=512, width=256, hidden_width=512, n_heads=4,
                   n_kv_heads=2, head_dim=64, context_length=256)  # fmt: skip


def random_on_device(config: Config) -> Model:
    """Weights as at the start of training, in bfloat16; made where they stay."""
    with torch.device(DEVICE):
        model = build(config, "hf").to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    return model.eval()


def decoding(name: str, rows: tuple[int, ...] = (1, 8, 64)) -> dict[str, Any]:
    """Compiled steps after 128 tokens: tokens/s, and bytes of weights and cache read per second."""
    config = shape(name).config if GPU else small(shape(name).config)
    model, found = random_on_device(config), {}
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tied:
        weights -= model.embed.weight.nbytes  # one row of it is read
    for batch in rows if GPU else rows[:2]:
        torch._dynamo.reset()
        room = 192
        cache = Cache(config.n_layers)
        tokens = torch.randint(config.vocab_size, (batch, 128), device=DEVICE)
        with torch.no_grad():
            model(tokens, cache=cache)
        steps = CompiledSteps(model, cache, room, backend=None if GPU else "eager")
        chosen, starts = [1] * batch, [0] * batch
        for _ in range(3):  # compile, record, replay
            steps.step(chosen, cache, starts)
        each = seconds(partial(steps.step, chosen, cache, starts), 24)
        held = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim * room * batch
        found[f"{batch} rows"] = {
            "tokens_per_second": batch / each,
            "bytes_per_second": (weights + held) / each,
        }
    return found


def prefill() -> dict[str, Any]:
    """A prompt of 2,048 tokens of the 1B shape: tokens/s and FLOP/s."""
    config = shape("llama-3.2-1b").config if GPU else small(shape("llama-3.2-1b").config)
    length = 2048 if GPU else 128
    model = random_on_device(config)
    tokens = torch.randint(config.vocab_size, (1, length), device=DEVICE)

    @torch.no_grad()
    def run() -> Tensor:
        return model(tokens, cache=Cache(config.n_layers), last=True)

    each = seconds(run, 5)
    flops = census(config).flops(length)
    per_token = 2 * flops.matmul_parameters + flops.attention
    return {"tokens_per_second": length / each, "flops": per_token * length / each}


def training(compile: bool = GPU) -> dict[str, Any]:
    """Steps of GPT-2 124M in bfloat16: tokens/s, FLOP/s and peak memory beside the plan's."""
    context, rows, layers = (1024, 16, 12) if GPU else (64, 2, 2)
    width, vocab = (768, 50304) if GPU else (128, 512)
    config = GPTConfig(
        vocab_size=vocab, context_length=context, width=width, n_layers=layers, n_heads=width // 64
    )
    model = new_model(config, 1).to(DEVICE)
    tokens = torch.randint(vocab, (rows, context + 1))

    class Same:
        def at(self, step: int) -> Batch:
            return Batch(tokens[:, :-1], tokens[:, 1:])

    settings = TrainConfig(
        schedule=Schedule(peak=6e-4, final=6e-5, warmup=10, steps=10**6),
        batch=rows, micro_batch=rows, bfloat16=True, compile=compile, eval_every=10**6,
    )  # fmt: skip
    steps = train(model, Same(), tokens, settings)
    each = seconds(lambda: next(steps), 8 if GPU else 2)
    found = {
        "tokens_per_second": rows * context / each,
        "flops": census(config).flops(context).training * rows * context / each,
    }
    if GPU:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(pellucid.families.write_config(config, torch.float32)))
        plan = plan_training(folder, cards=1, micro_batch=rows, context=context)
    found["planned_bytes"] = plan.rows[0].kept.total
    return found


def sharded() -> dict[str, Any]:
    """A tiny run through FSDP2 on one rank, against the same run in one process: losses equal."""
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
        for name, alone in (("one", True), ("ranks", False)):
            command = (
                f"train --data {text} --out {folder}/{name} --device {DEVICE.type} --seed 1 "
                "--steps 6 --warmup 2 --batch 4 --width 64 --layers 2 --heads 2 --context 32 "
                "--vocab 300"
            )
            losses.append(_train(command, alone, Path(folder) / name))
    return {
        "losses": losses,
        "largest_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


def _train(command: str, alone: bool, out: Path) -> list[float]:
    start = ["-m", "pellucid"] if alone else ["-m", "torch.distributed.run", "--standalone",
             "--nproc-per-node", "1", "-m", "pellucid"]  # fmt: skip
    more = [] if alone else ["--parallel", "fsdp"]
    done = subprocess.run(
        [sys.executable, *start, *command.split(), *more], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"pellucid train ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        )
    with (out / "log.csv").open() as log:
        return [float(row["loss"]) for row in csv.DictReader(log)]


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "families": families,
    "compiled": compiled_steps,
    "diff": diff_in_bfloat16,
    "decode 1b": lambda: decoding("llama-3.2-1b"),
    "prefill 1b": prefill,
    "train": training,
    "sharded": sharded,
    "decode 8b": lambda: decoding("llama-3-8b"),
}


def shares(found: dict[str, Any]) -> dict[str, float]:
    """What was reached of the device's limits, by name of an aim or of a part."""
    limit, reached = found["limits"], {}
    for part in ("decode 1b", "decode 8b"):
        if "1 rows" in found.get(part, {}):
            reached[part] = found[part]["1 rows"]["bytes_per_second"] / limit["bytes_per_second"]
    for part, name in (("train", "train mfu"), ("prefill 1b", "prefill 1b")):
        if "flops" in found.get(part, {}):
            reached[name] = found[part]["flops"] / limit["flops"]
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run; default: all")
    parser.add_argument(
        "--minutes", type=float, default=8, help="begin no part after these; default: 8"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON into this file")
    asked = parser.parse_args()
    begin = time.monotonic()
    found: dict[str, Any] = {"machine": machine(), "limits": limits(), "left_out": []}
    wrong = False
    for name, part in PARTS.items():
        if asked.only and name not in asked.only:
            continue
        if time.monotonic() - begin > asked.minutes * 60:
            found["left_out"].append(name)
            continue
        began = time.monotonic()
        with fresh_memory():
            try:
                found[name] = part()
            except Exception as error:  # the next part may still tell something
                found[name] = {"error": f"{type(error).__name__}: {error}"}
        found[name]["seconds"] = round(time.monotonic() - began, 1)
        wrong |= bool(found[name].get("error") or found[name].get("wrong"))
        sys.stderr.write(f"{name}: {json.dumps(found[name])}\n")
    found["shares"], found["aims"] = shares(found), AIMS
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if asked.out:
        asked.out.write_text(text + "\n")
    return int(wrong)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
