"""int8, int6 and int4 beside llama.cpp's types: bits, KL, perplexity, top 1 and tokens a second.

    PYTHONPATH=.:WHERE_LLAMA_CPP_IS python benchmarks/quantised_peers.py [MODEL …] [--out FILE]

Predictions: the weights of every format in float32 passes of the same code, over the same tokens
of English (smollm2) or Python (the demos), which nothing was fitted to. Speed: each folder's or
file's own engine, one token at a time, all in turns; told is the median over the rounds of
tokens/s over Q4_0's in the same round. Bits count everything that is stored of the matrices.

smollm2's shipped file is in Q4_1 itself, and a format with a minimum would find its levels again.
So its columns and channels are rescaled first, which leaves its function as it was and its weights
on no levels.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import inspect
import json
import platform
import statistics
import sys
import tempfile
import time
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pellucid
from pellucid import checkpoints
from pellucid.bench.engines import llama_cpp, ours
from pellucid.evaluate.quantise import quantise_by_inputs
from pellucid.models import Model
from pellucid.models.quantised import Format, QuantisedMatrix, quantise

WINDOW = 512
_QUIET: list[Any] = []  # the callback: the library keeps a pointer to it
OURS = {
    "int4": Format(bits=4),
    "int6": Format(bits=6),
    "int6 as small as q4_k_m": Format(
        bits=6, group=128, head_bits=6
    ),  # of columns that are no 256s
    "int8": Format(bits=8),
    "int4 before, groups of 64": Format(bits=4, group=64),
}
PEERS = ("q4_k_m", "q4_0", "q5_k_m", "q6_k", "q8_0")
FITTED_TO = ("argparse", "typing", "inspect", "subprocess", "logging", "tarfile", "datetime")
MEASURED_ON = ("asyncio.events", "decimal", "statistics", "ipaddress", "difflib", "optparse")


def text_of(modules: tuple[str, ...], code: bool) -> str:
    """Source of modules of the standard library, or their documentation alone."""
    found = [importlib.import_module(name) for name in modules]
    if code:
        return "\n".join(map(inspect.getsource, found))
    documented = [
        each for module in found for each in (module, *vars(module).values())
        if callable(each) or inspect.ismodule(each) or inspect.isclass(each)
    ]  # fmt: skip
    return "\n\n".join(dict.fromkeys(inspect.getdoc(each) or "" for each in documented))


@torch.no_grad()
def rescale(model: Model) -> None:
    """Factors between matrices and before them that cancel: the function stays, the levels go."""
    generator, config = torch.Generator().manual_seed(0), model.config

    def factors(count: int) -> Tensor:
        return torch.rand(count, generator=generator) * 0.5 + 0.75

    for layer in model.layers:
        attn, mlp = layer.attn, layer.mlp
        for norm, after in (
            (layer.attn_norm, (attn.q_proj, attn.k_proj, attn.v_proj)),
            (layer.mlp_norm, (mlp.gate_proj, mlp.up_proj)),
        ):
            some = factors(config.width)
            norm.weight /= some
            for matrix in after:
                matrix.weight *= some
        some = factors(config.n_kv_heads * config.head_dim)
        attn.v_proj.weight *= some[:, None]
        heads = some.view(config.n_kv_heads, 1, config.head_dim)
        heads = heads.expand(-1, config.n_heads // config.n_kv_heads, -1)
        attn.o_proj.weight /= heads.reshape(-1)
        some = factors(config.hidden_width)
        mlp.up_proj.weight *= some[:, None]
        mlp.down_proj.weight /= some


class Reference:
    """What the original predicts of `tokens` (N, T + 1)."""

    def __init__(self, model: Model, tokens: Tensor) -> None:
        self.tokens = tokens
        self.logits = self._logits(model)
        self.perplexity = self._perplexity(self.logits)

    @torch.no_grad()
    def _logits(self, model: Model) -> Tensor:
        return torch.cat([model(row[None, :-1])[0] for row in self.tokens])

    def _perplexity(self, logits: Tensor) -> float:
        return float(F.cross_entropy(logits, self.tokens[:, 1:].flatten()).exp())

    def cost(self, model: Model) -> dict[str, float]:
        """KL in nats a token, perplexity and top-1 agreement of another model."""
        found, kl = self._logits(model), 0.0
        for a, b in zip(self.logits.split(128), found.split(128), strict=True):
            p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
        same = (self.logits.argmax(-1) == found.argmax(-1)).double().mean()
        after = self._perplexity(found)
        return {
            "kl": kl / len(found), "perplexity": after,
            "perplexity_grown": after / self.perplexity - 1, "top1": float(same),
        }  # fmt: skip


def our_bits(model: Model) -> dict[str, float]:
    """Bits of a weight in the blocks, and with the head."""
    sizes = {
        path: (8 * sum(b.nbytes for b in m.buffers()), m.rows * m.columns)
        for path, m in model.named_modules() if isinstance(m, QuantisedMatrix)
    }  # fmt: skip
    return _bits(sizes)


def gguf_bits(path: Path) -> dict[str, float]:
    """The same of a GGUF file."""
    header = checkpoints.open_checkpoint(path).weights.file.header
    return _bits({
        name.replace("blk.", "layers."): (8 * each.nbytes, torch.Size(each.shape).numel())
        for name, each in header.tensors.items() if len(each.shape) == 2 and "pos" not in name
    })  # fmt: skip


def _bits(sizes: dict[str, tuple[int, int]]) -> dict[str, float]:
    blocks = [both for name, both in sizes.items() if name.startswith("layers.")]
    return {
        name: sum(bits for bits, _ in some) / sum(count for _, count in some)
        for name, some in (("bits_of_blocks", blocks), ("bits", list(sizes.values())))
    }


def speeds(runners: dict[str, Any], base: str, rounds: int, room: int) -> dict[str, float]:
    """Tokens/s over those of `base`, the median of rounds in turns; `room`: of the context."""
    tokens = min(16, room // (rounds + 2))
    for runner in runners.values():
        runner.prepare()
        runner.settle()
        runner.prefill([[1, 2, 3, 4]], rounds * tokens + tokens)
        runner.decode(tokens)
    ratios: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        seconds = {}
        for name, runner in runners.items():
            begin = time.perf_counter()
            runner.decode(tokens)
            seconds[name] = time.perf_counter() - begin
        for name, taken in seconds.items():
            ratios[name].append(seconds[base] / taken)
    return {name: statistics.median(each) for name, each in ratios.items()}


def be_quiet() -> None:
    """llama.cpp writes what it does to stderr."""
    library = importlib.import_module("llama_cpp")
    _QUIET.append(library.llama_log_callback(lambda level, text, data: None))
    library.llama_log_set(_QUIET[0], ctypes.c_void_p(0))


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def wanted(title: str, asked: argparse.Namespace) -> bool:
    return any(fnmatch(title, glob) for glob in asked.formats)


def measure(name: str, asked: argparse.Namespace, home: Path) -> dict[str, Any]:
    """The formats asked for of one model."""
    lm, code = pellucid.load(name, dtype="float32"), name != "smollm2"
    if not code:
        rescale(lm.model)
    texts = (text_of(modules, code) for modules in (MEASURED_ON, FITTED_TO))
    measured, fitted = (torch.tensor(lm.encode(text)) for text in texts)
    context = min(WINDOW, lm.config.context_length)
    tokens = measured[: asked.tokens // context * context + 1].unfold(0, context + 1, context)
    windows = fitted[: 4096 // context * context].view(-1, context)
    reference = Reference(lm.model, tokens)
    rows: dict[str, Any] = {}
    runners: dict[str, Any] = {}
    source = home / f"{name}.gguf"
    checkpoints.save(home / f"{name}-f32", lm.config, dict(lm.model.state_dict()),
                     tokenizer_from=checkpoints.open_checkpoint(name).folder)  # fmt: skip
    checkpoints.convert(home / f"{name}-f32", source, "gguf")
    for kind in (kind for kind in PEERS if wanted(f"llama.cpp {kind}", asked)):
        path = home / f"{name}-{kind}.gguf"
        llama_cpp.quantise(source, path, kind)
        model = checkpoints.load_model(checkpoints.open_checkpoint(path), torch.float32)
        rows[f"llama.cpp {kind}"] = gguf_bits(path) | reference.cost(model)
        runners[f"llama.cpp {kind}"] = llama_cpp.Runner(path, torch.get_num_threads())
        say(name, kind, rows[f"llama.cpp {kind}"])
    for label, how in OURS.items():
        for fitted_too in (False, True):
            if fitted_too and not how.offsets:
                continue
            title = label + (", fitted to a text" if fitted_too else "")
            if not wanted(title, asked):
                continue
            model = deepcopy(lm.model)
            quantise_by_inputs(model, how, windows) if fitted_too else quantise(model, how)
            rows[title] = our_bits(model) | reference.cost(model)
            say(name, title, rows[title])
            if not fitted_too:  # the same kernels
                folder = home / f"{name}-{label}"
                model.to(torch.bfloat16)
                checkpoints.save_quantised(folder, model, how)
                runners[title] = ours.Runner(
                    folder, torch.get_num_threads(), f"int{how.bits}", True
                )
    if asked.rounds:
        room = lm.config.context_length
        for title, ratio in speeds(runners, "llama.cpp q4_0", asked.rounds, room).items():
            rows[title]["speed_over_q4_0"] = ratio
    return {"tokens": tokens[:, 1:].numel(), "perplexity": reference.perplexity, "formats": rows}


def table(found: dict[str, Any]) -> str:
    """The rows of one model in Markdown, finest first."""
    lines = [
        "| | bits, blocks | bits, all | KL | perplexity | top 1 | speed / q4_0 |",
        "|---" * 7 + "|",
    ]
    for title, row in sorted(found["formats"].items(), key=lambda one: -one[1]["bits"]):
        speed = f"{row['speed_over_q4_0']:.2f}" if "speed_over_q4_0" in row else ""
        lines.append(
            f"| {title} | {row['bits_of_blocks']:.2f} | {row['bits']:.2f} | {row['kl']:.4f} | "
            f"{row['perplexity_grown']:+.1%} | {row['top1']:.1%} | {speed} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["demo", "demo-gpt2", "smollm2"])
    parser.add_argument("--rounds", type=int, default=7, help="0: no speeds")
    parser.add_argument("--tokens", type=int, default=2048, help="predicted")
    parser.add_argument("--formats", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    be_quiet()
    with tempfile.TemporaryDirectory() as home:
        for name in asked.models:
            found[name] = measure(name, asked, Path(home))
            say(table(found[name]))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
