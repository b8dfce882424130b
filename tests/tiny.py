"""Tiny random models for the tests: small enough to run in a millisecond, uneven in every size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid.models import Config, GPTConfig, Layer, LlamaConfig, Model, RopeConfig, build

# No two letters share a size, so that a transposed or swapped axis cannot pass unnoticed.
LLAMA = LlamaConfig(
    vocab_size=97,
    context_length=64,
    width=36,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=10,
    hidden_width=56,
    rope=RopeConfig(theta=10000.0),
)
GPT = GPTConfig(vocab_size=97, context_length=64, width=36, n_layers=2, n_heads=4, hidden_width=56)
CONFIGS: dict[str, Config] = {
    "gpt2": GPT,
    "gpt2-book": replace(GPT, biases=("o", "mlp"), tied=False),
    "llama-mha": replace(LLAMA, n_kv_heads=4),
    "llama-gqa": LLAMA,
    "llama-mqa": replace(LLAMA, n_kv_heads=1, tied=True),
}

# One feature each, on a Llama or a GPT-2 of three layers; then several at once, as real families
# have them. A window of 5 is shorter than the tests' prompts and longer than one token.
_SMALL = replace(LLAMA, n_layers=3)
_SMALL_GPT = replace(GPT, n_layers=3)
_WINDOWED = (Layer(window=True), Layer())
_PARTIAL = RopeConfig(theta=10000.0, share=0.6)  # 6 of 10: three pairs
FEATURES: dict[str, Config] = {
    "window": replace(_SMALL, window=5, layers=_WINDOWED),
    "window everywhere": replace(_SMALL, window=5, layers=(Layer(window=True),)),
    "window, learned positions": replace(
        _SMALL_GPT, window=5, layers=(Layer(rope=""), Layer(window=True, rope=""))
    ),
    "qk norm of heads": replace(_SMALL, qk_norm="head"),
    "qk norm of all": replace(_SMALL, qk_norm="whole"),
    "qk norm of heads, last": replace(_SMALL, qk_norm="head", qk_norm_last=True),
    "qk norm of all, last": replace(_SMALL, qk_norm="whole", qk_norm_last=True),
    "qk LayerNorm of heads": replace(_SMALL_GPT, qk_norm="head"),
    "qk LayerNorm, a weight for each head": replace(_SMALL, norm="layer", qk_norm="each"),
    "the same, last, with biases and offsets": replace(
        _SMALL_GPT, qk_norm="each", qk_norm_last=True, norm_offset=True
    ),
    "norms after": replace(_SMALL, norm_places="after"),
    "norms both": replace(_SMALL, norm_places="both"),
    "norms after, LayerNorm": replace(_SMALL_GPT, norm_places="after"),
    "norm offset": replace(_SMALL, norm_offset=True, rounding="gemma"),
    "norm offset, LayerNorm": replace(_SMALL_GPT, norm_offset=True),
    "norm product before the cast": replace(_SMALL, rounding="olmo"),
    "norm without weight": replace(_SMALL, norm_weight=False),
    "LayerNorm without weight": replace(_SMALL, norm="layer", norm_weight=False),
    "LayerNorm without bias": replace(_SMALL, norm="layer"),
    "LayerNorm with bias": replace(_SMALL, norm="layer", norm_bias=True),
    "score cap": replace(_SMALL, score_cap=2.0),
    "logit cap": replace(_SMALL, logit_cap=3.0),
    "embed scale": replace(_SMALL, embed_scale=6.1),
    "embed norm": replace(_SMALL, embed_norm=True),
    "bias of q, k, v": replace(_SMALL, biases=("qkv",)),
    "bias of o": replace(_SMALL, biases=("o",)),
    "bias of the MLP": replace(_SMALL, biases=("mlp",)),
    "bias of the head": replace(_SMALL, biases=("head",)),
    "bias of a LayerNorm head": replace(_SMALL_GPT, biases=("head", "qkv"), tied=False),
    "qkv clip": replace(_SMALL, qkv_clip=0.7),
    "NoPE layers": replace(_SMALL, layers=(Layer(), Layer(rope=""))),
    "NoPE everywhere": replace(_SMALL, layers=(Layer(rope=""),)),
    "second RoPE": replace(
        _SMALL, second_rope=RopeConfig(theta=100.0), layers=(Layer(rope="second_rope"), Layer())
    ),
    "scaled second RoPE": replace(
        _SMALL,
        second_rope=RopeConfig(theta=100.0, type="linear", factor=4.0),
        layers=(Layer(), Layer(rope="second_rope")),
    ),
    "only the second RoPE": replace(
        _SMALL, rope=None, second_rope=_PARTIAL, layers=(Layer(rope="second_rope"),)
    ),
    "partial RoPE": replace(_SMALL, rope=_PARTIAL),
    "partial yarn": replace(
        _SMALL,
        rope=RopeConfig(theta=1000.0, type="yarn", factor=4.0, original_context=32, share=0.6),
    ),
    "longrope": replace(
        _SMALL,
        rope=RopeConfig(
            type="longrope",
            factor=4.0,
            original_context=64,
            short_factor=(1.0, 1.1, 1.2, 1.3, 1.4),
            long_factor=(1.0, 1.5, 2.0, 3.0, 4.0),
        ),
    ),
    "dynamic RoPE": replace(
        _SMALL, rope=RopeConfig(type="dynamic", factor=4.0, original_context=64)
    ),
    "query growth": replace(_SMALL, query_growth=0.4, rope=RopeConfig(original_context=3)),
    "GeGLU": replace(_SMALL, activation="gelu_tanh"),
    "GeGLU, exact": replace(_SMALL, activation="gelu"),
    "ReGLU, squared": replace(_SMALL, activation="relu2"),
    "ungated SiLU": replace(_SMALL, gated=False),
    "ungated squared ReLU": replace(_SMALL, gated=False, activation="relu2"),
    "ungated GELU": replace(_SMALL, gated=False, activation="gelu_tanh"),
    "parallel": replace(_SMALL, parallel=True),
    "parallel, LayerNorm": replace(_SMALL_GPT, parallel=True),
    "parallel, norms after": replace(_SMALL, parallel=True, norm_places="after"),
    "residual scale": replace(_SMALL, residual_scale=0.3),
    "residual scale and norm": replace(_SMALL, residual_scale=0.3, norm_places="both"),
    "logit scale": replace(_SMALL, logit_scale=0.2),
    "logit scale and cap": replace(_SMALL, logit_scale=0.2, logit_cap=1.5, tied=True),
    "score scale": replace(_SMALL, score_scale=0.2),
    "sinks": replace(_SMALL, sinks=True),
    "like qwen2": replace(_SMALL, biases=("qkv",), tied=True),
    "like qwen3": replace(_SMALL, qk_norm="head", tied=True),
    "like gemma2": replace(
        _SMALL,
        rounding="gemma",
        norm_offset=True,
        norm_places="both",
        embed_scale=6.0,
        activation="gelu_tanh",
        window=5,
        layers=_WINDOWED,
        score_scale=0.3,
        score_cap=5.0,
        logit_cap=3.0,
        tied=True,
    ),
    "like gemma3": replace(
        _SMALL,
        rounding="gemma",
        norm_offset=True,
        norm_places="both",
        qk_norm="head",
        embed_scale=6.0,
        activation="gelu_tanh",
        window=5,
        rope=RopeConfig(theta=1000000.0, type="linear", factor=8.0),
        second_rope=RopeConfig(theta=10000.0),
        layers=(Layer(True, "second_rope"), Layer(True, "second_rope"), Layer()),
        score_scale=0.3,
        tied=True,
    ),
    "like olmo": replace(_SMALL, norm="layer", norm_weight=False, qkv_clip=0.7, rounding="olmo"),
    "like olmo2": replace(_SMALL, rounding="olmo", norm_places="after", qk_norm="whole"),
    "like smollm3": replace(_SMALL, layers=(Layer(), Layer(), Layer(rope="")), tied=True),
    "like cohere": replace(
        _SMALL,
        norm="layer",
        qk_norm="head",
        parallel=True,
        logit_scale=0.25,
        window=5,
        layers=(Layer(window=True), Layer(rope="")),
        tied=True,
    ),
    "like command r+": replace(
        _SMALL, norm="layer", qk_norm="each", parallel=True, logit_scale=0.25, tied=True
    ),
    "like granite": replace(
        _SMALL, embed_scale=12.0, residual_scale=0.22, logit_scale=0.125, score_scale=0.015625
    ),
    "like gpt-oss": replace(
        _SMALL,
        biases=("qkv", "o"),
        sinks=True,
        window=5,
        layers=_WINDOWED,
        rope=RopeConfig(
            theta=150000.0, type="yarn", factor=32.0, original_context=32, truncate=False
        ),
    ),
    "like ministral3": replace(
        _SMALL,
        query_growth=0.1,
        rope=RopeConfig(theta=1000000.0, type="yarn", factor=16.0, original_context=4),
        layers=(Layer(), Layer(), Layer(rope="")),
    ),
    "like phi": replace(
        _SMALL,
        norm="layer",
        norm_bias=True,
        parallel=True,
        biases=("qkv", "o", "mlp", "head"),
        rope=_PARTIAL,
        gated=False,
        activation="gelu_tanh",
    ),
    "like nanochat": replace(
        _SMALL,
        norm_weight=False,
        embed_norm=True,
        qk_norm="head",
        qk_norm_last=True,
        gated=False,
        activation="relu2",
        logit_cap=15.0,
    ),
}


def _traits(config: Config) -> set[tuple[str, Any]]:
    """What a config switches on, by field; of a number only that it is not the plain one."""
    found: set[tuple[str, Any]] = set()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ("biases", "layers"):
            found |= {(field.name, one) for one in value}
        elif isinstance(value, RopeConfig):
            found.add((field.name, (value.type, value.share != 1)))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.add((field.name, value != getattr(_SMALL, field.name)))
        else:
            found.add((field.name, value))
    return found


def few_features() -> list[Any]:
    """The names of FEATURES as cases: all but a few are `long`, and those few have every trait."""
    traits = {name: _traits(config) for name, config in FEATURES.items()}
    left, few = set().union(*traits.values()), set()
    while left:
        best = max(traits, key=lambda name: len(traits[name] & left))
        few.add(best)
        left -= traits[best]
    marks = {name: [] if name in few else [pytest.mark.long] for name in FEATURES}
    return [pytest.param(name, marks=marks[name], id=name) for name in FEATURES]


def in_turn(names: Iterable[str], *axes: Sequence[Any]) -> list[Any]:
    """Every name with every combination of the axes, as cases; all but one a name are `long`.

    The one that a name keeps is the one after that of the name before.
    """
    every, cases = list(product(*axes)), []
    for number, name in enumerate(names):
        for place, values in enumerate(every):
            words = "-".join(str(value).removeprefix("torch.") for value in (name, *values))
            marks = [pytest.mark.long] if number % len(every) != place else []
            cases.append(pytest.param(name, *values, marks=marks, id=words))
    return cases


def random_model(
    config: Config, dtype: torch.dtype = torch.float64, dialect: str = "hf", seed: int = 0
) -> Model:
    """A model in eval mode whose weights are large enough to make every step matter."""
    model = build(config, dialect)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):  # near 1, or what a norm has beyond 1
                parameter.copy_(values / 10 + (0 if config.norm_offset else 1))
            else:  # a sink is as large as a score, else it takes no share
                parameter.copy_(values if name.endswith("sinks") else values / 4)
    return model.to(dtype).eval()


def random_tokens(config: Config, *shape: int, seed: int = 0) -> Tensor:
    """Token ids, (B, T) or whatever `shape` says."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)
