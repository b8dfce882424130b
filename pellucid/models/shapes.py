"""The shapes of well-known models, as data: enough to count, draw and build one without its files.

A shape is a config without weights. Sources: GPT-2, table 2 of Radford et al. (2019) and the
``hparams.json`` of each release; Llama 2, Touvron et al. (2023) and its ``params.json``; Llama 3 to
3.2, table 3 of Dubey et al. (2024) and the ``params.json`` / ``config.json`` of each release.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def shape(name: str) -> Shape:
    """The shape called `name`; ValueError that lists the names for one that is not known."""
    if name not in SHAPES:
        raise ValueError(f"no shape is called {name!r}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]
