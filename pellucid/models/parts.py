"""The parts a block is made of: norms and MLPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.models.config import Activation, ModelConfig
from pellucid.models.rope import RotaryEmbedding
from pellucid.numerics import Dialect
from pellucid.trace import tap

Norm: TypeAlias = "RMSNorm | LayerNorm"


def norm(config: ModelConfig, dialect: Dialect, width: int = 0) -> Norm:
    """The norm of a config, over its width or another."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(
        config, width or config.width, dialect
    )


def head_norm(config: ModelConfig, dialect: Dialect, heads: int) -> Norm | HeadNorms | None:
    """The norm of queries or keys of so many heads; None where they have none."""
    if not config.qk_norm:
        return None
    if config.qk_norm == "each":
        return HeadNorms(config, heads * config.head_dim)
    if config.qk_norm == "whole":
        return WholeNorm(config, heads * config.head_dim, dialect)
    return norm(config, dialect, config.head_dim)


def growth(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Factor on the queries at positions (T) or (B, T), of their shape: 1, and slowly more."""
    assert config.rope is not None and config.rope.original_context, "checked by the config"
    working = torch.promote_types(dtype, torch.float32)
    contexts = torch.floor(positions.to(working) / config.rope.original_context)
    return (1 + config.query_growth * torch.log(1 + contexts)).to(dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, 2019)."""

    def __init__(self, config: ModelConfig, width: int, dialect: Dialect) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_weight else None
        self.eps, self.offset, self.dialect = config.norm_eps, config.norm_offset, dialect

    def forward(self, x: Tensor) -> Tensor:
        """x (…, C) -> (…, C)."""
        wide = x if self.dialect.norm == "x" else x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = x.new_ones(()) if self.weight is None else self.weight
        weight = 1.0 + weight.to(wide.dtype) if self.offset else weight
        cast_last = self.dialect.norm_product == "float32"
        return (normed * weight).to(x.dtype) if cast_last else normed.to(x.dtype) * weight


class WholeNorm(RMSNorm):
    """All heads of a token normalised together: (B, H, T, D) as H · D numbers (OLMo 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, T, D) -> (B, H, T, D)."""
        flat = super().forward(x.transpose(1, 2).flatten(2))
        return flat.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(variance + eps) · weight + bias over the last axis (Ba et al., 2016)."""

    def __init__(self, config: ModelConfig, width: int, dialect: Dialect) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if config.norm_bias else None
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        """x (…, C) -> (…, C)."""
        weight = self.weight if self.weight is None or not self.offset else 1.0 + self.weight
        return F.layer_norm(x, x.shape[-1:], weight, self.bias, self.eps)


class HeadNorms(nn.Module):
    """LayerNorm of each head with a weight of its own and no bias (Command R+, StableLM 2)."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))  # head after head
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, T, D) -> (B, H, T, D)."""
        weight = 1.0 + self.weight if self.offset else self.weight
        heads, own = x.unbind(1), weight.chunk(x.shape[1])  # (B, T, D) and (D) each
        y = [F.layer_norm(h, w.shape, w, None, self.eps) for h, w in zip(heads, own, strict=True)]
        return torch.stack(y, dim=1)


def rotary(config: ModelConfig, name: str, dialect: Dialect) -> RotaryEmbedding:
    """A RoPE of the config, by the name of its field."""
    return RotaryEmbedding(getattr(config, name), config.head_dim, dialect)


def head(config: ModelConfig) -> nn.Linear:
    """The matrix that logits come from, where it is not the embedding."""
    return nn.Linear(config.width, config.vocab_size, bias="head" in config.biases)


def activation(form: Activation, dialect: Dialect) -> Callable[[Tensor], Tensor]:
    """SiLU, squared ReLU, or GELU (Hendrycks & Gimpel, 2016), exact or by tanh; elementwise."""
    if form == "gelu_new" and dialect.gelu == "composed":
        return composed_gelu
    return {
        "silu": F.silu,
        "relu2": squared_relu,
        "gelu": F.gelu,
        "gelu_tanh": tanh_gelu,
        "gelu_new": tanh_gelu,
    }[form]


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return F.relu(x).square()


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU's tanh form in one kernel, which rounds once."""
    return F.gelu(x, approximate="tanh")


def composed_gelu(x: Tensor) -> Tensor:
    """GELU's tanh form one operation at a time, as transformers' GPT-2 and the book take it.

    In bfloat16 each of them rounds; one kernel rounds once.
    """
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


class GatedMLP(nn.Module):
    """down(act(gate(x)) × up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, dialect: Dialect) -> None:
        super().__init__()
        width, hidden, bias = config.width, config.hidden_width, "mlp" in config.biases
        self.activation = activation(config.activation, dialect)
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        gate = tap(self, "gate", self.gate_proj(x))  # (B, T, F)
        up = tap(self, "up", self.up_proj(x))
        act = tap(self, "act", self.activation(gate))
        return self.down_proj(tap(self, "hidden", act * up))


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: ModelConfig, dialect: Dialect) -> None:
        super().__init__()
        width, hidden, bias = config.width, config.hidden_width, "mlp" in config.biases
        self.activation = activation(config.activation, dialect)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        pre = tap(self, "pre", self.up_proj(x))  # (B, T, F)
        return self.down_proj(tap(self, "act", self.activation(pre)))
