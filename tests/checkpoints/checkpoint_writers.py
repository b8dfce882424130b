"""Tiny random models written to disk by hand, without any of the code under test.

Every writer starts from the same dict of weights under Hugging Face's names and writes plain files,
so that what is loaded from two layouts can be held against each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY, LAYERS = 32, 8, 4, 4, 96, 40, 2

LLAMA_JSON: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# multiple_of 32: int(2 · 4 · 32 / 3) = 85, rounded up to 96
PARAMS_JSON: dict[str, Any] = {
    "dim": WIDTH,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_seq_len": 64,
}
GPT2_JSON: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "vocab_size": 30,
    "n_positions": 16,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def random_llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of a Llama of `LLAMA_JSON`'s shape under Hugging Face's names."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (WIDTH,),
            prefix + "post_attention_layernorm.weight": (WIDTH,),
            prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            prefix + "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": (HIDDEN, WIDTH),
            prefix + "mlp.up_proj.weight": (HIDDEN, WIDTH),
            prefix + "mlp.down_proj.weight": (WIDTH, HIDDEN),
        }
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    return {name: (torch.randn(shape) / 4).to(dtype) for name, shape in shapes.items()}


def random_gpt2(tied: bool = True) -> dict[str, Tensor]:
    """Weights of a GPT-2 of `GPT2_JSON`'s shape under Hugging Face's names, Conv1D as stored."""
    torch.manual_seed(1)
    width, vocabulary, context = 24, 30, 16
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.wpe.weight": (context, width),
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
    }
    for layer in range(2):
        prefix = f"transformer.h.{layer}."
        for leaf, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {
                f"{prefix}{leaf}.weight": (rows, columns),
                f"{prefix}{leaf}.bias": (columns,),
            }
        for leaf in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}{leaf}.weight": (width,), f"{prefix}{leaf}.bias": (width,)}
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, width)
    return {name: torch.randn(shape) / 4 for name, shape in shapes.items()}


def write_hf(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], files: int = 1
) -> Path:
    """A folder in Hugging Face's layout, the tensors dealt out over `files` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {key: weights[key] for key in list(weights)[number::files]}
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k matrix from half-split order to Meta's, one row at a time."""
    width = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(width // 2):
            rows += [weight[head * width + i], weight[head * width + i + width // 2]]
    return torch.stack(rows)


def write_meta(
    folder: Path,
    params: dict[str, Any],
    weights: dict[str, Tensor],
    shards: int = 1,
    embed_dim: int = 1,
) -> Path:
    """A folder in Meta's layout; `weights` under Hugging Face's names, q and k half-split."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    split: dict[str, tuple[Tensor, int | None]] = {
        "tok_embeddings.weight": (weights["model.embed_tokens.weight"], embed_dim),
        "norm.weight": (weights["model.norm.weight"], None),
        "rope.freqs": (torch.ones(HEAD_DIM // 2), None),
    }
    if "lm_head.weight" in weights:
        split["output.weight"] = (weights["lm_head.weight"], 0)
    for layer in range(LAYERS):
        hf, meta = f"model.layers.{layer}.", f"layers.{layer}."
        q, k = (weights[f"{hf}self_attn.{leaf}_proj.weight"] for leaf in "qk")
        split |= {
            meta + "attention.wq.weight": (interleaved(q, HEADS), 0),
            meta + "attention.wk.weight": (interleaved(k, KV_HEADS), 0),
            meta + "attention.wv.weight": (weights[hf + "self_attn.v_proj.weight"], 0),
            meta + "attention.wo.weight": (weights[hf + "self_attn.o_proj.weight"], 1),
            meta + "feed_forward.w1.weight": (weights[hf + "mlp.gate_proj.weight"], 0),
            meta + "feed_forward.w2.weight": (weights[hf + "mlp.down_proj.weight"], 1),
            meta + "feed_forward.w3.weight": (weights[hf + "mlp.up_proj.weight"], 0),
            meta + "attention_norm.weight": (weights[hf + "input_layernorm.weight"], None),
            meta + "ffn_norm.weight": (weights[hf + "post_attention_layernorm.weight"], None),
        }
    for shard in range(shards):
        part = {
            name: (tensor if dim is None else tensor.chunk(shards, dim)[shard]).clone()
            for name, (tensor, dim) in split.items()
        }
        torch.save(part, folder / f"consolidated.{shard:02}.pth")
    return folder
