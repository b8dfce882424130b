"""A second implementation of the decoder, with switches for the mistakes that ports make.

Written from the papers in the style of a typical port, sharing no arithmetic with
`pellucid.models`: a fault in it is a fault of another program, not a patched copy of ours.
It reads the features of a config and writes every named tensor it computes into a dictionary, as
an engineer with a debugger would.

B  batch    T  tokens in this pass    S  tokens seen so far    D  head width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.diff.selftest import arithmetic
from pellucid.diff.selftest.arithmetic import inverse_frequencies
from pellucid.diff.selftest.port import Port
from pellucid.diff.sides.side import Batch
from pellucid.prompts import padded
from pellucid.trace import Trace

__all__ = ["Engine", "Port", "inverse_frequencies"]

DROPPED = 0.1
Turns = tuple[Tensor, Tensor]  # cos and sin
# no batch axis without padding
_SHARED = ("positions", "mask", "cos", "sin", "pos_embed", "query_growth")
# What no hook on a module sees.
_NO_MODULE = (
    *("positions", "mask", "rope.cos", "rope.sin", "q_rotated", "k_rotated", "attn.scores"),
    *("capped_scores", "masked_scores", "pattern", "attn.z"),
)
# Where a norm should have a weight and has none: what a port that norms elsewhere has at hand.
_INSTEAD = {
    "attn_norm": ("attn_out_norm",),
    "attn_out_norm": ("attn_norm",),
    "mlp_norm": ("mlp_out_norm", "attn_norm"),
    "mlp_out_norm": ("mlp_norm",),
}


class Engine:
    """One model as this port runs it."""

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        port: Port,
        *,
        copies: int = 1,
        hides: tuple[str, ...] = (),
    ) -> None:
        self.config = port.misreads(config) if port.misreads else config
        self.port, self.dtype = port, dtype
        self.copies, self.hides = copies, hides
        self.weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.seen: dict[str, Tensor] = {}
        self.prefix = ""

    @torch.no_grad()
    def run(self, rows: Batch, steps: int) -> Trace:
        """The prompt, then decoding steps with a cache, greedy or along ``rows.following``."""
        self.seen, self.prefix = {}, ""
        self.random = torch.Generator().manual_seed(0)
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        following = getattr(rows, "following", None)
        tokens, padding = padded([row for _ in range(self.copies) for row in rows])
        past = 0
        for step in range(steps + 1):
            self.prefix = f"step.{step}." if step else ""
            logits = self._forward(tokens, past, padding)
            past += tokens.shape[1]
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            if following and step < steps:
                tokens = torch.tensor([[row[step]] for row in following] * self.copies)
        if self.copies == 1:
            return Trace(self.seen)
        return Trace(
            {
                name: tensor if name.endswith(_SHARED) and padding is None else tensor[: len(rows)]
                for name, tensor in self.seen.items()
            }
        )

    def see(self, name: str, tensor: Tensor) -> Tensor:
        """Write a tensor down and hand it back."""
        hidden = (*_NO_MODULE, *self.hides) if self.port.hooked else self.hides
        if not name.endswith(hidden):
            self.seen[self.prefix + name] = tensor
        return tensor

    def _forward(self, tokens: Tensor, past: int, padding: Tensor | None) -> Tensor:
        self.see("tokens", tokens)
        positions, allowed = self._places(tokens.shape[1], past, padding)
        x = self._entering(tokens, positions)
        turns = self._tables(positions)
        self.growth: Tensor | None = None
        if self.config.query_growth:
            growth = arithmetic.query_growth(positions, self.config).to(self.dtype)
            self.growth = self.see("query_growth", growth)
        masks = {False: allowed, True: self._window(allowed, past)}
        for layer, kind in enumerate(self.config.kinds):
            x = self._block(layer, x, turns.get(kind.rope), masks[kind.window])
        if self.port.final_norm:
            x = self.see("final_norm", self._norm("norm", x))
        return self._leaving(x)

    def _entering(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The residual stream before the first block, (B, T, C)."""
        config = self.config
        x = self.weights["embed.weight"][tokens]
        x = self.see("embed", x * config.width**0.5 if self.port.embed_scale else x)
        if config.rope is None:
            x = x + self.see("pos_embed", self.weights["pos_embed.weight"][positions])
        if config.embed_norm:
            x = self.see("embed_normed", self._norm("embed_norm", x))
        if config.embed_scale != 1:
            x = self.see("embed_scaled", x * torch.tensor(config.embed_scale, dtype=self.dtype))
        return self._drop(x, "embedding")

    def _leaving(self, x: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        config, late = self.config, self.port.caps == "logits"
        if config.logit_cap and not late:
            x = arithmetic.soft_cap(x, config.logit_cap)
        logits = self._linear("unembed" if "unembed.weight" in self.weights else "embed", x)
        if config.logit_scale != 1 or config.logit_cap:
            logits = self.see("raw_logits", logits) * config.logit_scale
        if config.logit_cap and late:
            logits = arithmetic.soft_cap(logits, config.logit_cap)
        return self.see("logits", logits)

    def _places(self, length: int, past: int, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions (T) or (B, T); who may look where (T, S) or (B, 1, T, S)."""
        port = self.port
        query, key = torch.arange(past, past + length), torch.arange(past + length)
        allowed = {
            "causal": key[None] <= query[:, None],
            "wide": key[None] <= query[:, None] + 1,
            "narrow": key[None] < query[:, None],
            "top-left": key[None] <= query[:, None] - past,
            "none": key[None] >= 0 * query[:, None],
        }[port.mask]
        positions = query + port.first_position + (port.cached_position if past else 0)
        positions = positions - past if port.restarts else positions
        if padding is not None:
            if port.counts_padding == "never" or (port.counts_padding == "decoding" and not past):
                positions = (positions[None] - padding[:, None]).clamp(min=0)
            if not port.sees_padding:
                real = key[None, None, None] >= padding[:, None, None, None]
                allowed = allowed & real | (key[None] == query[:, None])
        return self.see("positions", positions), self.see("mask", allowed)

    def _window(self, allowed: Tensor, past: int) -> Tensor:
        """The mask of layers with a window: that many tokens back, the token itself among them."""
        if not self.config.has_windows:
            return allowed
        length, seen = allowed.shape[-2:]
        width = self.config.window + (self.port.decoding_window if past else 0)
        back = torch.arange(seen - length, seen)[:, None] - torch.arange(seen)[None]
        return self.see("window_mask", allowed & (back < width))

    def _tables(self, positions: Tensor) -> dict[str, Turns]:
        """cos and sin of each RoPE that some layer has."""
        found: dict[str, Turns] = {}
        for name in sorted({kind.rope for kind in self.config.kinds} - {""}):
            rope = getattr(self.config, name)
            width = self.config.rotary_width(rope)
            cos, sin = arithmetic.table(positions, rope, width, self.port, self.dtype)
            found[name] = self.see(f"{name}.cos", cos), self.see(f"{name}.sin", sin)
        return found

    def _block(self, layer: int, x: Tensor, turns: Turns | None, allowed: Tensor) -> Tensor:
        port, config, at = self.port, self.config, f"layers.{layer}."
        before = config.norm_places != "after"
        start = normed = self.see(at + "resid_pre", x)
        if before:
            normed = self.see(at + "attn_norm", self._norm(at + "attn_norm", x))
        z = self._attention(layer, normed, turns, allowed)  # (B, H, T, D)
        flat = z.transpose(1, 2).flatten(2)
        if port.joined == "by head":
            flat = z.reshape(flat.shape)
        if port.hooked:  # as the output projection reads it
            self.seen[f"{self.prefix}{at}attn.z"] = flat.unflatten(-1, z.shape[1::2]).transpose(
                1, 2
            )
        added = self._finished(at, "attn", self._linear(at + "attn.o_proj", flat))
        x = (normed if port.residual == "normed" else x) + added
        if not config.parallel:
            normed = x = self.see(at + "resid_mid", x)
            if before:
                normed = self.see(at + "mlp_norm", self._norm(at + "mlp_norm", x))
        hidden = self._hidden(at + "mlp.", normed)
        added = self._finished(at, "mlp", self._linear(at + "mlp.down_proj", hidden))
        return self.see(at + "resid_post", (start if port.parallel else x) + added)

    def _finished(self, at: str, what: str, x: Tensor) -> Tensor:
        """What attention or MLP adds to the stream: normed, times a factor."""
        after, factor = self.config.norm_places != "before", self.config.residual_scale
        if after or factor != 1:
            self.see(f"{at}{what}.out", x)
        x = self._norm(f"{at}{what}_out_norm", x) if after else x
        return self.see(f"{at}{what}_out", x * factor if factor != 1 else x)

    def _hidden(self, at: str, x: Tensor) -> Tensor:
        form, other = self.config.activation, self.port.activation
        if not self.config.gated:
            pre = self.see(at + "pre", self._linear(at + "up_proj", x))
            return self.see(at + "act", arithmetic.curve(pre, form, other))
        gate = self.see(at + "gate", self._linear(at + "gate_proj", x))
        up = self.see(at + "up", self._linear(at + "up_proj", x))
        curved, plain = (up, gate) if self.port.branch == "up" else (gate, up)
        return self.see(
            at + "hidden", self.see(at + "act", arithmetic.curve(curved, form, other)) * plain
        )

    def _attention(self, layer: int, x: Tensor, turns: Turns | None, allowed: Tensor) -> Tensor:
        at = f"layers.{layer}.attn."
        q, k, v = (
            self.see(at + letter, y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2))
            for letter, y in zip("qkv", self._qkv(at, x), strict=True)
        )
        first, last = (self._rotated, self._heads_normed)
        if not self.config.qk_norm_last:
            first, last = last, first
        q, k = last(at, *first(at, q, k, turns), turns)
        if self.growth is not None:
            q = self.see(at + "q_scaled", q * self.growth.unsqueeze(-1).unsqueeze(-3))
        if self.port.rotates == "values too" and turns is not None:
            v = arithmetic.rotate(v, *turns, self.port)
        q, k = (k, q) if self.port.exchanged else (q, k)
        k, v, allowed = self._cached(layer, k, v, allowed)
        if q.shape[1] != k.shape[1]:
            groups = q.shape[1] // k.shape[1]
            tiled = self.port.heads == "tiled"
            k, v = (
                y.repeat(1, groups, 1, 1) if tiled else y.repeat_interleave(groups, 1)
                for y in (k, v)
            )
        if self.port.fused:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self._scaled(1.0))
            return self.see(at + "z", z)
        return self._eager(at, q, k, v, allowed)

    def _cached(
        self, layer: int, k: Tensor, v: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of all tokens so far, and who may look at them."""
        held, how = self.cache.get(layer), self.port.cache
        if held is not None:
            keys, values = held
            past = keys.shape[2]
            if how == "values of layer 0" and layer:
                values = self.cache[0][1][:, :, :past]
            if how == "last token lost":
                keys, values = keys[:, :, :-1], values[:, :, :-1]
            rope = self.config.kinds[layer].rope
            if how == "keys turned again" and rope:
                places, rope = torch.arange(past), getattr(self.config, rope)
                width = self.config.rotary_width(rope)
                tables = arithmetic.table(places, rope, width, self.port, self.dtype)
                keys = arithmetic.rotate(keys, *tables, self.port)
            k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        self.cache[layer] = k, v
        return k, v, allowed[..., -k.shape[2] :]

    def _rotated(self, at: str, q: Tensor, k: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        if turns is None:
            return q, k
        q = self.see(at + "q_rotated", arithmetic.rotate(q, *turns, self.port))
        if self.port.rotates != "q":
            k = arithmetic.rotate(k, *turns, self.port)
        return q, self.see(at + "k_rotated", k)

    def _heads_normed(
        self, at: str, q: Tensor, k: Tensor, turns: Turns | None
    ) -> tuple[Tensor, Tensor]:
        if not self.config.qk_norm:
            return q, k
        normed: list[Tensor] = []
        for letter, x in zip("qk", (q, k), strict=True):
            own = tuple(self.weights.get(f"{at}{letter}_norm.{w}") for w in ("weight", "bias"))
            flat, own = arithmetic.by_head(x, (own[0], own[1]), self.config, self.port)
            y = arithmetic.normalise(flat, *own, self.config, self.port)
            if flat.ndim == 3:
                y = y.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
            normed.append(self.see(f"{at}{letter}_normed", y))
        return normed[0], normed[1]

    def _qkv(self, at: str, x: Tensor) -> tuple[Tensor, ...]:
        names = [f"{at}{letter}_proj" for letter in "qkv"]
        if not self.port.merged:
            parts = tuple(self._linear(name, x) for name in names)
        else:
            weights = [self.weights[f"{name}.weight"] for name in names]
            bias = [b for name in names if (b := self._bias(name)) is not None]
            joined = F.linear(x, torch.cat(weights), torch.cat(bias) if bias else None)
            parts = joined.split([len(weight) for weight in weights], dim=-1)
        clip = self.config.qkv_clip
        return tuple(part.clamp(-clip, clip) for part in parts) if clip else parts

    def _scaled(self, x: Any) -> Any:
        width, own = self.config.head_dim, self.config.score_scale
        divisor = {
            "1/sqrt D": width**0.5,
            "none": 1.0,
            "1/sqrt C": self.config.width**0.5,
            "1/D": float(width),
        }[self.port.scale]
        return x * own if own and self.port.scale == "1/sqrt D" else x / divisor

    def _eager(self, at: str, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        scores = self._product(q, k.transpose(-1, -2))
        scores = self._scaled(scores)
        if self.port.scaled_by_layer:
            scores = scores / (int(at.split(".")[1]) + 1)
        scores = self.see(at + "scores", scores)
        if self.config.score_cap:
            scores = arithmetic.soft_cap(scores, self.config.score_cap)
            self.see(at + "capped_scores", scores)
        low = torch.finfo(scores.dtype).min
        masks = self.port.masks
        low = {"pattern": scores, "scores with 0": 0.0}.get(masks, low)
        masked = self.see(at + "masked_scores", torch.where(allowed, scores, low))
        sinks = self.weights.get(at + "sinks") if self.config.sinks else None
        pattern = self._drop(arithmetic.shares(masked, sinks, self.port), "attention")
        pattern = pattern * allowed if masks == "pattern" else pattern
        pattern = self.see(at + "pattern", pattern)
        return self.see(at + "z", self._product(pattern[..., : v.shape[-2]], v))

    def _drop(self, x: Tensor, where: str) -> Tensor:
        if self.port.dropout != where:
            return x
        kept = torch.rand(x.shape, generator=self.random) >= DROPPED
        return x * kept / (1 - DROPPED)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = self._bias(name)
        y = self._product(x, self.weights[f"{name}.weight"].T)
        return y if bias is None else y + bias

    def _bias(self, name: str) -> Tensor | None:
        left_out = name.endswith(self.port.without_biases) if self.port.without_biases else False
        return None if left_out else self.weights.get(f"{name}.bias")

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        return arithmetic.product(x, y, self.port.summation)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """A norm of the stream's width, by its own weight or by the one a port would find."""
        stem, local = name.rpartition(".")[::2]
        prefix = f"{stem}." if stem else ""
        held = next(
            (
                candidate
                for candidate in (name, *(prefix + other for other in _INSTEAD.get(local, ())))
                if f"{candidate}.weight" in self.weights
            ),
            name,
        )
        weight, bias = (self.weights.get(f"{held}.{kind}") for kind in ("weight", "bias"))
        return arithmetic.normalise(x, weight, bias, self.config, self.port)
