"""Tiny random models as Hugging Face's layout has them, written without Pellucid.

Uneven in every size, and with weights large enough that every step matters. Values are bfloat16, so
that float64, float32 and bfloat16 begin from the same numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

MODELS = Path(__file__).resolve().parent / "models"
VOCABULARY = 270

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 28,
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 20,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 28,
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
CONFIGS = {
    "llama-gqa": LLAMA,
    "llama-mqa-tied": LLAMA
    | {"num_key_value_heads": 1, "tie_word_embeddings": True, "hidden_size": 24},
    "llama-biases": LLAMA
    | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-6},
    "llama-llama3": LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    "llama-yarn": LLAMA | {"rope_scaling": YARN | {"original_max_position_embeddings": 16}},
    # the older key of the type, and a context that the prompt of the traces goes past
    "llama-dynamic": LLAMA
    | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 5},
    "llama-linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-wide": LLAMA | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8},
    "gpt2": GPT2,
    "gpt2-book": GPT2
    | {"qkv_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"},
}


def tensors(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every stored tensor."""
    return _llama(config) if config["model_type"] == "llama" else _gpt2(config)


def _llama(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, hidden = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    shared = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (VOCABULARY, width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (width,)
        yield f"{at}.post_attention_layernorm.weight", (width,)
        attention = {"q": (heads, width), "k": (shared, width), "v": (shared, width)}
        for leaf, shape in (attention | {"o": (width, heads)}).items():
            yield f"{at}.self_attn.{leaf}_proj.weight", shape
            if config["attention_bias"]:
                yield f"{at}.self_attn.{leaf}_proj.bias", shape[:1]
        mlp = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        for leaf, shape in mlp.items():
            yield f"{at}.mlp.{leaf}_proj.weight", shape
            if config["mlp_bias"]:
                yield f"{at}.mlp.{leaf}_proj.bias", shape[:1]
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (VOCABULARY, width)


def _gpt2(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, hidden = config["n_embd"], config["n_inner"]
    yield "transformer.wte.weight", (VOCABULARY, width)
    yield "transformer.wpe.weight", (config["n_positions"], width)
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}"
        for leaf, shape in (
            ("ln_1", (width,)),
            ("attn.c_attn", (width, 3 * width)),
            ("attn.c_proj", (width, width)),
            ("ln_2", (width,)),
            ("mlp.c_fc", (width, hidden)),
            ("mlp.c_proj", (hidden, width)),
        ):
            yield f"{at}.{leaf}.weight", shape
            yield f"{at}.{leaf}.bias", shape[-1:]
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (VOCABULARY, width)


def write(folder: Path, config: dict, seed: int) -> None:
    """A model's folder without a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in tensors(config):
        values = torch.randn(shape, generator=random)
        norm = len(shape) == 1 and name.endswith("weight")
        values = 1 + values / 10 if norm else values / 3
        if name.endswith("c_attn.bias") and not config.get("qkv_bias", True):
            values = torch.zeros(shape)
        found[name] = values.to(torch.bfloat16)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def write_all(tokenizer: Path) -> None:
    """All of them, each with the tokenizer files of a folder."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        write(MODELS / name, config, seed)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / file, MODELS / name / file)
