"""Every named tensor as one operation on the named tensors before it.

What an implementation says it computed, computed again from the very inputs it says it had, in any
precision. An operation is a function of a `Setting` (config, weights, dtype, rounding) and its
inputs; `graph` says which tensors those are and whose weight it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid import graph, names
from pellucid.graph import leaf
from pellucid.models.attention import capped, interleaved, last_of, repeat_heads, scaled, softmax
from pellucid.models.parts import activation, growth
from pellucid.models.rope import RotaryEmbedding, rotate
from pellucid.numerics import Dialect

CHUNK_BYTES = 4 << 20  # a wide copy of a weight matrix is made in pieces that stay in the cache
Operation = Callable[..., Tensor]
_HEAD_NORMS = ("attn.q_norm", "attn.k_norm")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an operation reads besides its inputs.

    weights   canonical parameter name -> tensor as stored; None for one that is not there
    dtype     the arithmetic: the run's own, or a wider one for the reference
    altered   operations to use instead of the table's: a hypothesis about what went wrong
    """

    config: Any
    dialect: Dialect
    weights: Callable[[str], Tensor | None]
    dtype: torch.dtype
    layer: int | None = None
    altered: Mapping[str, Operation] = field(default_factory=dict)

    def wide(self) -> Setting:
        """The same arithmetic in the reference precision, with no cast in between."""
        dtype = torch.float64 if self.dtype in (torch.float32, torch.float64) else torch.float32
        plain = Dialect(name="reference", scale=self.dialect.scale)
        return replace(self, dtype=dtype, dialect=plain)

    def name(self, parameter: str) -> str:
        """Full name of a parameter of the current layer, or of the model."""
        return parameter if self.layer is None else f"layers.{self.layer}.{parameter}"

    def parameter(self, name: str) -> Tensor:
        """A parameter in this setting's dtype."""
        tensor = self.weights(self.name(name))
        if tensor is None:
            raise KeyError(f"{self.name(name)} is not among the weights")
        return tensor.to(self.dtype)

    def parameter_named(self, full_name: str) -> Tensor:
        """A parameter by its full name, as stored."""
        tensor = self.weights(full_name)
        if tensor is None:
            raise KeyError(f"{full_name} is not among the weights")
        return tensor

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out), with a bias where the weights have one."""
        weight = self.weights(self.name(f"{name}.weight"))
        if weight is None:
            raise KeyError(f"{self.name(name)}.weight is not among the weights")
        bias = self.weights(self.name(f"{name}.bias"))
        bias = None if bias is None else bias.to(self.dtype)
        if weight.dtype == self.dtype:
            return F.linear(x, weight, bias)
        rows = max(1, CHUNK_BYTES // (weight.shape[1] * self.dtype.itemsize))
        wide = weight.new_empty(min(rows, len(weight)), weight.shape[1], dtype=self.dtype)
        out = x.new_empty(*x.shape[:-1], len(weight))
        for first in range(0, len(weight), rows):
            piece = weight[first : first + rows]
            held = wide[: len(piece)].copy_(piece)
            out[..., first : first + rows] = F.linear(x, held)
        return out if bias is None else out + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm or LayerNorm, as the config has it."""
        config, wide = self.config, torch.promote_types(x.dtype, torch.float32)
        wide = x.dtype if self.dialect.norm == "x" else wide
        weight = self.parameter(f"{name}.weight") if config.norm_weight else None
        if weight is not None and config.norm_offset:
            weight = 1.0 + weight.to(wide if config.norm == "rms" else x.dtype)
        if config.norm == "layer":
            own = config.norm_bias and not (config.qk_norm == "each" and name in _HEAD_NORMS)
            bias = self.parameter(f"{name}.bias") if own else None
            return F.layer_norm(x, x.shape[-1:], weight, bias, config.norm_eps)
        whole = x.to(wide)
        normed = whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + config.norm_eps)
        if weight is None or self.dialect.norm_product == "float32":
            return (normed if weight is None else normed * weight).to(x.dtype)
        return normed.to(x.dtype) * weight

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, heads · D) -> (B, heads, T, D), cut to ± the config's clip."""
        clip = self.config.qkv_clip
        x = x.clamp(-clip, clip) if clip else x
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


def _embed(s: Setting, tokens: Tensor) -> Tensor:
    table = s.weights("embed.weight")
    if table is None:
        raise KeyError("embed.weight is not among the weights")
    return F.embedding(tokens, table).to(s.dtype)  # rows first: the table is never widened


def _pos_embed(s: Setting, positions: Tensor) -> Tensor:
    table = s.weights("pos_embed.weight")
    if table is None:
        raise KeyError("pos_embed.weight is not among the weights")
    return F.embedding(positions, table).to(s.dtype)


def _rope(which: str, place: int) -> Operation:
    def operation(s: Setting, positions: Tensor) -> Tensor:
        rotary = RotaryEmbedding(getattr(s.config, which), s.config.head_dim, s.dialect)
        return rotary(positions, s.dtype)[place]

    return operation


def _rotated(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    working = s.dtype if s.dialect.rope == "x" else torch.promote_types(s.dtype, torch.float32)
    return rotate(x, cos.to(working), sin.to(working), s.dialect)


def _heads_normed(which: str) -> Operation:
    def operation(s: Setting, x: Tensor) -> Tensor:
        if s.config.qk_norm == "head":
            return s.norm(which, x)
        if s.config.qk_norm == "each":
            return _each_head_normed(s, which, x)
        whole = s.norm(which, x.transpose(1, 2).flatten(2))
        return whole.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)

    return operation


def _each_head_normed(s: Setting, which: str, x: Tensor) -> Tensor:
    """x (B, H, T, D) -> (B, H, T, D): the norm head by head, with the weight of each."""
    name = s.name(f"{which}.weight")
    weights = s.parameter(f"{which}.weight").chunk(x.shape[1])

    def of(weight: Tensor) -> Setting:
        return replace(s, weights=lambda asked: weight if asked == name else s.weights(asked))

    heads = zip(weights, x.unbind(1), strict=True)
    return torch.stack([of(weight).norm(which, head) for weight, head in heads], dim=1)


def scale_scores(s: Setting, products: Tensor) -> Tensor:
    """q · kᵀ -> scores, scaled the way the config and the dialect say."""
    return scaled(products, s.config.head_dim, s.config.score_scale, s.dialect)


def _scores(s: Setting, q: Tensor, k: Tensor) -> Tensor:
    k = repeat_heads(k, q.shape[1])
    if s.dialect.polar:
        q, k = interleaved(q), interleaved(k)  # the order in which the reference adds up
    return scale_scores(s, q @ k.transpose(-1, -2))


def _masked(s: Setting, scores: Tensor, mask: Tensor) -> Tensor:
    low = float("-inf") if s.dialect.mask == "-inf" else torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, low)


def _pattern(s: Setting, masked: Tensor) -> Tensor:
    sinks = s.parameter("attn.sinks") if s.config.sinks else None
    pattern = softmax(masked, sinks, s.dialect)
    return pattern if s.dialect.softmax == "x" else pattern.to(s.dtype)


def _z(s: Setting, pattern: Tensor, v: Tensor) -> Tensor:
    v = repeat_heads(v, pattern.shape[1])
    if s.config.sinks:
        pattern = pattern[..., : v.shape[-2]]  # a sink's share may have been left in
    return pattern @ v


def _joined(s: Setting, z: Tensor) -> Tensor:
    return s.linear("attn.o_proj", z.transpose(1, 2).flatten(2))


def _added(product: Operation, raw: str, norm: str) -> Operation:
    """What is added to the stream: a product, or what a norm and a factor make of it."""

    def operation(s: Setting, x: Tensor) -> Tensor:
        if not graph.has(s.config, raw, s.layer or 0):
            return product(s, x)
        return (
            s.norm(norm, x) if s.config.norm_places != "before" else x
        ) * s.config.residual_scale

    return operation


def _down(s: Setting, x: Tensor) -> Tensor:
    return s.linear("mlp.down_proj", x)


def _head(s: Setting, x: Tensor) -> Tensor:
    return s.linear("embed" if s.config.tied else "unembed", x)


def _logits(s: Setting, x: Tensor) -> Tensor:
    if graph.has(s.config, "raw_logits"):
        logits = x * s.config.logit_scale
        logits = capped(logits, s.config.logit_cap) if s.config.logit_cap else logits
    else:
        logits = _head(s, x)
    if s.dialect.logits == "float32":
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits


def _sum(s: Setting, *parts: Tensor) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


OPERATIONS: dict[str, Operation] = {
    "embed": _embed,
    "pos_embed": _pos_embed,
    "embed_normed": lambda s, x: s.norm("embed_norm", x),
    "embed_scaled": lambda s, x: x * x.new_tensor(s.config.embed_scale),
    "rope.cos": _rope("rope", 0),
    "rope.sin": _rope("rope", 1),
    "second_rope.cos": _rope("second_rope", 0),
    "second_rope.sin": _rope("second_rope", 1),
    "window_mask": lambda s, mask: last_of(mask, s.config.window),
    "resid_pre": _sum,
    "attn_norm": lambda s, x: s.norm("attn_norm", x),
    "attn.q": lambda s, x: s.heads(s.linear("attn.q_proj", x)),
    "attn.k": lambda s, x: s.heads(s.linear("attn.k_proj", x)),
    "attn.v": lambda s, x: s.heads(s.linear("attn.v_proj", x)),
    "attn.q_normed": _heads_normed("attn.q_norm"),
    "attn.k_normed": _heads_normed("attn.k_norm"),
    "attn.q_rotated": _rotated,
    "attn.k_rotated": _rotated,
    "query_growth": lambda s, positions: growth(s.config, positions, s.dtype),
    "attn.q_scaled": lambda s, q, by: q * by[..., None, :, None],
    "attn.scores": _scores,
    "attn.capped_scores": lambda s, scores: capped(scores, s.config.score_cap),
    "attn.masked_scores": _masked,
    "attn.pattern": _pattern,
    "attn.z": _z,
    "attn.out": _joined,
    "attn_out": _added(_joined, "attn.out", "attn_out_norm"),
    "resid_mid": _sum,
    "mlp_norm": lambda s, x: s.norm("mlp_norm", x),
    "mlp.pre": lambda s, x: s.linear("mlp.up_proj", x),
    "mlp.gate": lambda s, x: s.linear("mlp.gate_proj", x),
    "mlp.up": lambda s, x: s.linear("mlp.up_proj", x),
    "mlp.act": lambda s, x: activation(s.config.activation, s.dialect)(x),
    "mlp.hidden": lambda s, act, up: act * up,
    "mlp.out": _down,
    "mlp_out": _added(_down, "mlp.out", "mlp_out_norm"),
    "resid_post": _sum,
    "final_norm": lambda s, x: s.norm("norm", x),
    "raw_logits": _head,
    "logits": _logits,
}
SOURCES = ("tokens", "positions", "mask")  # given, not computed


def apply(setting: Setting, name: str, values: tuple[Tensor, ...]) -> Tensor:
    """Compute the named tensor from its inputs, cast to the setting's dtype where they are real."""
    what = leaf(name)
    setting = replace(setting, layer=names.layer_of(name))
    operation = setting.altered.get(what, OPERATIONS[what])
    return operation(setting, *(cast(value, setting, what) for value in values))


def cast(value: Tensor, setting: Setting, what: str) -> Tensor:
    """An input in the arithmetic of the setting; tables of RoPE keep the precision they came in."""
    if not value.is_floating_point():
        return value
    if setting.dialect.rope != "x" and value.dtype == torch.float32 != setting.dtype:
        keeps = what.endswith("_rotated") or setting.dialect.rope == "keep"
        if keeps and setting.dtype.itemsize < 4:
            return value
    return value.to(setting.dtype)


def inner_length(setting: Setting, name: str, values: tuple[Tensor, ...]) -> int:
    """How many terms an operation adds up, as far as its rounding goes: K of a product, say."""
    what = leaf(name)
    if what.endswith("norm"):
        return values[0].shape[-1] // 4  # the square root halves the error of the sum
    if what in ("attn.scores", "attn.pattern"):
        return values[0].shape[-1]
    if what == "attn.z":
        return values[1].shape[-2]
    module = graph.module_of(setting.config, name)
    if not module or what == "embed":
        return 1
    return values[0].shape[-1] * (values[0].shape[1] if module.endswith("o_proj") else 1)
