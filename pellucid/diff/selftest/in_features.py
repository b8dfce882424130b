"""Faults of what families add to Llama: a feature left out, added, misplaced or read wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pellucid.diff.selftest import damage
from pellucid.diff.selftest.fault import Fault, every, fault, first_turned, head
from pellucid.diff.selftest.in_layers import ROPE, WINDOWS
from pellucid.diff.selftest.port import Port


def _as(**fields: Any) -> Port:
    """A port that reads these fields of the config as something else."""
    return Port(misreads=lambda config: replace(config, **fields))


def _first_norm(config: Any) -> str:
    """The first norm of the forward pass that has a weight."""
    if config.embed_norm:
        return "embed_normed"
    if config.norm_places != "after":
        return "layers.0.attn_norm"
    return "layers.0.attn.q_normed" if config.qk_norm else "layers.0.attn_out"


def _reads_heads(config: Any) -> str:
    """What reads normalised queries first."""
    turned = first_turned(config) and not config.qk_norm_last
    return "layers.0.attn.q_rotated" if turned else "layers.0.attn.scores"


def _into_mlp(config: Any) -> str:
    return "layers.0.mlp.gate" if config.gated else "layers.0.mlp.pre"


def _has_gelu(config: Any) -> bool:
    return "gelu" in config.activation


HEAD_NORMS = (
    fault(
        "q/k norm left out",
        _reads_heads,
        "q/k norm missing",
        applies=lambda c: bool(c.qk_norm),
        port=_as(qk_norm=""),
    ),
    fault(
        "q/k norm after RoPE",
        "layers.0.attn.q_normed",
        "q/k norm after RoPE",
        applies=every(first_turned, lambda c: c.qk_norm and not c.qk_norm_last),
        port=_as(qk_norm_last=True),
    ),
    fault(
        "q/k norm before RoPE",
        "layers.0.attn.q_rotated",
        "q/k norm before RoPE",
        applies=every(first_turned, lambda c: c.qk_norm and c.qk_norm_last),
        port=_as(qk_norm_last=False),
    ),
    fault(
        "q/k norm over all heads",
        "layers.0.attn.q_normed",
        "q/k norm over all heads",
        applies=lambda c: c.qk_norm in ("head", "each") and c.n_kv_heads > 1,
        port=_as(qk_norm="whole"),
    ),
    fault(
        "q/k norm of the first head for all",
        "layers.0.attn.q_normed",
        "q/k norm of one head for all",
        applies=lambda c: c.qk_norm == "each",
        port=Port(first_head_norm=True),
    ),
    fault(
        "q/k norm of each head",
        "layers.0.attn.q_normed",
        "q/k norm of each head",
        applies=lambda c: c.qk_norm == "whole" and c.n_heads > 1,
        port=_as(qk_norm="head"),
    ),
)

NORMS = (
    fault(
        "1 + weight read as weight",
        _first_norm,
        "norm weight plus one missing",
        applies=lambda c: c.norm_offset and c.norm_weight,
        port=_as(norm_offset=False),
    ),
    fault(
        "weight read as 1 + weight",
        _first_norm,
        "norm weight plus one",
        applies=lambda c: not c.norm_offset and c.norm_weight,
        port=_as(norm_offset=True),
    ),
    fault(
        "norms after instead of before",
        "layers.0.attn.q",
        "norms after instead of before",
        applies=lambda c: c.norm_places == "before" and c.norm_weight and not c.parallel,
        port=_as(norm_places="after"),
    ),
    fault(
        "norms before instead of after",
        "layers.0.attn.q",
        "norms before instead of after",
        applies=lambda c: c.norm_places == "after" and c.norm_weight and not c.parallel,
        port=_as(norm_places="before"),
    ),
    fault(
        "norms behind attention and MLP left out",
        "layers.0.attn_out",
        "norm missing",
        applies=lambda c: c.norm_places == "both",
        port=_as(norm_places="before"),
    ),
    fault(
        "norms before attention and MLP left out",
        "layers.0.attn.q",
        "norm missing",
        applies=lambda c: c.norm_places == "both",
        port=_as(norm_places="after"),
    ),
    fault(
        "norms behind attention and before the MLP exchanged",
        "layers.0.attn_out",
        "swapped weights",
        static="swapped weights",
        applies=lambda c: c.norm_places == "both" and c.norm_weight and not c.parallel,
        weights=damage.middle_norms_exchanged,
    ),
    fault(
        "norm of the embedding left out",
        "layers.0.resid_pre",
        "norm of the embedding missing",
        applies=lambda c: c.embed_norm,
        port=_as(embed_norm=False),
    ),
)

FACTORS = (
    fault(
        "score cap left out",
        "layers.0.attn.masked_scores",
        "score cap missing",
        applies=lambda c: c.score_cap > 0,
        port=_as(score_cap=0.0),
    ),
    fault(
        "logit cap left out",
        "logits",
        "logit cap missing",
        applies=lambda c: c.logit_cap > 0,
        port=_as(logit_cap=0.0),
    ),
    fault(
        "logit cap before the head",
        "raw_logits",
        "logit cap before the head",
        applies=lambda c: c.logit_cap > 0,
        port=Port(caps="what the head reads"),
    ),
    fault(
        "logit cap before the head, its product not seen",
        "logits",
        "logit cap before the head",
        applies=lambda c: c.logit_cap > 0,
        port=Port(caps="what the head reads"),
        hides=("raw_logits",),
    ),
    fault(
        "embedding scale left out",
        "layers.0.resid_pre",
        "embedding scale missing",
        applies=lambda c: c.embed_scale != 1,
        port=_as(embed_scale=1.0),
    ),
    fault(
        "embedding scale rounded",
        "embed_scaled",
        "embedding scale rounded",
        applies=lambda c: _rounded(c.embed_scale) != c.embed_scale,
        port=Port(misreads=lambda c: replace(c, embed_scale=_rounded(c.embed_scale))),
    ),
    fault(
        "residual multiplier left out",
        "layers.0.attn_out",
        "residual multiplier missing",
        applies=lambda c: c.residual_scale != 1,
        port=_as(residual_scale=1.0),
    ),
    fault(
        "residual multiplier inverted",
        "layers.0.attn_out",
        "residual multiplier inverted",
        applies=lambda c: c.residual_scale != 1,
        port=Port(misreads=lambda c: replace(c, residual_scale=1 / c.residual_scale)),
    ),
    fault(
        "logit multiplier left out",
        "logits",
        "logit multiplier missing",
        applies=lambda c: c.logit_scale != 1,
        port=_as(logit_scale=1.0),
    ),
    fault(
        "logit multiplier inverted",
        "logits",
        "logit multiplier inverted",
        applies=lambda c: c.logit_scale != 1,
        port=Port(misreads=lambda c: replace(c, logit_scale=1 / c.logit_scale)),
    ),
    fault(
        "score multiplier left out",
        "layers.0.attn.scores",
        "score multiplier missing",
        applies=lambda c: c.score_scale > 0,
        port=_as(score_scale=0.0),
    ),
    fault(
        "score multiplier inverted",
        "layers.0.attn.scores",
        "score multiplier inverted",
        applies=lambda c: c.score_scale not in (0, 1),
        port=Port(misreads=lambda c: replace(c, score_scale=1 / c.score_scale)),
    ),
    fault(
        "growth of the queries left out",
        "layers.0.attn.scores",
        "query growth missing",
        applies=lambda c: c.query_growth != 0,
        port=_as(query_growth=0.0),
    ),
    fault(
        "sinks left out",
        "layers.0.attn.pattern",
        "sinks missing",
        applies=lambda c: c.sinks,
        port=_as(sinks=False),
    ),
    fault(
        "sinks counted but not cut",
        "layers.0.attn.pattern",
        "sinks not cut",
        applies=lambda c: c.sinks,
        port=Port(sinks="kept"),
    ),
    fault(
        "clip of q, k, v left out",
        "layers.0.attn.q",
        "clip missing",
        applies=lambda c: c.qkv_clip > 0,
        port=_as(qkv_clip=0.0),
    ),
)


def _missing_bias(product: str, first: str | Callable[[Any], str], group: str) -> Fault:
    return fault(
        f"bias of {product} not added",
        first,
        "missing bias",
        applies=lambda c: group in c.biases and not (group == "head" and c.tied),
        port=Port(without_biases=(product,)),
    )


def _down(config: Any) -> str:
    plain = config.norm_places == "before" and config.residual_scale == 1
    return "layers.0.mlp_out" if plain else "layers.0.mlp.out"


BIASES = (
    _missing_bias("q_proj", "layers.0.attn.q", "qkv"),
    _missing_bias("k_proj", "layers.0.attn.k", "qkv"),
    _missing_bias("v_proj", "layers.0.attn.v", "qkv"),
    _missing_bias("down_proj", _down, "mlp"),
    _missing_bias("unembed", head, "head"),
)

BLOCKS = (
    fault(
        "parallel block in sequence",
        _into_mlp,
        "parallel block in sequence",
        applies=lambda c: c.parallel and c.norm_places == "before",
        port=_as(parallel=False),
    ),
    fault(
        "block in parallel",
        _into_mlp,
        "block in parallel",
        applies=lambda c: not c.parallel and c.norm_places == "before",
        port=_as(parallel=True),
    ),
    fault(
        "GELU for SiLU",
        "layers.0.mlp.act",
        "activation",
        applies=lambda c: c.activation == "silu",
        port=_as(activation="gelu_tanh"),
    ),
    fault(
        "SiLU for GELU",
        "layers.0.mlp.act",
        "activation",
        applies=_has_gelu,
        port=_as(activation="silu"),
    ),
    fault(
        "squared ReLU for GELU",
        "layers.0.mlp.act",
        "activation",
        applies=_has_gelu,
        port=_as(activation="relu2"),
    ),
    fault(
        "GELU tanh for erf",
        "layers.0.mlp.act",
        "GELU form",
        applies=lambda c: c.activation == "gelu",
        port=_as(activation="gelu_tanh"),
    ),
)


def _rounded(value: float) -> float:
    """A number as bfloat16 holds it."""
    return float(torch.tensor(value, dtype=torch.bfloat16))


FEATURES: tuple[Fault, ...] = (
    *HEAD_NORMS,
    *NORMS,
    *WINDOWS,
    *ROPE,
    *FACTORS,
    *BIASES,
    *BLOCKS,
)
