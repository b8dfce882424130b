"""The shapes of well-known models, as data: enough to count, draw and build one without its files.

A shape is a config without weights. Sources: GPT-2, table 2 of Radford et al. (2019) and the
``hparams.json`` of each release; Llama 2, Touvron et al. (2023) and its ``params.json``; Llama 3 to
3.2, table 3 of Dubey et al. (2024) and the ``params.json`` / ``config.json`` of each release; the
others, the ``config.json`` of the release named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pellucid.families.config import read_config
from pellucid.models import Config, GPTConfig, LlamaConfig, RopeConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A config with the title people know it by and the place its numbers come from."""

    title: str
    config: Config
    source: str


def _gpt2(title: str, width: int, n_layers: int, n_heads: int) -> Shape:
    config = GPTConfig(width=width, n_layers=n_layers, n_heads=n_heads)
    return Shape(title=title, config=config, source="Radford et al. 2019, table 2; hparams.json")


def _rope_llama3(factor: float) -> RopeConfig:
    return RopeConfig(theta=500000.0, type="llama3", factor=factor, original_context=8192)


_LLAMA_3_1 = {"context_length": 131072, "rope": _rope_llama3(8.0)}
_LLAMA_3_2 = {"context_length": 131072, "rope": _rope_llama3(32.0), "tied": True}
_DUBEY = "Dubey et al. 2024, table 3; params.json"

SHAPES: dict[str, Shape] = {
    "gpt2": _gpt2("GPT-2 124M", width=768, n_layers=12, n_heads=12),
    "gpt2-medium": _gpt2("GPT-2 medium 355M", width=1024, n_layers=24, n_heads=16),
    "gpt2-large": _gpt2("GPT-2 large 774M", width=1280, n_layers=36, n_heads=20),
    "gpt2-xl": _gpt2("GPT-2 XL 1.5B", width=1600, n_layers=48, n_heads=25),
    "book-gpt": Shape(
        title="The book's GPT 163M",
        config=GPTConfig(qkv_bias=False, tied=False),
        source="Raschka, Build a Large Language Model (From Scratch), 2024, GPT_CONFIG_124M",
    ),
    "llama-2-7b": Shape(
        title="Llama 2 7B",
        config=LlamaConfig(
            vocab_size=32000,
            context_length=4096,
            n_kv_heads=32,
            hidden_width=11008,
            rope=RopeConfig(theta=10000.0),
        ),
        source="Touvron et al. 2023; params.json",
    ),
    "llama-3-8b": Shape(title="Llama 3 8B", config=LlamaConfig(), source=_DUBEY),
    "llama-3.1-8b": Shape(title="Llama 3.1 8B", config=LlamaConfig(**_LLAMA_3_1), source=_DUBEY),
    "llama-3.1-70b": Shape(
        title="Llama 3.1 70B",
        config=LlamaConfig(width=8192, n_layers=80, n_heads=64, hidden_width=28672, **_LLAMA_3_1),
        source=_DUBEY,
    ),
    "llama-3.2-1b": Shape(
        title="Llama 3.2 1B",
        config=LlamaConfig(width=2048, n_layers=16, head_dim=64, hidden_width=8192, **_LLAMA_3_2),
        source="Llama 3.2 1B config.json",
    ),
    "llama-3.2-3b": Shape(
        title="Llama 3.2 3B",
        config=LlamaConfig(width=3072, n_layers=28, n_heads=24, hidden_width=8192, **_LLAMA_3_2),
        source="Llama 3.2 3B config.json",
    ),
}


def _published(title: str, source: str, **keys: Any) -> Shape:
    """A shape from the keys of its ``config.json`` that are not the class's defaults."""
    return Shape(title=title, config=read_config(keys, source), source=source)


def _sizes(width: int, layers: int, heads: int, kv_heads: int, hidden: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
    }


# Phi-4-mini's divisors of the frequencies beyond 4,096 tokens; within them there are none.
_PHI4_LONG = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
    11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
    25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
    32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip

SHAPES |= {
    "qwen2.5-0.5b": _published(
        "Qwen2.5 0.5B",
        "Qwen2.5-0.5B config.json",
        model_type="qwen2",
        **_sizes(896, 24, 14, 2, 4864),
        vocab_size=151936,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": _published(
        "Qwen3 0.6B",
        "Qwen3-0.6B config.json",
        model_type="qwen3",
        **_sizes(1024, 28, 16, 8, 3072),
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
    "gemma-2-2b": _published(
        "Gemma 2 2B",
        "gemma-2-2b config.json",
        model_type="gemma2",
        **_sizes(2304, 26, 8, 4, 9216),
        vocab_size=256000,
    ),
    "gemma-3-1b": _published(
        "Gemma 3 1B",
        "gemma-3-1b-pt config.json",
        model_type="gemma3_text",
        **_sizes(1152, 26, 4, 1, 6912),
        vocab_size=262144,
        max_position_embeddings=32768,
        sliding_window=512,
    ),
    "gemma-3-4b": _published(
        "Gemma 3 4B, text",
        "gemma-3-4b-pt config.json, text_config",
        model_type="gemma3_text",
        **_sizes(2560, 34, 8, 4, 10240),
        sliding_window=1024,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "mistral-7b": _published(
        "Mistral 7B v0.1",
        "Mistral-7B-v0.1 config.json",
        model_type="mistral",
        **_sizes(4096, 32, 32, 8, 14336),
        vocab_size=32000,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
    ),
    "phi-4-mini": _published(
        "Phi-4-mini",
        "Phi-4-mini-instruct config.json",
        model_type="phi3",
        **_sizes(3072, 32, 24, 8, 8192),
        vocab_size=200064,
        max_position_embeddings=131072,
        partial_rotary_factor=0.75,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * len(_PHI4_LONG),
            "long_factor": list(_PHI4_LONG),
        },
        sliding_window=262144,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": _published(
        "SmolLM2 135M",
        "SmolLM2-135M config.json",
        model_type="llama",
        **_sizes(576, 30, 9, 3, 1536),
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
    ),
    "smollm3-3b": _published(
        "SmolLM3 3B",
        "SmolLM3-3B config.json",
        model_type="smollm3",
        **_sizes(2048, 36, 16, 4, 11008),
        vocab_size=128256,
        max_position_embeddings=65536,
        rope_theta=5e6,
    ),
    "olmo-2-7b": _published(
        "OLMo 2 7B",
        "OLMo-2-1124-7B config.json",
        model_type="olmo2",
        **_sizes(4096, 32, 32, 32, 11008),
        vocab_size=100352,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_theta=5e5,
    ),
    "granite-3.3-2b": _published(
        "Granite 3.3 2B",
        "granite-3.3-2b-base config.json",
        model_type="granite",
        **_sizes(2048, 40, 32, 8, 8192),
        vocab_size=49159,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e7,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.015625,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
}


def shape(name: str) -> Shape:
    """The shape called `name`; ValueError that lists the names for one that is not known."""
    if name not in SHAPES:
        raise ValueError(f"no shape is called {name!r}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]
