"""Traces in a few bytes per tensor: its bits as a digest, its values as a norm and two projections.

A file of golden traces holds, for each way to run a model and each dialect and dtype, one row per
named tensor, in order. Where this machine computes like the one that made them (`fingerprint`),
the bits must be equal; elsewhere the values must be close. Only what users see is used:
`pellucid.load`, `lm.trace`, `lm.model`, `lm.generate_batch` and `pellucid.trace.trace`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import pellucid
from pellucid.trace import trace

HERE = Path(__file__).resolve().parent
MODELS, TRACES = HERE / "models", HERE / "traces"
# Every model folder whose traces are frozen; make.py says what is in them.
TRACED = (
    "gpt2",
    "gpt2-book",
    "llama-biases",
    "llama-dynamic",
    "llama-gqa",
    "llama-linear",
    "llama-llama3",
    "llama-mqa-tied",
    "llama-wide",
    "llama-yarn",
)
WHOLE = ("gpt2", "llama-gqa")  # of these every value is kept as well, in the dialect hf
DIALECTS = ("meta", "hf", "notebook")
DTYPES = ("float64", "float32", "bfloat16")
KINDS = ("plain", "cached", "padded", "padded-cached")
PROMPT = [3, 141, 59, 26, 5, 35, 89]
ROWS = [PROMPT, [97, 93, 238, 46]]
# Relative to the norm of a tensor. What rounding does elsewhere is far below the first two.
CLOSE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2 * 2.0**-8}
SLACK = 4  # a projection's error may be this much larger than the norm's
MASKED = 1e30  # the lowest finite number or infinity, whichever a dialect writes into the scores


@dataclass(frozen=True)
class Golden:
    """One run: for each named tensor its dtype, shape, bits and values."""

    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    digests: Tensor  # (N, 8) uint8
    values: Tensor  # (N, 4) float64: norm, two projections, number of masked places


def observe(lm: pellucid.LanguageModel, kind: str) -> Mapping[str, Tensor]:
    """The named tensors of a run, in order."""
    if kind == "plain":
        return lm.trace(PROMPT)
    if kind == "cached":
        return lm.trace(PROMPT, generate=2)
    if kind == "edited":
        return lm.trace(PROMPT, edit={"layers.1.attn.z": lambda z: z * 0.5})
    if kind == "gradients":
        seen = lm.trace(PROMPT, gradients=lambda logits: logits[0, -1, 7])
        kept = [name for name, tensor in seen.items() if tensor.requires_grad]
        return {name: seen.grad(name) for name in kept}
    with trace(lm.model) as seen:
        if kind == "padded":
            longest = max(map(len, ROWS))
            starts = [longest - len(row) for row in ROWS]
            rows = [[0] * start + row for start, row in zip(starts, ROWS, strict=True)]
            lm.model(torch.tensor(rows), starts=torch.tensor(starts))
        else:
            lm.generate_batch(ROWS, max_new_tokens=3, temperature=0.0, fast=False)
    return seen


def digest(tensor: Tensor) -> bytes:
    """Eight bytes that tell whether two tensors of one shape have the same bits."""
    plain = tensor.detach().cpu().contiguous().flatten()
    raw = plain.view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).digest()[:8]


def summary(tensor: Tensor) -> list[float]:
    """Norm, two projections onto fixed directions, and how many places are masked."""
    x = tensor.detach().double().flatten()
    masked = ~x.isfinite() | (x.abs() > MASKED)
    x = x.masked_fill(masked, 0.0)
    along = torch.arange(len(x), dtype=torch.float64)
    first, second = ((x * torch.cos(along * step)).sum().item() for step in (2.399963, 0.754878))
    return [x.norm().item(), first, second, float(masked.sum())]


def golden(seen: Mapping[str, Tensor]) -> Golden:
    """A run in a few bytes per tensor."""
    tensors = list(seen.values())
    return Golden(
        names=list(seen),
        shapes=[list(tensor.shape) for tensor in tensors],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
        digests=torch.tensor([list(digest(tensor)) for tensor in tensors], dtype=torch.uint8),
        values=torch.tensor([summary(tensor) for tensor in tensors], dtype=torch.float64),
    )


def write(path: Path, runs: Mapping[str, Golden]) -> None:
    """Golden runs into one file."""
    tensors, stated = {}, {}
    for name, run in runs.items():
        tensors[f"{name}/digests"], tensors[f"{name}/values"] = run.digests, run.values
        kind = name.split("/")[0]
        of_kind = {"names": run.names, "shapes": run.shapes}
        assert stated.setdefault(kind, of_kind) == of_kind, name
        stated[name] = run.dtypes
    save_file(tensors, path, metadata={"runs": json.dumps(stated)})


@cache
def read(path: Path) -> dict[str, Golden]:
    """What `write` wrote."""
    with safe_open(path, framework="pt") as file:
        stated = json.loads(file.metadata()["runs"])
        return {
            name: Golden(
                **stated[name.split("/")[0]],
                dtypes=dtypes,
                digests=file.get_tensor(f"{name}/digests"),
                values=file.get_tensor(f"{name}/values"),
            )
            for name, dtypes in stated.items()
            if "/" in name
        }


def differences(found: Golden, frozen: Golden, dtype: str, *, bits: bool) -> list[str]:
    """Where a run departs from the frozen one, in lines; names, order, shapes and dtypes first."""
    for what in ("names", "shapes", "dtypes"):
        now, then = getattr(found, what), getattr(frozen, what)
        if now != then:
            at = next((i for i in range(min(len(now), len(then))) if now[i] != then[i]), -1)
            return [f"{what} differ: {len(now)} for {len(then)}, first {now[at]} for {then[at]}"]
    wrong = []
    for i, name in enumerate(found.names):
        whole = not getattr(torch, found.dtypes[i]).is_floating_point
        same = torch.equal(found.digests[i], frozen.digests[i])
        if not same and (whole or bits):
            wrong.append(f"{name}: other bits")
        norm = frozen.values[i, 0].item()
        off = (found.values[i] - frozen.values[i]).abs().tolist()
        if off[3] or max(off[0], off[1] / SLACK, off[2] / SLACK) > CLOSE[dtype] * (norm + 1e-3):
            wrong.append(f"{name}: off by {off} of {norm}")
    return wrong


@cache
def fingerprint() -> dict[str, str]:
    """What decides the bits of this machine's results: versions, and results of such sizes."""
    random = torch.Generator().manual_seed(7)
    told = hashlib.sha256()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    sizes = ((7, 20, 24), (14, 20, 28), (7, 28, 20), (1, 20, 270), (2, 24, 20), (48, 32, 64))
    pairs = [(drawn(rows, inner), drawn(outer, inner)) for rows, inner, outer in sizes]
    q, k, v = drawn(2, 4, 7, 6), drawn(2, 4, 9, 6), drawn(2, 4, 9, 6)
    x = drawn(2, 7, 20) * 3
    weight, bias = drawn(20), drawn(20)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        y, a, b, c = (tensor.to(dtype) for tensor in (x, q, k, v))
        results = [F.linear(left.to(dtype), right.to(dtype)) for left, right in pairs]
        scores = a @ b.transpose(2, 3)
        results += [scores, scores * 6**-0.5, scores / math.sqrt(6), scores.softmax(-1)]
        results += [scores.float().softmax(-1), scores.softmax(-1) @ c]
        results += [F.scaled_dot_product_attention(a, b, c)]
        results += [y.pow(2).mean(-1), torch.rsqrt(y.pow(2).mean(-1) + 1e-5), y.mean(-1)]
        results += [F.layer_norm(y, (20,), weight.to(dtype), bias.to(dtype)), F.silu(y)]
        results += [F.gelu(y), F.gelu(y, approximate="tanh"), torch.tanh(y), y.exp(), y.pow(3.0)]
        results += [F.cross_entropy(y.flatten(0, 1), torch.arange(14))]
        for result in results:
            told.update(digest(result))
    for dtype in (torch.float64, torch.float32):
        y, angles = (
            x.to(dtype),
            torch.outer(torch.arange(20), 10000.0 ** -(x[0, 0].abs().to(dtype))),
        )
        for result in (angles, angles.cos(), angles.sin(), torch.polar(y.abs(), y).real, y.sqrt()):
            told.update(digest(result))
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "results": told.hexdigest()[:16],
    }


@cache
def same_machine() -> bool:
    """Whether bits are to be equal: the fixtures were made where arithmetic is this machine's."""
    return fingerprint() == json.loads((HERE / "machine.json").read_text())
