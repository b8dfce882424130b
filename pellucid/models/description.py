"""A config as JSON and back, for trace files, recordings and reports.

What a Llama or a GPT-2 needs to state has had its keys since the first version; files with them
exist. Any other config states its sizes and every field that is not `ModelConfig`'s default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from pellucid.models.config import GPTConfig, Layer, LlamaConfig, ModelConfig
from pellucid.models.rope_scaling import RopeConfig

_SIZES = ("vocab_size", "context_length", "width", "n_layers", "n_heads", "n_kv_heads", "head_dim")
_DROPOUT = ("embed_dropout", "attn_dropout", "resid_dropout")
_ROPES = ("rope", "second_rope")


def describe(config: ModelConfig) -> dict[str, Any]:
    """The config's fields as JSON holds them, with ``family`` first."""
    spelt: tuple[tuple[Callable[..., ModelConfig], Callable[..., dict[str, Any]]], ...] = (
        (LlamaConfig, _as_llama),
        (GPTConfig, _as_gpt),
    )
    for make, spell in spelt:
        stated = spell(config)
        try:
            fits = make(**{**stated, **_ropes(stated)}) == config
        except ValueError:
            fits = False
        if fits:
            return {"family": config.family, **stated}
    return {"family": config.family, **_as_fields(config)}


def describe_fields(config: ModelConfig) -> dict[str, Any]:
    """As `describe`, without the family, for reports in which it stands beside the fields."""
    return {name: value for name, value in describe(config).items() if name != "family"}


def described_config(description: Mapping[str, Any]) -> ModelConfig:
    """The config that `describe` wrote; ValueError or TypeError for one that it did not."""
    stated = {**description, **_ropes(description)}
    for key, make in (("attention_bias", LlamaConfig), ("qkv_bias", GPTConfig)):
        if key in stated:
            return make(**{name: value for name, value in stated.items() if name != "family"})
    stated["biases"] = tuple(stated.get("biases", ()))
    stated["layers"] = tuple(Layer(*layer) for layer in stated.get("layers", ()))
    return ModelConfig(**stated)


def _as_llama(config: ModelConfig) -> dict[str, Any]:
    shape = {name: getattr(config, name) for name in (*_SIZES, "hidden_width", "norm_eps")}
    head = {"rope": _rope_as_json(config.rope), "tied": config.tied}
    biases = {"attention_bias": "qkv" in config.biases, "mlp_bias": "mlp" in config.biases}
    return {**shape, **head, **biases}


def _as_gpt(config: ModelConfig) -> dict[str, Any]:
    shape = {name: getattr(config, name) for name in (*_SIZES[:5], "hidden_width", "norm_eps")}
    head = {"qkv_bias": "qkv" in config.biases, "tied": config.tied}
    gelu = {"gelu": "erf" if config.activation == "gelu" else "tanh"}
    return {**shape, **head, **gelu, **{name: getattr(config, name) for name in _DROPOUT}}


def _as_fields(config: ModelConfig) -> dict[str, Any]:
    always = (*_SIZES, "hidden_width", "norm_eps", "rope", "tied", "biases", "rounding")
    plain = ModelConfig()
    stated = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name in always or getattr(config, field.name) != getattr(plain, field.name)
    }
    return {
        name: _rope_as_json(value) if name in _ROPES else _listed(value)
        for name, value in stated.items()
        if name != "family"
    }


def _listed(value: Any) -> Any:
    """Tuples, also inside tuples, as JSON's lists."""
    return [_listed(part) for part in value] if isinstance(value, tuple) else value


def _rope_as_json(rope: RopeConfig | None) -> dict[str, Any] | None:
    if rope is None:
        return None
    unsaid = {"share": 1.0, "short_factor": (), "long_factor": ()}  # newer than the first files
    stated = {k: v for k, v in asdict(rope).items() if k not in unsaid or v != unsaid[k]}
    return {name: _listed(value) for name, value in stated.items()}


def _ropes(stated: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: stated[name] for name in _ROPES if name in stated}
    return {name: None if value is None else _rope(value) for name, value in found.items()}


def _rope(stated: Mapping[str, Any]) -> RopeConfig:
    listed = {name: x for name, x in stated.items() if isinstance(x, list)}
    values: dict[str, Any] = {**stated, **{name: tuple(x) for name, x in listed.items()}}
    return RopeConfig(**values)
