"""A second implementation of both families, with switches for the mistakes that ports make.

Written from the papers in the style of a typical port, sharing no arithmetic with
`pellucid.models`: a fault in it is a fault of another program, not a patched copy of ours.
It writes every named tensor it computes into a dictionary, as an engineer with a debugger would.

B  batch    T  tokens in this pass    S  tokens seen so far    D  head width
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.diff.sides.side import Batch, pad_left
from pellucid.trace import Trace

SPLITS = 4  # parts of the inner dimension in a split-K product
DROPPED = 0.1


@dataclass(frozen=True, kw_only=True)
class Port:
    """How the port is written. The first group is a matter of taste, the rest are mistakes."""

    summation: Literal["kernel", "permuted", "split"] = "kernel"
    merged: bool = False  # one product for q, k and v
    fused: bool = False  # scaled_dot_product_attention: of attention's insides only z is seen
    first_position: int = 0  # RoPE sees only differences

    pairs: Literal["halves", "neighbours", "mixed"] = "halves"
    rotates: Literal["both", "q"] = "both"
    direction: int = 1
    exponent: Literal["2i/D", "i/D"] = "2i/D"
    frequency_dtype: torch.dtype = torch.float32
    position_dtype: torch.dtype = torch.float32
    cached_position: int = 0  # added to the positions of decoding steps
    counts_padding: Literal["never", "decoding", "always"] = "never"  # in the positions
    sees_padding: bool = False
    mask: Literal["causal", "wide", "narrow", "top-left", "none"] = "causal"
    scale: Literal["1/sqrt D", "none", "1/sqrt C", "1/D"] = "1/sqrt D"
    heads: Literal["repeated", "tiled"] = "repeated"
    joined: Literal["by token", "by head"] = "by token"
    softmax_dtype: torch.dtype = torch.float32
    norm: Literal["right", "with mean", "without mean", "unbiased"] = "right"
    eps: float | None = None  # written into the code
    norm_dtype: torch.dtype | None = None  # None: float32, cast before the weight
    square_dtype: torch.dtype | None = None
    branch: Literal["gate", "up"] = "gate"
    activation: Literal["right", "erf", "sigmoid", "relu"] = "right"
    residual: Literal["stream", "normed"] = "stream"
    parallel: bool = False  # the MLP's residual starts before attention
    final_norm: bool = True
    embed_scale: bool = False  # times the root of the width
    dropout: Literal["off", "embedding", "attention"] = "off"


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
        self.config, self.port, self.dtype = config, port, dtype
        self.copies, self.hides = copies, hides
        self.weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.seen: dict[str, Tensor] = {}
        self.prefix = ""

    @torch.no_grad()
    def run(self, rows: Batch, steps: int) -> Trace:
        """The prompt, then decoding steps with a cache, greedy or along ``rows.following``."""
        self.seen, self.prefix = {}, ""
        self.random = torch.Generator().manual_seed(0)
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * self.config.n_layers
        following = getattr(rows, "following", None)
        tokens, padding = pad_left([row for _ in range(self.copies) for row in rows])
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
        whole = ("positions", "mask", "rope.cos", "rope.sin", "pos_embed")
        return Trace(
            {
                name: tensor if name.endswith(whole) and padding is None else tensor[: len(rows)]
                for name, tensor in self.seen.items()
            }
        )

    def see(self, name: str, tensor: Tensor) -> Tensor:
        """Write a tensor down and hand it back."""
        if not name.endswith(self.hides):
            self.seen[self.prefix + name] = tensor
        return tensor

    def _forward(self, tokens: Tensor, past: int, padding: Tensor | None) -> Tensor:
        port, config = self.port, self.config
        self.see("tokens", tokens)
        positions, allowed = self._places(tokens.shape[1], past, padding)
        x = self.see("embed", self._embed(tokens))
        turns = None
        if config.family == "gpt2":
            x = x + self.see("pos_embed", self.weights["pos_embed.weight"][positions])
            x = self._drop(x, "embedding")
        else:
            turns = self._turns(positions)
        for layer in range(config.n_layers):
            x = self._block(layer, x, turns, allowed)
        if port.final_norm:
            x = self.see("final_norm", self._norm("norm", x))
        head = "unembed" if "unembed.weight" in self.weights else "embed"
        return self.see("logits", self._linear(head, x))

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.weights["embed.weight"][tokens]
        return x * self.config.width**0.5 if self.port.embed_scale else x

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
        if padding is not None:
            if port.counts_padding == "never" or (port.counts_padding == "decoding" and not past):
                positions = (positions[None] - padding[:, None]).clamp(min=0)
            if not port.sees_padding:
                real = key[None, None, None] >= padding[:, None, None, None]
                allowed = allowed & real | (key[None] == query[:, None])
        return self.see("positions", positions), self.see("mask", allowed)

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of each angle, (T, D/2) or (B, T, D/2)."""
        port = self.port
        turns = inverse_frequencies(self.config, port.exponent)
        turns = turns.to(port.frequency_dtype).float()
        angles = positions.to(port.position_dtype).float()[..., None] * turns
        rope = self.config.rope
        size = 0.1 * math.log(rope.factor) + 1 if rope.type == "yarn" else 1.0
        cos, sin = (angles.cos() * size).to(self.dtype), (angles.sin() * size).to(self.dtype)
        return self.see("rope.cos", cos), self.see("rope.sin", port.direction * sin)

    def _block(
        self, layer: int, x: Tensor, turns: tuple[Tensor, Tensor] | None, allowed: Tensor
    ) -> Tensor:
        port, at = self.port, f"layers.{layer}."
        start = self.see(at + "resid_pre", x)
        normed = self.see(at + "attn_norm", self._norm(at + "attn_norm", x))
        z = self._attention(layer, normed, turns, allowed)  # (B, H, T, D)
        flat = z.transpose(1, 2).flatten(2)
        if port.joined == "by head":
            flat = z.reshape(flat.shape)
        added = self.see(at + "attn_out", self._linear(at + "attn.o_proj", flat))
        x = self.see(at + "resid_mid", (normed if port.residual == "normed" else x) + added)
        normed = self.see(at + "mlp_norm", self._norm(at + "mlp_norm", x))
        hidden = self._hidden(at + "mlp.", normed)
        added = self.see(at + "mlp_out", self._linear(at + "mlp.down_proj", hidden))
        return self.see(at + "resid_post", (start if port.parallel else x) + added)

    def _hidden(self, at: str, x: Tensor) -> Tensor:
        if self.config.family == "gpt2":
            pre = self.see(at + "pre", self._linear(at + "up_proj", x))
            return self.see(at + "act", self._gelu(pre))
        gate = self.see(at + "gate", self._linear(at + "gate_proj", x))
        up = self.see(at + "up", self._linear(at + "up_proj", x))
        curved, plain = (up, gate) if self.port.branch == "up" else (gate, up)
        act = self.see(at + "act", self._gelu(curved) if self._other_act() else F.silu(curved))
        return self.see(at + "hidden", act * plain)

    def _other_act(self) -> bool:
        return self.port.activation != "right"

    def _gelu(self, x: Tensor) -> Tensor:
        if self.port.activation == "relu":
            return F.relu(x)
        if self.port.activation == "sigmoid":
            return x * torch.sigmoid(1.702 * x)
        erf = self.port.activation == "erf" or getattr(self.config, "gelu", "tanh") == "erf"
        return F.gelu(x, approximate="none" if erf else "tanh")

    def _attention(
        self, layer: int, x: Tensor, turns: tuple[Tensor, Tensor] | None, allowed: Tensor
    ) -> Tensor:
        at = f"layers.{layer}.attn."
        q, k, v = (
            self.see(at + letter, y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2))
            for letter, y in zip("qkv", self._qkv(at, x), strict=True)
        )
        if turns is not None:
            q = self.see(at + "q_rotated", self._rotate(q, *turns))
            k = self.see(
                at + "k_rotated", self._rotate(k, *turns) if self.port.rotates == "both" else k
            )
        held = self.cache[layer]
        if held is not None:
            k, v = torch.cat((held[0], k), 2), torch.cat((held[1], v), 2)
        self.cache[layer] = k, v
        if q.shape[1] != k.shape[1]:
            groups = q.shape[1] // k.shape[1]
            tiled = self.port.heads == "tiled"
            k, v = (
                y.repeat(1, groups, 1, 1) if tiled else y.repeat_interleave(groups, 1)
                for y in (k, v)
            )
        if self.port.fused:
            scale = self._scale(1.0)
            return self.see(
                at + "z",
                F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale),
            )
        return self._eager(at, q, k, v, allowed)

    def _qkv(self, at: str, x: Tensor) -> tuple[Tensor, ...]:
        names = [f"{at}{letter}_proj" for letter in "qkv"]
        if not self.port.merged:
            return tuple(self._linear(name, x) for name in names)
        weights = [self.weights[f"{name}.weight"] for name in names]
        bias = [self.weights[f"{name}.bias"] for name in names if f"{name}.bias" in self.weights]
        joined = F.linear(x, torch.cat(weights), torch.cat(bias) if bias else None)
        return joined.split([len(weight) for weight in weights], dim=-1)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (table.unsqueeze(-3) for table in (cos, sin))
        if self.port.pairs == "neighbours":
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        if self.port.pairs == "mixed":
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def _scale(self, x: Any) -> Any:
        width = self.config.head_dim
        divisor = {
            "1/sqrt D": width**0.5,
            "none": 1.0,
            "1/sqrt C": self.config.width**0.5,
            "1/D": float(width),
        }[self.port.scale]
        return x / divisor

    def _eager(self, at: str, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        scores = self.see(at + "scores", self._scale(self._product(q, k.transpose(-1, -2))))
        low = torch.finfo(scores.dtype).min
        masked = self.see(at + "masked_scores", torch.where(allowed, scores, low))
        if self.port.softmax_dtype == torch.float32:
            pattern = masked.float().softmax(-1).to(q.dtype)
        else:
            coarse = masked.to(self.port.softmax_dtype)
            powers = (coarse - coarse.amax(-1, keepdim=True)).exp()
            pattern = (powers / powers.sum(-1, keepdim=True)).to(q.dtype)
        pattern = self.see(at + "pattern", self._drop(pattern, "attention"))
        return self.see(at + "z", self._product(pattern, v))

    def _drop(self, x: Tensor, where: str) -> Tensor:
        if self.port.dropout != where:
            return x
        kept = torch.rand(x.shape, generator=self.random) >= DROPPED
        return x * kept / (1 - DROPPED)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        y = self._product(x, self.weights[f"{name}.weight"].T)
        return y if bias is None else y + bias

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        """x (…, K) @ y (…, K, N), in the order of summation the port has."""
        inner = x.shape[-1]
        if self.port.summation == "permuted":
            order = torch.randperm(inner, generator=torch.Generator().manual_seed(inner))
            return x[..., order] @ y[..., order, :]
        if self.port.summation == "split" and inner >= SPLITS:
            parts = zip(x.float().chunk(SPLITS, -1), y.float().chunk(SPLITS, -2), strict=True)
            return torch.stack([a @ b for a, b in parts]).sum(0).to(x.dtype)
        return x @ y

    def _norm(self, name: str, x: Tensor) -> Tensor:
        port, eps = self.port, self.port.eps or self.config.norm_eps
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        wide = x.to(port.norm_dtype or torch.float32)
        centres = (self.config.family == "gpt2") != (port.norm in ("with mean", "without mean"))
        if centres:
            wide = wide - wide.mean(-1, keepdim=True)
        squares = wide.to(port.square_dtype or wide.dtype).square().to(wide.dtype)
        mean = squares.mean(-1, keepdim=True)
        if port.norm == "unbiased":
            mean = mean * x.shape[-1] / (x.shape[-1] - 1)
        normed = wide * torch.rsqrt(mean + eps)
        if bias is not None:
            return (normed * weight + bias).to(x.dtype)
        return normed.to(x.dtype) * weight


def inverse_frequencies(config: Any, exponent: str = "2i/D") -> Tensor:
    """Radians per position of each pair (D/2), with the scaling for longer contexts."""
    rope, half = config.rope, config.head_dim // 2
    pair = torch.arange(half).float()
    plain = rope.theta ** -(pair / half if exponent == "2i/D" else pair / half / 2)
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        turns = rope.original_context * plain / (2 * math.pi)  # over the trained context
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return plain * keep + plain / rope.factor * (1 - keep)
    if rope.type == "yarn":
        edges = [
            half * math.log(rope.original_context / (2 * math.pi * turns)) / math.log(rope.theta)
            for turns in (rope.beta_fast, rope.beta_slow)
        ]
        low = max(math.floor(edges[0]), 0)
        high = min(math.ceil(edges[1]), config.head_dim - 1)
        slow = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain * (1 - slow) + plain / rope.factor * slow
    return plain
