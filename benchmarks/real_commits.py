"""Eight public fixes: the tree before and the tree after, each held against Pellucid's own model.

    python benchmarks/real_commits.py FOLDER            all, or --only NAME …
    python benchmarks/real_commits.py FOLDER --json

FOLDER holds a checkout of the tree before and after each fix, FOLDER/NAME/before and
FOLDER/NAME/after; NAME and the commit stand in CASES. Nothing is fetched, and none of their code
is here: a case builds one of their models at a tiny size, loads random weights into it with their
own converter, and calls ``pellucid.diff(ours, theirs, tokens)`` as a user would. Each side of a fix
runs in a process of its own. What the packages import beside torch must be on PYTHONPATH
(litgpt: lightning; TransformerLens: transformers, einops, jaxtyping, fancy_einsum, better_abc;
mlx-lm: mlx with its CPU build). datasets and torchao, which no forward pass here needs, are empty
stand-ins.

Printed are the verdict, the first divergence and the cause, before and after. Right means: before
the fix the expected name and cause, after it no divergence. docs/diff-real.md shows the table and
what is to be said about it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import json
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pellucid
from pellucid import checkpoints
from pellucid.families.config import read_config
from pellucid.models import Config, Model, build

LENGTH = 48  # tokens
GELU = "gelu_pytorch_tanh"
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


@dataclass(frozen=True)
class Case:
    """A fix: which repository and commit, how its models are run, what is to be found before it."""

    repository: str
    commit: str
    first: str  # of the divergence
    cause: str
    run: Callable[[Path], Any]  # of a checkout: a report


def model_of(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Model:
    """Random weights in a model of this config, norms away from 1 and matrices of some size."""
    config = read_config({**SIZES, **values}, "config")
    model = build(config).to(dtype).eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, x in model.named_parameters():
            size = 1.0 if name.startswith("embed") else (x.shape[-1] ** -0.5 if x.ndim > 1 else 0.2)
            x.copy_(torch.randn(x.shape, generator=random) * size + (0.9 if x.ndim == 1 else 0.0))
    return model


def hf_weights(model: Model) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names, as its folder has them."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(Path(folder) / "model", model.config, model.state_dict())
        weights = load_file(Path(folder) / "model" / "model.safetensors")
    return {name: x.clone() for name, x in weights.items()}


def tokens() -> list[int]:
    """The prompt of every case."""
    random = torch.Generator().manual_seed(5)
    return torch.randint(SIZES["vocab_size"], (LENGTH,), generator=random).tolist()


def package(name: str, folder: Path) -> None:
    """Make a package importable by its parts, without running what its own __init__ imports."""
    made = types.ModuleType(name)
    made.__path__ = [str(folder)]
    sys.modules[name] = made


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that are imported for other purposes than a forward pass: names without contents."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__version__ = "0.12.0"

        def named(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name[0].isupper():
                return type(name, (), {})
            return lambda *given, **named: lambda function: function  # maybe a decorator

        module.__getattr__ = named
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def notebook(path: Path, names: dict[str, Any]) -> dict[str, Any]:
    """The classes, functions, configs and torch imports of a notebook's cells, as its namespace."""
    kept = (ast.FunctionDef, ast.ClassDef)
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        try:
            tree = ast.parse("".join(cell["source"]) if cell["cell_type"] == "code" else "")
        except SyntaxError:  # a shell command
            continue
        for node in tree.body:
            torch_only = isinstance(node, ast.Import) and all(
                alias.name.split(".")[0] == "torch" for alias in node.names
            )
            config = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()
            if isinstance(node, kept) or torch_only or config:
                exec(compile(ast.Module([node], []), str(path), "exec"), names)
    return names


# ── The cases ────────────────────────────────────────────────────────────────────────────────────


def rope_pairing(tree: Path) -> Any:
    """Meta's Llama 2 weights, neighbours as pairs, in a model that turns halves."""
    ours = model_of({"model_type": "llama", "num_key_value_heads": 4, "rope_theta": 10000.0,
                     "rms_norm_eps": 1e-5})  # fmt: skip
    theirs = notebook(tree / "ch05/07_gpt_to_llama/converting-gpt-to-llama2.ipynb", {})
    shape = {
        "vocab_size": SIZES["vocab_size"],
        "context_length": SIZES["max_position_embeddings"],
        "emb_dim": SIZES["hidden_size"],
        "n_heads": SIZES["num_attention_heads"],
        "n_layers": SIZES["num_hidden_layers"],
        "hidden_dim": SIZES["intermediate_size"],
        "dtype": torch.float32,
    }
    theirs["LLAMA2_CONFIG_7B"] = shape
    module = theirs["Llama2Model"](shape)
    theirs["load_weights_into_llama"](module, shape, meta_weights(ours))
    return pellucid.diff(ours, module, tokens())


def meta_weights(model: Model) -> dict[str, Tensor]:
    """The model's weights as Meta's files have them: neighbours as the pairs of q and k."""
    with tempfile.TemporaryDirectory() as folder:
        hf, meta = Path(folder) / "hf", Path(folder) / "meta"
        checkpoints.save(hf, model.config, model.state_dict())
        pellucid.convert(hf, meta, "meta")
        file = next(meta.glob("consolidated.*.pth"))
        return torch.load(file, weights_only=True)


def rope_theta(tree: Path) -> Any:
    """Llama 3.2 in bfloat16, as the notebook's own forward casts it."""
    theirs = notebook(tree / "ch05/07_gpt_to_llama/standalone-llama32.ipynb", {})
    stated = theirs["LLAMA32_CONFIG"]
    shape = {
        **stated,
        "vocab_size": SIZES["vocab_size"],
        "context_length": SIZES["max_position_embeddings"],
        "emb_dim": SIZES["hidden_size"],
        "n_heads": SIZES["num_attention_heads"],
        "n_layers": SIZES["num_hidden_layers"],
        "hidden_dim": SIZES["intermediate_size"],
        "n_kv_groups": SIZES["num_key_value_heads"],
    }
    scaling = {**stated["rope_freq"], "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = scaling.pop("original_context_length")
    values = {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": scaling,
              "rms_norm_eps": 1e-5}  # fmt: skip
    ours = model_of(values, torch.bfloat16)
    module = theirs["Llama3Model"](shape)
    theirs["load_weights_into_llama"](module, shape, hf_weights(ours))
    return pellucid.diff(ours, module, tokens())


def original_context(tree: Path) -> Any:
    """Llama 3.1's scaling with the length of the run for the length of the pre-training."""
    import transformers

    Absent("datasets")
    vars(transformers).setdefault("TRANSFORMERS_CACHE", "")  # went after their release
    package("transformer_lens", tree / "transformer_lens")
    config_of = importlib.import_module("transformer_lens.HookedTransformerConfig")
    hooked = importlib.import_module("transformer_lens.HookedTransformer")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    ours = model_of({"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": scaling,
                     "rms_norm_eps": 1e-5})  # fmt: skip
    c = ours.config
    config = config_of.HookedTransformerConfig(
        d_model=c.width,
        d_head=c.head_dim,
        n_heads=c.n_heads,
        n_key_value_heads=c.n_kv_heads,
        n_layers=c.n_layers,
        d_mlp=c.hidden_width,
        n_ctx=2048,  # the run's, as from_pretrained cuts it
        d_vocab=c.vocab_size,
        act_fn="silu",
        eps=c.norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=c.head_dim,
        rotary_base=500000,
        gated_mlp=True,
        final_rms=True,
        use_NTK_by_parts_rope=True,
        NTK_by_parts_factor=8.0,
        device="cpu",
        dtype=torch.float32,
    )
    module = hooked.HookedTransformer(config)
    module.load_state_dict(lens_weights(ours), strict=False)
    return pellucid.diff(ours, module, tokens())


def lens_weights(model: Model) -> dict[str, Tensor]:
    """The model's weights in the layout of TransformerLens: heads as an axis, inputs first."""
    w, c = model.state_dict(), model.config
    found = {
        "embed.W_E": w["embed.weight"],
        "ln_final.w": w["norm.weight"],
        "unembed.W_U": w["unembed.weight"].T,
    }
    for n in range(c.n_layers):
        at, to = f"layers.{n}.", f"blocks.{n}."
        for part, key in (("q", "W_Q"), ("k", "_W_K"), ("v", "_W_V")):
            x = w[f"{at}attn.{part}_proj.weight"].unflatten(0, (-1, c.head_dim))  # (heads, D, C)
            found[f"{to}attn.{key}"] = x.transpose(1, 2)
        o = w[f"{at}attn.o_proj.weight"].unflatten(1, (-1, c.head_dim))  # (C, H, D)
        found[f"{to}attn.W_O"] = o.permute(1, 2, 0)
        found[f"{to}mlp.W_gate"] = w[f"{at}mlp.gate_proj.weight"].T
        found[f"{to}mlp.W_in"] = w[f"{at}mlp.up_proj.weight"].T
        found[f"{to}mlp.W_out"] = w[f"{at}mlp.down_proj.weight"].T
        found[f"{to}ln1.w"] = w[f"{at}attn_norm.weight"]
        found[f"{to}ln2.w"] = w[f"{at}mlp_norm.weight"]
    return {name: x.contiguous() for name, x in found.items()}


def mistral_theta(tree: Path) -> Any:
    """Mistral 7B's config without its theta."""
    package("litgpt", tree / "litgpt")
    config_of = importlib.import_module("litgpt.config")
    convert = importlib.import_module("litgpt.scripts.convert_hf_checkpoint")
    gpt = importlib.import_module("litgpt.model")
    ours = model_of({"model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None,
                     "rms_norm_eps": 1e-5})  # fmt: skip
    c = ours.config
    config = config_of.Config.from_name(
        "Mistral-7B-v0.3",
        block_size=c.context_length,
        vocab_size=c.vocab_size,
        padded_vocab_size=c.vocab_size,
        n_layer=c.n_layers,
        n_head=c.n_heads,
        n_embd=c.width,
        n_query_groups=c.n_kv_heads,
        head_size=c.head_dim,
        intermediate_size=c.hidden_width,
    )
    module, weights = gpt.GPT(config), {}
    convert.copy_weights_hf_llama(config, {}, weights, hf_weights(ours))
    module.load_state_dict(weights)
    return pellucid.diff(ours, module, tokens())


def torchtune(tree: Path) -> None:
    """torchtune's models, without its datasets, recipes and quantised tensors."""
    Absent("torchao", "datasets")
    package("torchtune", tree / "torchtune")
    for part in ("models", "models.gemma", "models.gemma2", "models.qwen2", "models.qwen3"):
        package(f"torchtune.{part}", tree / "torchtune" / part.replace(".", "/"))


def gemma_norms(tree: Path) -> Any:
    """Gemma 2's norms before and after the MLP, exchanged in the table of names."""
    torchtune(tree)
    builders = importlib.import_module("torchtune.models.gemma2._component_builders")
    names = importlib.import_module("torchtune.models.gemma2._convert_weights")
    ours = model_of({"model_type": "gemma2", "rope_theta": 10000.0, "tie_word_embeddings": True,
                     "sliding_window": 128, "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-6,
                     "hidden_activation": GELU, "hidden_act": GELU})  # fmt: skip
    c = ours.config
    module = builders.gemma2(
        vocab_size=c.vocab_size,
        num_layers=c.n_layers,
        num_heads=c.n_heads,
        head_dim=c.head_dim,
        num_kv_heads=c.n_kv_heads,
        embed_dim=c.width,
        intermediate_dim=c.hidden_width,
        max_seq_len=c.context_length,
        norm_eps=c.norm_eps,
        sliding_window_size=128,
        query_pre_attn_scalar=16,
    )
    weights = names.gemma2_hf_to_tune(
        hf_weights(ours), c.n_heads, c.n_kv_heads, c.width, c.head_dim
    )
    module.load_state_dict(weights)
    return pellucid.diff(ours, module.eval(), tokens())


def qwen_norms(tree: Path) -> Any:
    """Qwen 3's norms of queries and keys, behind RoPE instead of before it."""
    torchtune(tree)
    folder = tree / "torchtune/models/qwen3/_component_builders.py"
    family = "qwen3" if folder.exists() else "qwen2"
    builders = importlib.import_module(f"torchtune.models.{family}._component_builders")
    names = importlib.import_module("torchtune.models.qwen3._convert_weights")
    ours = model_of({"model_type": "qwen3", "rope_theta": 1000000.0, "rms_norm_eps": 1e-6})
    c = ours.config
    module = getattr(builders, family)(
        vocab_size=c.vocab_size,
        num_layers=c.n_layers,
        num_heads=c.n_heads,
        num_kv_heads=c.n_kv_heads,
        embed_dim=c.width,
        intermediate_dim=c.hidden_width,
        max_seq_len=c.context_length,
        head_dim=c.head_dim,
        norm_eps=c.norm_eps,
        rope_base=1000000.0,
        tie_word_embeddings=False,
        q_proj_bias=False,
        k_proj_bias=False,
        v_proj_bias=False,
        q_norm=True,
        k_norm=True,
    )
    weights = names.qwen3_hf_to_tune(hf_weights(ours), c.n_heads, c.n_kv_heads, c.width, c.head_dim)
    module.load_state_dict(weights)
    return pellucid.diff(ours, module.eval(), tokens())


def window(tree: Path) -> Any:
    """Gemma 3's window, by mlx-lm: a recording, since mlx is not torch."""
    package("mlx_lm", tree / "mlx_lm")
    package("mlx_lm.models", tree / "mlx_lm/models")
    gemma = importlib.import_module("mlx_lm.models.gemma3_text")
    kinds = ["sliding_attention", "full_attention"]
    ours = model_of({"model_type": "gemma3_text", "sliding_window": 8, "layer_types": kinds,
                     "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-6,
                     "tie_word_embeddings": True, "rope_theta": 1000000.0,
                     "rope_local_base_freq": 10000.0,
                     "hidden_activation": GELU, "hidden_act": GELU})  # fmt: skip
    c = ours.config
    arguments = gemma.ModelArgs(
        model_type="gemma3_text",
        hidden_size=c.width,
        num_hidden_layers=c.n_layers,
        intermediate_size=c.hidden_width,
        num_attention_heads=c.n_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        vocab_size=c.vocab_size,
        num_key_value_heads=c.n_kv_heads,
        query_pre_attn_scalar=16,
        sliding_window=8,
        sliding_window_pattern=2,
    )
    module = gemma.Model(arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seen.npz"
        record_mlx(module, hf_weights(ours), file)
        return pellucid.diff(ours, file, tokens())


def record_mlx(module: Any, weights: dict[str, Tensor], file: Path) -> None:
    """What each of an mlx model's modules returns, and what it is given, as an .npz."""
    import mlx.core as mx
    import numpy as np

    cast: Any = mx.array
    loaded = module.sanitize({name: cast(x.numpy()) for name, x in weights.items()})
    module.load_weights(list(loaded.items()))
    paths = {id(part): path for path, part in module.named_modules()}
    seen: dict[str, Any] = {}

    def watched(call: Any) -> Any:
        def watch(self: Any, *given: Any, **named: Any) -> Any:
            path = paths.get(id(self), "")
            if path and given and isinstance(given[0], mx.array):
                seen.setdefault(f"{path}.input", np.array(given[0]))
            out = call(self, *given, **named)
            if path and isinstance(out, mx.array):
                seen.setdefault(path, np.array(out))
            return out

        return watch

    for kind in {type(part) for _, part in module.named_modules()}:
        kind.__call__ = watched(kind.__call__)
    ids = mx.array([tokens()])
    seen["lm_head"] = np.array(module(ids, cache=module.make_cache()))
    seen["input_ids"] = np.array(ids).astype("int64")
    np.savez(file, **seen)


def adamw(tree: Path) -> Any:
    """nanochat's AdamW: eps added before the bias correction of the squares."""
    torch.compiler.set_stance("force_eager")
    package("nanochat", tree / "nanochat")
    module = importlib.import_module("nanochat.adamw")
    module.dist = _OneRank()
    values = {"model_type": "llama", "rope_theta": 10000.0}
    shape = model_of(values).config
    settings = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.0}
    wrong = _step(shape, model_of(values), lambda p: module.DistAdamW([{"params": p}], **settings))
    right = _step(shape, model_of(values), lambda p: torch.optim.AdamW(p, **settings))
    return pellucid.diff_steps(right, wrong)


class _OneRank:
    """torch.distributed for one process; gloo has no futures, which their optimiser waits for."""

    ReduceOp = torch.distributed.ReduceOp

    def get_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1

    def reduce_scatter_tensor(self, out: Tensor, given: Tensor, **options: Any) -> Any:
        out.copy_(given)
        return self

    def all_gather_into_tensor(self, out: Tensor, given: Tensor, **options: Any) -> Any:
        out.copy_(given)
        return self

    def get_future(self) -> Any:
        future = torch.futures.Future()
        future.set_result(None)
        return future


def _step(config: Config, model: Model, optimiser: Callable[[list[Tensor]], Any]) -> Any:
    """One step of training, of the same batch."""
    optimizer = optimiser(list(model.parameters()))
    ids = torch.tensor(tokens())
    inputs, targets = ids[:-1][None], ids[1:][None]

    def step() -> Tensor:
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss

    return pellucid.record_step(model, optimizer, step, inputs=inputs, targets=targets)


_RASBT, _TUNE = "rasbt/LLMs-from-scratch", "pytorch/torchtune"
_LENS, _LIT, _MLX = "TransformerLensOrg/TransformerLens", "Lightning-AI/litgpt", "ml-explore/mlx-lm"
_TURNED, _NORMED = "layers.0.attn.q_rotated", "layers.0.attn.q_normed"
CASES = {
    "rope_pairing": Case(
        _RASBT, "b12dbf6", "layers.0.attn.q", "q/k not permuted", rope_pairing
    ),
    "rope_theta": Case(_RASBT, "534a704", _TURNED, "RoPE theta", rope_theta),
    "original_context": Case(
        _LENS, "d2f3f15", _TURNED, "RoPE original context", original_context
    ),
    "mistral_theta": Case(_LIT, "a3af80d", _TURNED, "RoPE theta", mistral_theta),
    "gemma_norms": Case(_TUNE, "371bb0b", "layers.0.mlp_norm", "swapped weights", gemma_norms),
    "qwen_norms": Case(_TUNE, "b4c98ac", _NORMED, "q/k norm after RoPE", qwen_norms),
    "window": Case(_MLX, "6fd60d3", "layers.0.attn.z", "window one too wide", window),
    "adamw": Case(
        "karpathy/nanochat", "4ddc803", "after.embed.weight", "eps before the bias correction",
        adamw,
    ),
}  # fmt: skip


def run_one(name: str, tree: Path) -> dict[str, Any]:
    """What the diff says of one side of a fix."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    begun = time.perf_counter()
    report = CASES[name].run(tree)
    static = [{"name": row.name, "cause": row.cause} for row in report.static]
    return {
        "verdict": report.verdict,
        "first": report.first.name if report.first else (static[0]["name"] if static else ""),
        "cause": report.cause.name if report.cause else (static[0]["cause"] if static else ""),
        "evidence": report.cause.evidence if report.cause else "",
        "tensors": len(report.tensors),
        "static": static,
        "note": report.note,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def measured(name: str, side: str, folder: Path) -> dict[str, Any]:
    """`run_one` in a fresh process: both sides of a fix are packages of the same names."""
    command = [sys.executable, __file__, str(folder), "--one", name, side]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"verdict": "not run", "error": said}
    return json.loads(lines[-1])


def out(text: str = "") -> None:
    """A line of the result."""
    sys.stdout.write(text + "\n")


def main() -> None:
    """Run the cases asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        name, side = asked.one
        out(json.dumps(run_one(name, asked.folder / name / side)))
        return
    table = {
        name: {side: measured(name, side, asked.folder) for side in ("before", "after")}
        for name in asked.only
    }
    if asked.json:
        out(json.dumps(table, indent=1))
        return
    for name, sides in table.items():
        case, before, after = CASES[name], sides["before"], sides["after"]
        for side, row in sides.items():
            said = row.get("error") or (
                f"{row['verdict']:16} {row['first']:26} {row['cause']:30} {row['tensors']:4} "
                f"tensors {row['seconds']:5.1f} s"
            )
            out(f"{name:17} {side:7} {said}")
        found = (before.get("first"), before.get("cause")) == (case.first, case.cause)
        healthy = after["verdict"] in ("identical", "within-rounding", "explained")
        out(f"{'':17} {'right' if found and healthy else 'WRONG'}\n")


if __name__ == "__main__":
    main()
