"""Norms: where a model has one, and of which kind, follows from its config.

Each place of a norm is one step, but for a LayerNorm before attention, the first that a reader
meets: it is taken apart into four.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from pellucid.walk.arithmetic import layer_norm, one_and, rms_norm
from pellucid.walk.steps import Scope, Script

# ── One norm, of x: x, weight and bias are other names at each place ──────────────────────────────

_norm = Script()
_step = partial(_norm.step, "layer", "NAME", called="normed")


def _offset(config, layer):
    return config.norm_offset and config.norm_weight


@_step(
    "{x} / √(mean square + {norm_eps}) × {weight}",
    when=lambda config, layer: config.norm == "rms" and not _offset(config, layer),
)
def rms(x, weight, norm_eps, dialect, wide):
    """RMS"""
    return rms_norm(x, weight, norm_eps, dialect, wide)


@_step(
    "{x} / √(mean square + {norm_eps}) × (1 + {weight})",
    when=lambda config, layer: config.norm == "rms" and _offset(config, layer),
)
def rms_beyond_one(x, weight, norm_eps, dialect, wide):
    """RMS"""
    return rms_norm(x, one_and(weight, x, dialect, wide), norm_eps, dialect, wide)


@_step(
    "LayerNorm of {x} with {weight}, {bias}",
    when=lambda config, layer: config.norm == "layer" and not _offset(config, layer),
)
def layer_norm_of_all(x, weight, bias, norm_eps, wide, dtype):
    """LAYER"""
    return layer_norm(x, weight, bias, norm_eps, wide, dtype)


@_step(
    "LayerNorm of {x} with 1 + {weight}, {bias}",
    when=lambda config, layer: config.norm == "layer" and _offset(config, layer),
)
def layer_norm_beyond_one(x, weight, bias, norm_eps, wide, dtype):
    """LAYER"""
    return layer_norm(x, 1 + weight, bias, norm_eps, wide, dtype)


def norm_of(
    x: str,
    variable: str,
    per: Scope,
    name: str,
    *,
    module: str,
    title: str,
    layer: str = "",
    dims: tuple[str, ...] | None = None,
    weight: str = "",
) -> Script:
    """The step that normalises `x`, as a script to include; `layer`: its title for a LayerNorm.

    Weight and bias are those of `module`, the checkpoint's name for the norm; `weight`: the name of
    a part of it.
    """
    own = "final_norm" if module == "norm" else module.rpartition(".")[2]
    script = Script({f"{own}_weight": f"{module}.weight", f"{own}_bias": f"{module}.bias"})
    words = {"x": x, "normed": variable, "weight": weight or f"{own}_weight", "bias": f"{own}_bias"}
    script.include(_norm, words, {"RMS": title, "LAYER": layer or title})
    index = per if per in ("kv_head", "head") else None
    place = partial(replace, per=per, name=name, index=index, dims=dims)
    script.lines = [place(line) for line in script.lines]
    return script


# ── A LayerNorm before attention, in four steps (Ba et al., 2016) ─────────────────────────────────

in_four = Script(
    {
        "attn_norm_weight": "layers.N.attn_norm.weight",  # (C)
        "attn_norm_bias": "layers.N.attn_norm.bias",  # (C)
    }
)
each_layer = partial(in_four.step, "layer")


@each_layer("layers.N.attn_norm.mean", "mean of {resid_pre} over each row", dims="T 1")
def attn_norm_mean(resid_pre, wide):
    """Where each token's row is centred"""
    return resid_pre.to(wide).mean(-1, keepdim=True)


@each_layer("layers.N.attn_norm.variance", "mean of ({resid_pre} - {attn_norm_mean})²", dims="T 1")
def attn_norm_variance(resid_pre, attn_norm_mean):
    """How far its components spread"""
    return (resid_pre - attn_norm_mean).square().mean(-1, keepdim=True)


@each_layer(
    "layers.N.attn_norm.normalised",
    "({resid_pre} - {attn_norm_mean}) / √({attn_norm_variance} + {norm_eps})",
    dims="T C",
)
def attn_norm_normalised(resid_pre, attn_norm_mean, attn_norm_variance, norm_eps):
    """Every token centred, with spread 1"""
    return (resid_pre - attn_norm_mean) * torch.rsqrt(attn_norm_variance + norm_eps)


@each_layer(
    "layers.N.attn_norm",
    "{attn_norm_normalised} × {attn_norm_weight} + {attn_norm_bias}",
    when=lambda config, layer: not _offset(config, layer),
)
def attn_norm(attn_norm_normalised, attn_norm_weight, attn_norm_bias, dtype):
    """Scaled and shifted as the layer has learned"""
    return (attn_norm_normalised * attn_norm_weight + attn_norm_bias).to(dtype)


@each_layer(
    "layers.N.attn_norm",
    "{attn_norm_normalised} × (1 + {attn_norm_weight}) + {attn_norm_bias}",
    called="attn_norm",
    when=_offset,
)
def attn_norm_beyond_one(attn_norm_normalised, attn_norm_weight, attn_norm_bias, dtype):
    """Scaled and shifted as the layer has learned"""
    return (attn_norm_normalised * (1 + attn_norm_weight) + attn_norm_bias).to(dtype)
