"""A decoder (GPT-2, Llama and their relatives), read from top to bottom.

B  batch                  C  width of the residual stream     V  vocabulary
T  tokens in this pass    H  query heads                      F  hidden width of the MLP
S  tokens seen so far     Hkv  key/value heads                D  head width

tokens ── embed ──┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ── … ── norm ── unembed ── logits
                  └─────────────────────┘  └───────────────┘
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.models import parts
from pellucid.models.attention import (
    Mask,
    Scores,
    Starts,
    attend,
    capped,
    last_of,
    positions_and_mask,
)
from pellucid.models.cache import Cache, LayerCache
from pellucid.models.config import Layer, ModelConfig
from pellucid.models.rope import RotaryEmbedding, rotate
from pellucid.numerics import Dialect, dialect
from pellucid.trace import tap


class Places(NamedTuple):
    """Where a layer's tokens stand: the turns of its RoPE, if it has one, and its mask.

    growth: a factor on the queries of each position, (T) or (B, T), if they have one.
    """

    turns: tuple[Tensor, Tensor] | None  # cos, sin (T, D/2)
    mask: Mask
    growth: Tensor | None = None


PlacesOf = dict[Layer, Places]  # by the kind of a layer
Past = Cache | None  # the tokens before those of a pass


class Decoder(nn.Module):
    """Tokens to logits. `dialect` says whose rounding to reproduce in bfloat16."""

    rope: RotaryEmbedding  # where a layer asks for it, and so the second
    second_rope: RotaryEmbedding

    def __init__(self, config: ModelConfig, dialect_name: str = "hf") -> None:
        super().__init__()
        self.config, self.kinds, self.has_windows = config, config.kinds, config.has_windows
        self.dialect = dialect(dialect_name, config.rounding)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.embed_norm:
            self.embed_norm = parts.norm(config, self.dialect)
        if config.rope is None:
            self.pos_embed = nn.Embedding(config.context_length, config.width)
        self.ropes = sorted({kind.rope for kind in self.kinds} - {""})
        for name in self.ropes:
            self.add_module(name, parts.rotary(config, name, self.dialect))
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(Block(config, self.dialect) for _ in range(config.n_layers))
        self.norm = parts.norm(config, self.dialect)
        self.unembed = None if config.tied else parts.head(config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; quantised matrices keep another."""
        if self.norm.weight is not None:
            return self.norm.weight.dtype
        return getattr(self.embed, "dtype", None) or self.embed.weight.dtype  # quantised or not

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(chain(self.parameters(), self.buffers())).device

    def forward(
        self, tokens: Tensor, *, cache: Past = None, starts: Starts = None, last: bool = False
    ) -> Tensor:
        """tokens (B, T) -> logits (B, T, V), or (B, 1, V) of the last token with `last`.

        `cache` holds the tokens before these and takes these in. ValueError for more tokens than
        there are position embeddings.
        """
        x = self.hidden(tokens, cache=cache, starts=starts)
        # A row with the strides of a longer text multiplies 40 times slower in bfloat16: copy it.
        return self.logits(x[:, -1:].clone(memory_format=torch.contiguous_format) if last else x)

    def hidden(self, tokens: Tensor, *, cache: Past = None, starts: Starts = None) -> Tensor:
        """tokens (B, T) -> normalised residual stream after the last block, (B, T, C)."""
        tokens = tap(self, "tokens", tokens)
        positions, allowed = positions_and_mask(tokens, cache.length if cache else 0, starts)
        positions = tap(self, "positions", positions)
        mask = Mask(tap(self, "mask", allowed), plain=starts is None)
        x = self.embedded(tokens, positions, mask.allowed.shape[-1])  # (B, T, C)
        places = self.places(positions, mask, x.dtype)
        caches = cache.layers if cache else [None] * len(self.layers)
        for layer, kind, layer_cache in zip(self.layers, self.kinds, caches, strict=True):
            x = layer(x, places[kind], layer_cache)
        return tap(self, "final_norm", self.norm(x))

    def embedded(self, tokens: Tensor, positions: Tensor, seen: int) -> Tensor:
        """tokens (B, T) -> the residual stream before the first block, (B, T, C)."""
        x = tap(self, "embed", self.embed(tokens))
        if self.config.rope is None:
            x = self._with_positions(x, positions, seen)
        if self.config.embed_norm:
            x = tap(self, "embed_normed", self.embed_norm(x))
        if self.config.embed_scale != 1:
            x = tap(self, "embed_scaled", x * x.new_tensor(self.config.embed_scale))
        return self.dropout(x)

    def _with_positions(self, x: Tensor, positions: Tensor, seen: int) -> Tensor:
        if seen > self.config.context_length:
            raise ValueError(
                f"{seen} tokens, but there are position embeddings for only "
                f"{self.config.context_length}: crop to the last {self.config.context_length}"
            )
        return x + tap(self, "pos_embed", self.pos_embed(positions))

    def places(
        self, positions: Tensor, mask: Mask, dtype: torch.dtype, end: Tensor | None = None
    ) -> PlacesOf:
        """What each kind of layer needs of positions (T) or (B, T) and mask; `end` as `last_of`."""
        turns = {"": None} | {n: self.get_submodule(n)(positions, dtype) for n in self.ropes}
        growth = self._growth(positions, dtype) if self.config.query_growth else None
        masks = {False: mask, True: self._windowed(mask, end) if self.has_windows else mask}
        return {k: Places(turns[k.rope], masks[k.window], growth) for k in set(self.kinds)}

    def _growth(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        return tap(self, "query_growth", parts.growth(self.config, positions, dtype))

    def _windowed(self, mask: Mask, end: Tensor | None) -> Mask:
        allowed = last_of(mask.allowed, self.config.window, end)
        plain = mask.plain and allowed.shape[-1] <= self.config.window
        return Mask(tap(self, "window_mask", allowed), plain)

    def logits(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V)."""
        logits = F.linear(x, self.embed.weight) if self.unembed is None else self.unembed(x)
        if self.config.logit_scale != 1 or self.config.logit_cap:
            logits = tap(self, "raw_logits", logits) * self.config.logit_scale
            logits = capped(logits, self.config.logit_cap) if self.config.logit_cap else logits
        if self.dialect.logits == "float32":
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return tap(self, "logits", logits)


class Block(nn.Module):
    """Attention, then MLP, each adding to the stream; norms before them, after them, or both."""

    def __init__(self, config: ModelConfig, dialect: Dialect) -> None:
        super().__init__()
        before, after = config.norm_places != "after", config.norm_places != "before"
        self.parallel, self.scale = config.parallel, config.residual_scale
        self.attn_norm = parts.norm(config, dialect) if before else None
        self.attn = Attention(config, dialect)
        self.attn_out_norm = parts.norm(config, dialect) if after else None
        self.mlp_norm = parts.norm(config, dialect) if before and not config.parallel else None
        self.mlp = (parts.GatedMLP if config.gated else parts.MLP)(config, dialect)
        self.mlp_out_norm = parts.norm(config, dialect) if after else None
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, places: Places, cache: LayerCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = tap(self, "resid_pre", x)
        h = x if self.attn_norm is None else tap(self, "attn_norm", self.attn_norm(x))
        added = self.attn(h, places, cache)
        if self.attn_out_norm is not None or self.scale != 1:
            added = self._finished(tap(self, "attn.out", added), self.attn_out_norm)
        x = x + self.dropout(tap(self, "attn_out", added))
        if not self.parallel:
            x = tap(self, "resid_mid", x)
            h = x if self.mlp_norm is None else tap(self, "mlp_norm", self.mlp_norm(x))
        added = self.mlp(h)
        if self.mlp_out_norm is not None or self.scale != 1:
            added = self._finished(tap(self, "mlp.out", added), self.mlp_out_norm)
        x = x + self.dropout(tap(self, "mlp_out", added))
        return tap(self, "resid_post", x)

    def _finished(self, x: Tensor, norm: parts.Norm | None) -> Tensor:
        """What is added to the stream: normalised, scaled."""
        return (x if norm is None else norm(x)) * self.scale


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023), with RoPE where its layer has it."""

    def __init__(self, config: ModelConfig, dialect: Dialect) -> None:
        super().__init__()
        width, head_dim, qkv = config.width, config.head_dim, "qkv" in config.biases
        self.head_dim, self.dialect, self.attn_dropout = head_dim, dialect, config.attn_dropout
        self.scale, self.cap, self.clip = config.score_scale, config.score_cap, config.qkv_clip
        self.q_proj = nn.Linear(width, config.n_heads * head_dim, bias=qkv)
        self.k_proj = nn.Linear(width, config.n_kv_heads * head_dim, bias=qkv)
        self.v_proj = nn.Linear(width, config.n_kv_heads * head_dim, bias=qkv)
        self.o_proj = nn.Linear(config.n_heads * head_dim, width, bias="o" in config.biases)
        self.q_norm = parts.head_norm(config, dialect, config.n_heads)
        self.k_norm = parts.head_norm(config, dialect, config.n_kv_heads)
        self.norm_last = config.qk_norm_last
        self.sinks = nn.Parameter(torch.zeros(config.n_heads)) if config.sinks else None

    def forward(self, x: Tensor, places: Places, cache: LayerCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        q = tap(self, "q", self._heads(self.q_proj(x)))  # (B, H, T, D)
        k = tap(self, "k", self._heads(self.k_proj(x)))  # (B, Hkv, T, D)
        v = tap(self, "v", self._heads(self.v_proj(x)))  # (B, Hkv, T, D)
        q, k = (q, k) if self.norm_last else self._normed(q, k)
        if places.turns is not None:
            q = tap(self, "q_rotated", rotate(q, *places.turns, self.dialect))
            k = tap(self, "k_rotated", rotate(k, *places.turns, self.dialect))
        q, k = self._normed(q, k) if self.norm_last else (q, k)
        if places.growth is not None:
            q = tap(self, "q_scaled", q * places.growth[..., None, :, None])  # alike for all heads
        k, v = (k, v) if cache is None else cache.append(k, v)  # (B, Hkv, S, D)
        dropout = self.attn_dropout * self.training
        how = Scores(self.scale, self.cap, self.sinks, self.dialect, dropout)
        z = attend(self, q, k, v, places.mask, how)  # (B, H, T, D)
        return self.o_proj(z.transpose(1, 2).flatten(2))  # heads side by side: (B, T, H·D)

    def _heads(self, x: Tensor) -> Tensor:
        x = x.clamp(-self.clip, self.clip) if self.clip else x
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return tap(self, "q_normed", self.q_norm(q)), tap(self, "k_normed", self.k_norm(k))
