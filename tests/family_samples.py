"""A tiny config.json of each model_type, written from the documented keys of transformers 5.23.

No two sizes are alike, so that a swapped axis cannot pass unnoticed; the window is shorter than the
text that the tests read.
"""

from __future__ import annotations

from typing import Any

WINDOW = 8
LAYERS = 4
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_SQUARE = {key: value for key, value in _SIZES.items() if key != "head_dim"}
_EPS = {"rms_norm_eps": 1e-6}


def _rope(theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def _by_kind(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 4.5],
    "partial_rotary_factor": 0.75,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_YARN = {
    "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32,
    "attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_GROWING = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip

_STABLELM = {
    "model_type": "stablelm",
    **_SQUARE,
    "layer_norm_eps": 1e-5,
    **_rope(partial_rotary_factor=0.25),
}
_GPT2 = {
    "model_type": "gpt2",
    "n_embd": 48,
    "n_layer": LAYERS,
    "n_head": 6,
    "n_inner": 80,
    "vocab_size": 97,
    "n_positions": 128,
}

SAMPLES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES, **_EPS, **_rope()},
    "llama llama3": {"model_type": "llama", **_SIZES, **_EPS, "rope_parameters": _LLAMA3},
    "mistral": {"model_type": "mistral", **_SIZES, **_EPS, **_rope(1e6), "sliding_window": WINDOW},
    "mistral without windows": {
        "model_type": "mistral",
        **_SIZES,
        **_EPS,
        **_rope(),
        "sliding_window": None,
    },
    "ministral": {
        "model_type": "ministral",
        **_SIZES,
        **_EPS,
        **_rope(),
        "sliding_window": WINDOW,
        "layer_types": TYPES,
    },
    "qwen2": {"model_type": "qwen2", **_SQUARE, **_EPS, **_rope(1e6), "tie_word_embeddings": True},
    "qwen2 with windows": {
        "model_type": "qwen2",
        **_SQUARE,
        **_EPS,
        **_rope(1e6),
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", **_SIZES, **_EPS, **_rope(1e6)},
    "qwen3 yarn, biased": {
        "model_type": "qwen3",
        **_SIZES,
        **_EPS,
        "attention_bias": True,
        "rope_parameters": {key: _YARN[key] for key in _YARN if key != "attention_factor"},
    },
    "gemma": {"model_type": "gemma", **_SIZES, **_EPS, **_rope()},
    "gemma2": {
        "model_type": "gemma2",
        **_SIZES,
        **_EPS,
        **_rope(),
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 10,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_SIZES,
        **_EPS,
        **_by_kind(_LINEAR, _PLAIN),
        "sliding_window": WINDOW,
        "layer_types": TYPES,
        "query_pre_attn_scalar": 12,
    },
    "phi": {
        "model_type": "phi",
        **_SIZES,
        "layer_norm_eps": 1e-5,
        **_rope(partial_rotary_factor=0.5),
    },
    "phi with normed heads": {
        "model_type": "phi",
        **_SIZES,
        "layer_norm_eps": 1e-5,
        **_rope(partial_rotary_factor=0.5),
        "qk_layernorm": True,
    },
    "phi3": {
        "model_type": "phi3",
        **_SIZES,
        **_EPS,
        **_rope(partial_rotary_factor=0.5),
        "sliding_window": WINDOW,
    },
    "phi3 longrope": {
        "model_type": "phi3",
        **_SIZES,
        **_EPS,
        "original_max_position_embeddings": 32,
        "rope_parameters": _LONG,
    },
    "smollm3": {"model_type": "smollm3", **_SQUARE, **_EPS, **_rope(2e6)},
    "smollm3 with windows": {
        "model_type": "smollm3",
        **_SQUARE,
        **_EPS,
        **_rope(2e6),
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "ministral3": {
        "model_type": "ministral3",
        **_SIZES,
        **_EPS,
        "rope_parameters": _GROWING,
        "sliding_window": WINDOW,
    },
    "olmo": {"model_type": "olmo", **_SIZES, **_rope(), "clip_qkv": 0.5},
    "olmo2": {"model_type": "olmo2", **_SIZES, **_EPS, **_rope(5e5)},
    "olmo3": {
        "model_type": "olmo3",
        **_SIZES,
        **_EPS,
        **_by_kind(_YARN, {"rope_type": "default", "rope_theta": 5e5}),
        "sliding_window": WINDOW,
        "layer_types": TYPES,
    },
    "granite": {
        "model_type": "granite",
        **_SIZES,
        **_EPS,
        **_rope(),
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 8.0,
    },
    "granite by default": {
        "model_type": "granite",
        **_SIZES,
        **_EPS,
        **_rope(),
        "attention_bias": True,
        "mlp_bias": True,
    },
    "granite_swa": {
        "model_type": "granite_swa",
        **_SIZES,
        **_EPS,
        **_rope(),
        "sliding_window": WINDOW,
        "layer_types": TYPES,
        "layer_rope_theta": [1e4, 0, 5e4, 0],
        "attention_multiplier": 0.2,
    },
    "cohere": {
        "model_type": "cohere",
        **_SIZES,
        "layer_norm_eps": 1e-5,
        **_rope(),
        "logit_scale": 0.25,
        "attention_bias": True,
    },
    "cohere with q/k norms": {
        "model_type": "cohere",
        **_SIZES,
        "layer_norm_eps": 1e-5,
        **_rope(),
        "logit_scale": 0.5,
        "use_qk_norm": True,
    },
    "cohere2": {
        "model_type": "cohere2",
        **_SIZES,
        "layer_norm_eps": 1e-5,
        **_rope(),
        "logit_scale": 0.25,
        "sliding_window": WINDOW,
        "layer_types": TYPES,
    },
    "glm": {"model_type": "glm", **_SIZES, **_EPS, **_rope(partial_rotary_factor=0.5)},
    "glm4": {
        "model_type": "glm4",
        **_SIZES,
        **_EPS,
        **_rope(partial_rotary_factor=0.5),
        "attention_bias": False,
    },
    "exaone4": {
        "model_type": "exaone4",
        **_SIZES,
        **_EPS,
        **_rope(1e6),
        "sliding_window": WINDOW,
        "layer_types": TYPES,
    },
    "exaone4 without windows": {
        "model_type": "exaone4",
        **_SIZES,
        **_EPS,
        **_rope(1e6),
        "sliding_window": None,
        "layer_types": ["full_attention"] * LAYERS,
    },
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", **_SIZES, **_EPS, **_rope()},
    "helium": {"model_type": "helium", **_SIZES, "rms_norm_eps": 1e-8, **_rope(1e5)},
    "ernie4_5": {"model_type": "ernie4_5", **_SIZES, **_EPS, **_rope(5e5), "use_bias": True},
    "seed_oss": {"model_type": "seed_oss", **_SIZES, **_EPS, **_rope()},
    "arcee": {"model_type": "arcee", **_SIZES, **_EPS, **_rope()},
    "nemotron": {
        "model_type": "nemotron",
        **_SIZES,
        "norm_eps": 1e-5,
        **_rope(partial_rotary_factor=0.5),
    },
    "nanochat": {"model_type": "nanochat", **_SIZES, **_EPS, **_rope()},
    "jais2": {"model_type": "jais2", **_SQUARE, "layer_norm_eps": 1e-5, **_rope()},
    "starcoder2": {
        "model_type": "starcoder2",
        **_SIZES,
        "norm_epsilon": 1e-5,
        **_rope(),
        "sliding_window": WINDOW,
    },
    "stablelm": {
        **_STABLELM,
        "use_qkv_bias": True,
    },
    "stablelm parallel": {
        **_STABLELM,
        "use_parallel_residual": True,
    },
    "stablelm with q/k norms": {
        **_STABLELM,
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "gpt2": _GPT2,
    "gpt2 tanh in one kernel": {
        **_GPT2,
        "activation_function": "gelu_pytorch_tanh",
    },
}
