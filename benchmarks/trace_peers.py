"""What a full trace costs, side by side with the tools people use for it, in turns.

    python benchmarks/trace_peers.py
    python benchmarks/trace_peers.py --tl-python TL/bin/python --nnsight-python NN/bin/python
    python benchmarks/trace_peers.py --rounds 20 --json benchmarks/results/trace.json

GPT-2's 124M shape with random weights and one prompt of 128 tokens. Each side is a process of its
own; in every round each side runs its own plain pass and its traced pass, in alternating order.

    pellucid           every name, attention in named steps      plain: the fused pass
    pellucid fused     every name but scores and patterns        plain: the fused pass
    pellucid decode    every name of a decoding step             plain: the step without a trace
    pellucid fast      the same step of the C decoder            plain: its step, nothing written
    hooks              outputs of all modules of transformers    plain: its pass with SDPA
    hooks, clones      the same, each tensor copied
    transformer_lens   TransformerBridge.run_with_cache          plain: the bridge's own pass
    nnsight            tracer.cache() of all modules             plain: transformers' pass with SDPA

Printed are milliseconds, the ratio of each pair (median, least, largest), the tensors recorded, and
the memory they hold: bytes of their distinct storages, so that views are not counted twice.
TransformerLens and nnsight may live in environments of their own; without them their rows are
missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pellucid.bench.crew import Worker, WorkerError
from pellucid.bench.machine import describe
from pellucid.bench.worker import answer
from pellucid.system import cores

Pass = Callable[[], Any]


# ── The sides, each in a process of its own ──────────────────────────────────────────────────────


class Side:
    """A plain pass and a traced pass over the same tokens; `traced` returns what it recorded."""

    def __init__(self, folder: Path, tokens: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch, self.folder = torch, folder
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(50257, (1, tokens), generator=generator)
        self.begin()
        self.passes = {"plain": self.plain, "traced": self.traced}

    def begin(self) -> None:
        """Load the model."""
        raise NotImplementedError

    def plain(self) -> Any:
        """A pass without recording."""
        raise NotImplementedError

    def traced(self) -> Any:
        """A pass that records; what it recorded."""
        raise NotImplementedError

    def pair(self, first: str) -> dict[str, Any]:
        """Milliseconds of both passes, the one called `first` before the other."""
        second = "traced" if first == "plain" else "plain"
        taken, recorded = {}, None
        with self.torch.no_grad():
            for name in (first, second):
                start = time.perf_counter()
                result = self.passes[name]()
                taken[name] = 1e3 * (time.perf_counter() - start)
                recorded = result if name == "traced" else recorded
                del result
        tensors = list(_tensors(self.torch, recorded))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return {**taken, "tensors": len(tensors), "bytes": sum(storages.values())}

    def close(self) -> dict[str, Any]:
        """Nothing is held but memory."""
        return {}


def _tensors(torch: Any, value: Any) -> Iterator[Any]:
    """All tensors in a nest of mappings, sequences and dataclasses of transformers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(torch, inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(torch, inner)


class Pellucid(Side):
    """Every name of names.py."""

    fused = False

    def begin(self) -> None:
        from pellucid import checkpoints

        self.model = checkpoints.load_model(checkpoints.open_checkpoint(self.folder))

    def plain(self) -> Any:
        return self.model(self.tokens)

    def traced(self) -> Any:
        from pellucid.trace import trace

        with trace(self.model, fused=self.fused) as seen:
            self.model(self.tokens)
        return dict(seen)


class PellucidFused(Pellucid):
    """Every name that the fused attention has."""

    fused = True


class PellucidDecode(Pellucid):
    """One decoding step after the prompt, with the KV cache."""

    def plain(self) -> Any:
        return self.model(self.tokens[:, :1], cache=self._cache(), last=True)

    def traced(self) -> Any:
        from pellucid.trace import trace

        cache = self._cache()
        with trace(self.model) as seen:
            self.model(self.tokens[:, :1], cache=cache, last=True)
        return dict(seen)

    def begin(self) -> None:
        from pellucid.models import Cache

        super().begin()
        self._held = Cache(self.model.config.n_layers)
        with self.torch.no_grad():
            self.model(self.tokens, cache=self._held)

    def _cache(self) -> Any:
        """The cache after the prompt: what a step appended is forgotten."""
        self._held.crop(self.tokens.shape[1])
        return self._held


class PellucidFastDecode(PellucidDecode):
    """One decoding step of the C decoder, which writes down what it computes where asked."""

    def begin(self) -> None:
        from pellucid.generate.fast import FastSteps

        super().begin()
        self._steps = FastSteps(self.model, self.tokens.shape[1] + 8, wanted=True)
        self._token = self.tokens[0, :1].tolist()

    def plain(self) -> Any:
        return self._steps.step([self._token], self._cache(), [0])

    def traced(self) -> Any:
        from pellucid.generate.native import Recording

        recording = Recording()
        logits = self._steps.step([self._token], self._cache(), [0], recording)
        return {**recording.named(), "logits": logits}


class Hooks(Side):
    """Forward hooks on every module of transformers' model."""

    clone = False

    def begin(self) -> None:
        library: Any = import_module("transformers")
        self.model = library.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.torch.float32, attn_implementation="sdpa"
        ).eval()

    def plain(self) -> Any:
        return self.model(self.tokens, use_cache=False).logits

    def traced(self) -> Any:
        seen: dict[str, Any] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                tensors = list(_tensors(self.torch, output))
                seen[name] = [t.clone() for t in tensors] if self.clone else tensors

            return hook

        handles = [m.register_forward_hook(keep(name)) for name, m in self.model.named_modules()]
        self.model(self.tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen


class HooksCloned(Hooks):
    """The same, each tensor copied, as one does where later steps may write in place."""

    clone = True


class TransformerLens(Side):
    """The bridge's run_with_cache over transformers' own modules."""

    def begin(self) -> None:
        library: Any = import_module("transformers")
        bridge: Any = import_module("transformer_lens.model_bridge")
        model = library.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.torch.float32
        ).eval()
        model.config.architectures = [type(model).__name__]
        self.model = bridge.TransformerBridge.boot_transformers(
            str(self.folder), hf_model=model, device="cpu"
        )

    def plain(self) -> Any:
        return self.model(self.tokens)

    def traced(self) -> Any:
        return dict(self.model.run_with_cache(self.tokens)[1].items())


class NNsight(Hooks):
    """A cache of the outputs of all modules."""

    def begin(self) -> None:
        super().begin()
        self.wrapped = import_module("nnsight").NNsight(self.model)

    def traced(self) -> Any:
        with self.wrapped.trace(self.tokens, use_cache=False) as tracer:
            cache = tracer.cache()
        return {name: cache[name].output for name in cache.keys()}  # noqa: SIM118  not a dict


SIDES: dict[str, tuple[type[Side], str]] = {
    "pellucid": (Pellucid, "torch"),
    "pellucid fused": (PellucidFused, "torch"),
    "pellucid decode": (PellucidDecode, "torch"),
    "pellucid fast": (PellucidFastDecode, "torch"),
    "hooks": (Hooks, "transformers"),
    "hooks, clones": (HooksCloned, "transformers"),
    "transformer_lens": (TransformerLens, "transformer_lens"),
    "nnsight": (NNsight, "nnsight"),
}


# ── The turns ────────────────────────────────────────────────────────────────────────────────────


def write_model(folder: Path) -> None:
    """GPT-2 124M with random weights, and the smallest tokenizer that TransformerLens accepts."""
    import torch

    from pellucid import checkpoints
    from pellucid.bench.shapes import SHAPES, RandomWeights

    config = SHAPES["gpt2-124m"]
    checkpoints.save(folder, config, RandomWeights(config), dtype=torch.float32)
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    words |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    words |= dict.fromkeys(("post_processor", "decoder")) | {"added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    specials = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "a")
    specials["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))


def start(arguments: argparse.Namespace, folder: Path) -> Iterator[Worker]:
    """A worker for each side; those that do not start say why."""
    pythons = {"transformer_lens": arguments.tl_python, "nnsight": arguments.nnsight_python}
    for name, (_, package) in SIDES.items():
        python = pythons.get(package) or sys.executable
        command = [python, __file__, "--serve", name, "--folder", str(folder)]
        command += ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
        try:
            yield Worker(name, command, arguments.threads)
        except WorkerError as error:
            sys.stdout.write(f"left out: {error}\n")


def measure(workers: list[Worker], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Pairs of every side, round after round; the first two rounds warm up."""
    pairs: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for number in range(rounds + 2):
        for worker in workers:
            reply = worker.ask("pair", first=("plain", "traced")[number % 2])
            if number >= 2:
                pairs[worker.name].append(reply)
    return pairs


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a side's pairs."""
    ratios = sorted(pair["traced"] / pair["plain"] for pair in pairs)
    return {
        "plain_ms": statistics.median(pair["plain"] for pair in pairs),
        "traced_ms": statistics.median(pair["traced"] for pair in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "tensors": pairs[0]["tensors"],
        "bytes": pairs[0]["bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--tl-python", help="an interpreter with transformer-lens")
    parser.add_argument("--nnsight-python", help="an interpreter with nnsight and transformers")
    parser.add_argument("--json", type=Path, help="write the pairs and the machine here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        side = SIDES[arguments.serve][0]
        answer(lambda: side(arguments.folder, arguments.tokens, arguments.threads))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "gpt2-124m"
        write_model(folder)
        workers = list(start(arguments, folder))
        try:
            pairs = measure(workers, arguments.rounds)
        finally:
            for worker in workers:
                worker.close()
    table = {name: summary(taken) for name, taken in pairs.items()}
    for name, row in table.items():
        sys.stdout.write(
            f"{name:<18} plain {row['plain_ms']:7.1f} ms  traced {row['traced_ms']:7.1f} ms  "
            f"ratio {row['ratio']:.3f} ({row['ratio_min']:.2f} … {row['ratio_max']:.2f})  "
            f"{row['tensors']:4} tensors  {row['bytes'] / 2**20:6.1f} MiB\n"
        )
    if arguments.json:
        document = {"machine": describe(), "threads": arguments.threads, "tokens": arguments.tokens}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document | {"sides": table, "pairs": pairs}, indent=1))


if __name__ == "__main__":
    main()
