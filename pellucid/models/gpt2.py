"""GPT-2 (Radford et al. 2019), read from top to bottom.

B  batch                  C  width of the residual stream     V  vocabulary
T  tokens in this pass    H  heads                            F  hidden width of the MLP
S  tokens seen so far     D  head width = C / H

tokens ── embed + pos_embed ──┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ── … ── norm ── unembed
                              └─────────────────────┘  └───────────────┘
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.models.attention import Mask, attend, positions_and_mask
from pellucid.models.cache import Cache, LayerCache
from pellucid.numerics import Dialect, dialect
from pellucid.trace import tap


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of a GPT-2; the defaults are the 124M model's.

    ``GPTConfig(qkv_bias=False, tied=False)`` is the model of "Build an LLM from scratch".
    `gelu` is "tanh", the original's approximation, or "erf", the exact form of some descendants.
    """

    family: ClassVar[Literal["gpt2"]] = "gpt2"
    vocab_size: int = 50257
    context_length: int = 1024
    width: int = 768
    n_layers: int = 12
    n_heads: int = 12
    hidden_width: int = 0  # 0: four times the width
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    tied: bool = True
    gelu: Literal["tanh", "erf"] = "tanh"
    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    resid_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "width", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} does not divide into {self.n_heads} heads")
        if self.gelu not in ("tanh", "erf"):
            raise ValueError(f"unknown gelu {self.gelu!r}: expected 'tanh' or 'erf'")
        if not self.hidden_width:
            object.__setattr__(self, "hidden_width", 4 * self.width)
        if self.hidden_width < 1:
            raise ValueError(f"hidden_width is {self.hidden_width}: expected 1 or more")
        for name in ("embed_dropout", "attn_dropout", "resid_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a share, 0 to 1")

    @property
    def n_kv_heads(self) -> int:
        """Every head has keys and values of its own."""
        return self.n_heads

    @property
    def head_dim(self) -> int:
        """D = C / H."""
        return self.width // self.n_heads


class GPT2(nn.Module):
    """Tokens to logits. `dialect` says whose rounding to reproduce in bfloat16."""

    def __init__(self, config: GPTConfig, dialect_name: str = "hf") -> None:
        super().__init__()
        self.config = config
        self.dialect = dialect(dialect_name, "gpt2")
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Embedding(config.context_length, config.width)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(Block(config, self.dialect) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
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
        where in its row a text begins, after padding or after another text. ValueError past
        `context_length`.
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
        if past + tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"{past + tokens.shape[1]} tokens, but there are position embeddings for only "
                f"{self.config.context_length}: crop to the last {self.config.context_length}"
            )
        positions, allowed = positions_and_mask(tokens, past, starts)
        positions = tap(self, "positions", positions)
        mask = Mask(tap(self, "mask", allowed), plain=starts is None)
        x = tap(self, "embed", self.embed(tokens))  # (B, T, C)
        x = self.dropout(x + tap(self, "pos_embed", self.pos_embed(positions)))
        caches = cache.layers if cache else [None] * len(self.layers)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, mask, layer_cache)
        return tap(self, "final_norm", self.norm(x))

    def logits(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V)."""
        logits = F.linear(x, self.embed.weight) if self.unembed is None else self.unembed(x)
        if self.dialect.logits == "float32":
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return tap(self, "logits", logits)


class Block(nn.Module):
    """Attention, then MLP, each reading a normalised stream and adding to it."""

    def __init__(self, config: GPTConfig, dialect: Dialect) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config, dialect)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config, dialect)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, mask: Mask, cache: LayerCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = tap(self, "resid_pre", x)
        normed = tap(self, "attn_norm", self.attn_norm(x))
        x = x + self.dropout(tap(self, "attn_out", self.attn(normed, mask, cache)))
        x = tap(self, "resid_mid", x)
        normed = tap(self, "mlp_norm", self.mlp_norm(x))
        x = x + self.dropout(tap(self, "mlp_out", self.mlp(normed)))
        return tap(self, "resid_post", x)


class Attention(nn.Module):
    """Multi-head causal attention (Vaswani et al., 2017)."""

    def __init__(self, config: GPTConfig, dialect: Dialect) -> None:
        super().__init__()
        self.head_dim, self.dialect = config.head_dim, dialect
        self.attn_dropout = config.attn_dropout
        self.q_proj = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Mask, cache: LayerCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        q = tap(self, "q", self._heads(self.q_proj(x)))  # (B, H, T, D)
        k = tap(self, "k", self._heads(self.k_proj(x)))
        v = tap(self, "v", self._heads(self.v_proj(x)))
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        dropout = self.attn_dropout if self.training else 0.0
        z = attend(self, q, k, v, mask, self.dialect, dropout)  # (B, H, T, D)
        return self.o_proj(z.transpose(1, 2).flatten(2))  # heads side by side: (B, T, C)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)


class MLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: GPTConfig, dialect: Dialect) -> None:
        super().__init__()
        self.gelu: Literal["tanh", "erf"] = config.gelu
        self.composed = dialect.gelu == "composed"
        self.up_proj = nn.Linear(config.width, config.hidden_width)
        self.down_proj = nn.Linear(config.hidden_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        pre = tap(self, "pre", self.up_proj(x))  # (B, T, F)
        return self.down_proj(tap(self, "act", gelu(pre, self.gelu, self.composed)))


def gelu(x: Tensor, form: Literal["tanh", "erf"], composed: bool) -> Tensor:
    """Gaussian error linear unit (Hendrycks & Gimpel, 2016), elementwise.

    `composed` takes the tanh form one operation at a time, as transformers and the book do: in
    bfloat16 each of them rounds.
    """
    if form == "erf":
        return F.gelu(x)
    if not composed:
        return F.gelu(x, approximate="tanh")
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))
