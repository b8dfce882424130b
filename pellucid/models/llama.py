"""Llama 1 to 3.3 (Touvron et al. 2023; Dubey et al. 2024), read from top to bottom.

B  batch                  C  width of the residual stream     V  vocabulary
T  tokens in this pass    H  query heads                      F  hidden width of the MLP
S  tokens seen so far     Hkv  key/value heads                D  head width

tokens ── embed ──┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ── … ── norm ── unembed ── logits
                  └─────────────────────┘  └──────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.models.attention import Mask, attend, positions_and_mask
from pellucid.models.cache import Cache, LayerCache
from pellucid.models.rope import RopeConfig, RotaryEmbedding, rotate
from pellucid.numerics import Dialect, dialect
from pellucid.trace import tap


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a Llama; the defaults are Llama 3 8B's."""

    family: ClassVar[Literal["llama"]] = "llama"
    vocab_size: int = 128256
    context_length: int = 8192
    width: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    hidden_width: int = 14336
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(theta=500000.0))
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context_length", "width", "n_layers", "n_heads", "n_kv_heads")
        for name in (*sizes, "head_dim", "hidden_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: RoPE turns pairs, it must be even")


class Llama(nn.Module):
    """Tokens to logits. `dialect` says whose rounding to reproduce in bfloat16."""

    def __init__(self, config: LlamaConfig, dialect_name: str = "hf") -> None:
        super().__init__()
        self.config = config
        self.dialect = dialect(dialect_name, "llama")
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.rope = RotaryEmbedding(config.rope, config.head_dim, self.dialect)
        self.layers = nn.ModuleList(Block(config, self.dialect) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps, self.dialect)
        self.unembed = (
            None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: Cache | None = None,
        starts: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """tokens (B, T) -> logits (B, T, V), or (B, 1, V) of the last token with `last`.

        `cache` holds the tokens before these and takes these in; `starts`, (B) or (B, T), says
        where in its row a text begins, after padding or after another text.
        """
        x = self.hidden(tokens, cache=cache, starts=starts)
        # A row with the strides of a longer text multiplies 40 times slower in bfloat16: copy it.
        return self.logits(x[:, -1:].clone(memory_format=torch.contiguous_format) if last else x)

    def hidden(
        self, tokens: Tensor, *, cache: Cache | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """tokens (B, T) -> normalised residual stream after the last block, (B, T, C)."""
        tokens = tap(self, "tokens", tokens)
        past = cache.length if cache else 0
        positions, allowed = positions_and_mask(tokens, past, starts)
        positions = tap(self, "positions", positions)
        mask = Mask(tap(self, "mask", allowed), plain=starts is None)
        x = tap(self, "embed", self.embed(tokens))  # (B, T, C)
        cos, sin = self.rope(positions, x.dtype)  # (T, D/2)
        caches = cache.layers if cache else [None] * len(self.layers)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, cos, sin, mask, layer_cache)
        return tap(self, "final_norm", self.norm(x))

    def logits(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V)."""
        logits = F.linear(x, self.embed.weight) if self.unembed is None else self.unembed(x)
        if self.dialect.logits == "float32":
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return tap(self, "logits", logits)


class Block(nn.Module):
    """Attention, then MLP, each reading a normalised stream and adding to it."""

    def __init__(self, config: LlamaConfig, dialect: Dialect) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps, dialect)
        self.attn = Attention(config, dialect)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, dialect)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = tap(self, "resid_pre", x)
        normed = tap(self, "attn_norm", self.attn_norm(x))
        x = x + tap(self, "attn_out", self.attn(normed, cos, sin, mask, cache))
        x = tap(self, "resid_mid", x)
        normed = tap(self, "mlp_norm", self.mlp_norm(x))
        x = x + tap(self, "mlp_out", self.mlp(normed))
        return tap(self, "resid_post", x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, 2019)."""

    def __init__(self, width: int, eps: float, dialect: Dialect) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.dialect = eps, dialect

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        inside = (
            x.dtype if self.dialect.norm == "x" else torch.promote_types(x.dtype, torch.float32)
        )
        wide = x.to(inside)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with RoPE on queries and keys (Ainslie et al., 2023)."""

    def __init__(self, config: LlamaConfig, dialect: Dialect) -> None:
        super().__init__()
        self.head_dim, self.dialect = config.head_dim, dialect
        width, bias = config.width, config.attention_bias
        self.q_proj = nn.Linear(width, config.n_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.n_kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.n_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, width, bias=bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: LayerCache | None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        q = tap(self, "q", self._heads(self.q_proj(x)))  # (B, H, T, D)
        k = tap(self, "k", self._heads(self.k_proj(x)))  # (B, Hkv, T, D)
        v = tap(self, "v", self._heads(self.v_proj(x)))  # (B, Hkv, T, D)
        q = tap(self, "q_rotated", rotate(q, cos, sin, self.dialect))
        k = tap(self, "k_rotated", rotate(k, cos, sin, self.dialect))
        if cache is not None:
            k, v = cache.append(k, v)  # (B, Hkv, S, D)
        z = attend(self, q, k, v, mask, self.dialect)  # (B, H, T, D)
        return self.o_proj(z.transpose(1, 2).flatten(2))  # heads side by side: (B, T, H·D)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) × up(x)) (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, hidden, bias = config.width, config.hidden_width, config.mlp_bias
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        gate = tap(self, "gate", self.gate_proj(x))  # (B, T, F)
        up = tap(self, "up", self.up_proj(x))
        act = tap(self, "act", F.silu(gate))
        return self.down_proj(tap(self, "hidden", act * up))
