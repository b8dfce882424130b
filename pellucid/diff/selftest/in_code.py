"""Faults of a port's code and config: norms, attention, MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pellucid import graph
from pellucid.diff.selftest import damage
from pellucid.diff.selftest.fault import (
    Fault,
    every,
    fault,
    head,
    learned,
    normed_before,
    plain_scores,
    product,
)
from pellucid.diff.selftest.in_places import PLACES, ROPE
from pellucid.diff.selftest.port import Port


def _rms(config: Any) -> bool:
    return config.norm == "rms"


def _layer_norm(config: Any) -> bool:
    return config.norm == "layer"


def _mlp_norm(config: Any) -> bool:
    return config.norm_weight and graph.has(config, "mlp_norm")


def _after_attention(config: Any) -> str:
    return "layers.0.resid_post" if config.parallel else "layers.0.resid_mid"


NORMS = (
    fault(
        "eps 1e-6 for 1e-5",
        "layers.0.attn_norm",
        "norm eps",
        static="norm eps",
        with_config=lambda c: replace(c, norm_eps=1e-5),
        config=lambda c: replace(c, norm_eps=1e-6),
        applies=normed_before,
        rows="long",  # in bfloat16 it moves one value in a thousand over an edge of rounding
    ),
    fault(
        "eps 3e-4 for 1e-5, in the code",
        "layers.0.attn_norm",
        "norm eps",
        port=Port(eps=3e-4),
        with_config=lambda c: replace(c, norm_eps=1e-5),
        applies=normed_before,
    ),
    fault(
        "RMSNorm all in bfloat16",
        "layers.0.attn_norm",
        "norm cast order",
        port=Port(norm_dtype=torch.bfloat16),
        applies=every(_rms, normed_before),
    ),
    fault(
        "norm weight plus one",
        "layers.1.mlp_norm",
        "norm weight plus one",
        static="norm weight plus one",
        weights=damage.norm_plus_one,
        applies=_mlp_norm,
    ),
    fault(
        "LayerNorm bias dropped",
        "layers.1.attn_norm",
        "missing bias",
        static="missing bias",
        weights=damage.without_norm_bias,
        applies=every(normed_before, lambda c: c.norm_bias),
    ),
    fault(
        "LayerNorm for RMSNorm",
        "layers.0.attn_norm",
        "LayerNorm for RMSNorm",
        port=Port(norm="with mean"),
        applies=every(_rms, normed_before),
    ),
    fault(
        "RMSNorm for LayerNorm",
        "layers.0.attn_norm",
        "RMSNorm for LayerNorm",
        port=Port(norm="without mean"),
        applies=every(_layer_norm, normed_before),
    ),
    fault(
        "variance over C - 1",
        "layers.0.attn_norm",
        "unbiased variance",
        port=Port(norm="unbiased"),
        applies=every(_layer_norm, normed_before),
    ),
    fault(
        "norm squares overflow float16",
        "layers.0.attn_norm",
        "float16 overflow",
        port=Port(square_dtype=torch.float16),
        with_weights=damage.massive_channel,
        applies=normed_before,
    ),
    fault("final norm missing", head, "final norm missing", port=Port(final_norm=False)),
)


ATTENTION = (
    fault(
        "GQA heads tiled",
        "layers.0.attn.scores",
        "GQA heads tiled",
        applies=lambda c: 1 < c.n_kv_heads < c.n_heads,
        port=Port(heads="tiled"),
    ),
    fault("scores not scaled", "layers.0.attn.scores", "attention scale", port=Port(scale="none")),
    fault(
        "scores scaled by the model's width",
        "layers.0.attn.scores",
        "attention scale",
        port=Port(scale="1/sqrt C"),
    ),
    fault("scores scaled by D", "layers.0.attn.scores", "attention scale", port=Port(scale="1/D")),
    fault(
        "scores scaled by D, in a fused kernel",
        "layers.0.attn.z",
        "attention scale",
        port=Port(scale="1/D", fused=True),
        applies=plain_scores,
    ),
    fault("mask one too wide", "mask", "mask one too wide", port=Port(mask="wide")),
    fault("mask one too narrow", "mask", "mask one too narrow", port=Port(mask="narrow")),
    fault("mask missing", "mask", "mask missing", port=Port(mask="none")),
    fault(
        "mask one too wide, mask not seen",
        "layers.0.attn.masked_scores",
        "mask one too wide",
        port=Port(mask="wide"),
        hides=("mask",),
    ),
    fault(
        "mask one too wide, in a fused kernel",
        "layers.0.attn.z",
        "mask one too wide",
        port=Port(mask="wide", fused=True),
        hides=("mask",),
        applies=plain_scores,
    ),
    fault(
        "top-left mask with a cache",
        "step.1.mask",
        "top-left causal mask",
        port=Port(mask="top-left"),
        steps=2,
    ),
    fault(
        "softmax in bfloat16",
        "layers.0.attn.pattern",
        "softmax precision",
        port=Port(softmax_dtype=torch.bfloat16),
        applies=lambda c: not c.sinks,
    ),
    fault(
        "heads joined without moving them",
        product("attn", 0),
        "heads joined wrongly",
        port=Port(joined="by head"),
    ),
    fault(
        "attention dropout left on",
        "layers.0.attn.pattern",
        "dropout left on",
        port=Port(dropout="attention"),
        applies=plain_scores,
    ),
)

STREAM = (
    fault(
        "embedding times the root of its width",
        "embed",
        "embedding scaled",
        port=Port(embed_scale=True),
    ),
    fault(
        "embedding dropout left on",
        "layers.0.resid_pre",
        "dropout left on",
        port=Port(dropout="embedding"),
        applies=learned,
    ),
    fault(
        "residual after the norm",
        _after_attention,
        "residual after the norm",
        port=Port(residual="normed"),
        applies=lambda c: c.norm_places != "after",
    ),
    fault(
        "residual of the MLP from before attention",
        "layers.0.resid_post",
        "residual from before attention",
        port=Port(parallel=True),
        applies=lambda c: not c.parallel,
    ),
    fault(
        "GELU erf for tanh",
        "layers.0.mlp.act",
        "GELU form",
        static="GELU form",
        config=lambda c: replace(c, activation="gelu"),
        applies=lambda c: c.activation in ("gelu_tanh", "gelu_new"),
    ),
    fault(
        "GELU by sigmoid",
        "layers.0.mlp.act",
        "GELU form",
        port=Port(activation="sigmoid"),
        applies=lambda c: "gelu" in c.activation,
    ),
    fault("ReLU", "layers.0.mlp.act", "activation", port=Port(activation="relu")),
    fault(
        "SwiGLU on the wrong branch",
        "layers.0.mlp.act",
        "SwiGLU on the wrong branch",
        port=Port(branch="up"),
        applies=lambda c: c.gated,
    ),
)

CODE: tuple[Fault, ...] = (*ROPE, *ATTENTION, *PLACES, *NORMS, *STREAM)
