"""Healthy models for the faults to break."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pellucid.diff.selftest.catalogue import encoded
from pellucid.models import GPTConfig, LlamaConfig, RopeConfig, build
from pellucid.models.config import Layer

TEXT = (
    "Once upon a time there was a little girl named Lily, who lived in a house with 3 windows and "
    "127 steps. She loved to play outside in the park. One day, on the 4th of July 1998, she saw a "
    "big red ball in the tall grass. She ran to it, and said: can I have it? Her mother smiled. "
)
SHORT, LONG = 48, 330


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model by its config and float32 weights, and maybe the tokenizer that belongs to it."""

    name: str
    config: Any
    weights: Mapping[str, Tensor]
    tokenizer: Any = None

    def rows(self, kind: str) -> list[list[int]]:
        """Token ids to run: "short", "long" (as far as the context goes), "padded" (three rows).

        "many" is more tokens than the model is wide, so that weights can be solved for.
        """
        length = min(self.config.context_length - 4, LONG)
        ids = self._ids(length)
        if kind == "padded":
            return [ids[:20], ids[3:16], ids[5:24]]
        if kind == "many":
            count = round(3.2 * self.config.width / SHORT) + 1
            return self._random(count, SHORT)
        return [ids if kind == "long" else ids[:SHORT]]

    def _ids(self, length: int) -> list[int]:
        if self.tokenizer is None:
            return self._random(1, length)[0]
        ids = encoded(self.tokenizer, TEXT)
        while len(ids) < length:
            ids += self.tokenizer.encode(TEXT)
        return ids[:length]

    def _random(self, rows: int, length: int) -> list[list[int]]:
        random = torch.Generator().manual_seed(0)
        return torch.randint(self.config.vocab_size, (rows, length), generator=random).tolist()


def from_language_model(lm: Any) -> Subject:
    """A subject from a loaded language model (its `model`, `tokenizer` and `name`)."""
    weights = {name: tensor.float() for name, tensor in lm.model.state_dict().items()}
    return Subject(name=lm.name, config=lm.config, weights=weights, tokenizer=lm.tokenizer)


def random_llama() -> Subject:
    """Three layers with grouped queries; no two sizes alike but the square output projection."""
    config = LlamaConfig(
        vocab_size=150,
        context_length=512,
        width=48,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=12,
        hidden_width=96,
        rope=RopeConfig(theta=10000.0),
    )
    return Subject(name="random-llama", config=config, weights=_drawn(config))


def random_gpt2() -> Subject:
    """Three layers of a GPT-2 with biases everywhere and a tied head."""
    config = GPTConfig(
        vocab_size=150, context_length=512, width=48, n_layers=3, n_heads=4, hidden_width=96
    )
    return Subject(name="random-gpt2", config=config, weights=_drawn(config))


_WINDOW_THEN_ALL = (Layer(window=True), Layer())
_GEMMA: dict[str, Any] = {
    "rounding": "gemma",
    "norm_offset": True,
    "norm_places": "both",
    "embed_scale": 48**0.5,
    "activation": "gelu_tanh",
    "window": 8,
    "score_scale": 0.2,
    "tied": True,
}
# What families add to a Llama, each as its family has it; the sizes are the random Llama's.
_FEATURES: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": "head", "tied": True},
    "gemma2": {**_GEMMA, "layers": _WINDOW_THEN_ALL, "score_cap": 4.0, "logit_cap": 3.0},
    "gemma3": {
        **_GEMMA,
        "qk_norm": "head",
        "rope": RopeConfig(theta=1e6, type="linear", factor=8.0),
        "second_rope": RopeConfig(theta=1e4),
        "layers": (Layer(True, "second_rope"), Layer(True, "second_rope"), Layer()),
    },
    "olmo2": {"rounding": "olmo", "norm_places": "after", "qk_norm": "whole"},
    "smollm3": {"layers": (Layer(), Layer(rope="")), "tied": True},
    "phi3": {
        "rope": RopeConfig(
            theta=10000.0,
            type="longrope",
            factor=16.0,
            original_context=64,
            short_factor=(1.0, 1.1, 1.2, 1.4, 1.7, 2.0),
            long_factor=(1.0, 1.6, 2.5, 4.0, 8.0, 16.0),
        ),
    },
    "ministral3": {
        "query_growth": 0.1,
        "rope": RopeConfig(
            theta=1e6, type="yarn", factor=16.0, original_context=16, mscale=1.0, mscale_all_dim=1.0
        ),
    },
    "granite": {
        "embed_scale": 12.0,
        "residual_scale": 0.22,
        "logit_scale": 0.125,
        "score_scale": 0.0625,
    },
    "gpt-oss": {
        "biases": ("qkv", "o"),
        "sinks": True,
        "window": 8,
        "layers": _WINDOW_THEN_ALL,
        "rope": RopeConfig(
            theta=150000.0, type="yarn", factor=32.0, original_context=32, truncate=False
        ),
    },
    "phi": {
        "norm": "layer",
        "norm_bias": True,
        "parallel": True,
        "biases": ("qkv", "o", "mlp", "head"),
        "rope": RopeConfig(theta=10000.0, share=0.67),
        "gated": False,
        "activation": "gelu_tanh",
        "n_kv_heads": 4,
    },
    "cohere": {
        "norm": "layer",
        "qk_norm": "head",
        "parallel": True,
        "logit_scale": 0.25,
        "window": 8,
        "layers": (Layer(window=True), Layer(rope="")),
        "tied": True,
    },
    "command-r-plus": {
        "norm": "layer",
        "qk_norm": "each",
        "parallel": True,
        "logit_scale": 0.25,
        "tied": True,
    },
    "nanochat": {
        "norm_weight": False,
        "embed_norm": True,
        "qk_norm": "head",
        "qk_norm_last": True,
        "gated": False,
        "activation": "relu2",
        "logit_cap": 5.0,
    },
    "olmo": {"rounding": "olmo", "norm": "layer", "norm_weight": False, "qkv_clip": 1.0},
    "starcoder2": {
        "norm": "layer",
        "norm_bias": True,
        "biases": ("qkv", "o", "mlp"),
        "gated": False,
        "activation": "gelu",
        "window": 8,
        "layers": (Layer(window=True),),
    },
}


def random_features(names: Sequence[str] = tuple(_FEATURES)) -> list[Subject]:
    """Random models with the features of other families, by their names; all without `names`.

    KeyError for a name that is none of them.
    """
    plain = random_llama().config
    found: list[Subject] = []
    for name in names:
        config = replace(plain, **_FEATURES[name])
        found.append(Subject(name=f"{name}-like", config=config, weights=_drawn(config)))
    return found


def _drawn(config: Any) -> dict[str, Tensor]:
    """Weights whose activations, norms and attention patterns have the sizes of a trained model."""
    random = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build(config).state_dict().items()}
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=random)
        if len(shape) == 1 and name.endswith("norm.weight"):
            weights[name] = (0 if config.norm_offset else 1) + values.abs() / 3
        elif name.endswith("sinks"):
            weights[name] = values
        elif len(shape) == 1:
            weights[name] = values / 10
        elif "embed" in name:
            weights[name] = values * 0.3
        else:  # sharper queries and keys make patterns that look somewhere
            gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            weights[name] = values * gain * shape[1] ** -0.5
    return weights
