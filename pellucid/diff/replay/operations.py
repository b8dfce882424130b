"""Every named tensor as one operation on the named tensors before it.

This is the graph that a diff replays: what an implementation says it computed, computed again from
the very inputs it says it had, in any precision. An operation is a function of a `Setting` (config,
weights, dtype, rounding) and its inputs; `INPUTS` says which tensors those are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid import names
from pellucid.models.attention import interleaved, repeat_heads
from pellucid.models.gpt2 import gelu
from pellucid.models.rope import RotaryEmbedding, rotate
from pellucid.numerics import Dialect

CHUNK_BYTES = 4 << 20  # a wide copy of a weight matrix is made in pieces that stay in the cache
Operation = Callable[..., Tensor]


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
        """RMSNorm or LayerNorm, as the family has it."""
        weight = self.parameter(f"{name}.weight")
        if self.config.family == "gpt2":
            bias = self.parameter(f"{name}.bias")
            return F.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)
        inside = (
            x.dtype if self.dialect.norm == "x" else torch.promote_types(x.dtype, torch.float32)
        )
        wide = x.to(inside)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.norm_eps)
        return normed.to(x.dtype) * weight

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, heads · D) -> (B, heads, T, D)."""
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


def _rope(place: int) -> Operation:
    def operation(s: Setting, positions: Tensor) -> Tensor:
        rotary = RotaryEmbedding(s.config.rope, s.config.head_dim, s.dialect)
        return rotary(positions, s.dtype)[place]

    return operation


def _rotated(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    working = s.dtype if s.dialect.rope == "x" else torch.promote_types(s.dtype, torch.float32)
    return rotate(x, cos.to(working), sin.to(working), s.dialect)


def scale_scores(s: Setting, products: Tensor) -> Tensor:
    """q · kᵀ -> scores, divided by √D the way the dialect writes it."""
    width = s.config.head_dim
    return products / width**0.5 if s.dialect.scale == "divide" else products * width**-0.5


def _scores(s: Setting, q: Tensor, k: Tensor) -> Tensor:
    k = repeat_heads(k, q.shape[1])
    if s.dialect.polar:
        q, k = interleaved(q), interleaved(k)  # the order in which the reference adds up
    return scale_scores(s, q @ k.transpose(-1, -2))


def _masked(s: Setting, scores: Tensor, mask: Tensor) -> Tensor:
    low = float("-inf") if s.dialect.mask == "-inf" else torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, low)


def _pattern(s: Setting, masked: Tensor) -> Tensor:
    if s.dialect.softmax == "x":
        return torch.softmax(masked, dim=-1)
    working = torch.promote_types(masked.dtype, torch.float32)
    return torch.softmax(masked, dim=-1, dtype=working).to(s.dtype)


def _z(s: Setting, pattern: Tensor, v: Tensor) -> Tensor:
    return pattern @ repeat_heads(v, pattern.shape[1])


def _attn_out(s: Setting, z: Tensor) -> Tensor:
    return s.linear("attn.o_proj", z.transpose(1, 2).flatten(2))


def _act(s: Setting, x: Tensor) -> Tensor:
    if s.config.family == "llama":
        return F.silu(x)
    return gelu(x, s.config.gelu, s.dialect.gelu == "composed")


def _logits(s: Setting, x: Tensor) -> Tensor:
    head = "embed" if s.config.tied else "unembed"
    logits = s.linear(head, x)
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
    "rope.cos": _rope(0),
    "rope.sin": _rope(1),
    "resid_pre": _sum,
    "attn_norm": lambda s, x: s.norm("attn_norm", x),
    "attn.q": lambda s, x: s.heads(s.linear("attn.q_proj", x)),
    "attn.k": lambda s, x: s.heads(s.linear("attn.k_proj", x)),
    "attn.v": lambda s, x: s.heads(s.linear("attn.v_proj", x)),
    "attn.q_rotated": _rotated,
    "attn.k_rotated": _rotated,
    "attn.scores": _scores,
    "attn.masked_scores": _masked,
    "attn.pattern": _pattern,
    "attn.z": _z,
    "attn_out": _attn_out,
    "resid_mid": _sum,
    "mlp_norm": lambda s, x: s.norm("mlp_norm", x),
    "mlp.pre": lambda s, x: s.linear("mlp.up_proj", x),
    "mlp.gate": lambda s, x: s.linear("mlp.gate_proj", x),
    "mlp.up": lambda s, x: s.linear("mlp.up_proj", x),
    "mlp.act": _act,
    "mlp.hidden": lambda s, act, up: act * up,
    "mlp_out": lambda s, x: s.linear("mlp.down_proj", x),
    "resid_post": _sum,
    "final_norm": lambda s, x: s.norm("norm", x),
    "logits": _logits,
}
SOURCES = ("tokens", "positions", "mask")  # given, not computed


def leaf(name: str) -> str:
    """The operation of a full name: ``step.2.layers.3.attn.q`` -> ``attn.q``."""
    return names.row(name).leaf


def inputs(config: Any, name: str) -> tuple[str, ...]:
    """Full names of the tensors `name` is computed from, in the order its operation takes them.

    Keys and values are named by the pass that computed them; with a KV cache the caller joins the
    passes before. ``()`` for tokens, positions and mask.
    """
    step, layer, what = names.step_of(name), names.layer_of(name), leaf(name)
    prefix = f"step.{step}." if step else ""
    block = f"{prefix}layers.{layer}." if layer is not None else prefix
    llama = config.family == "llama"
    rotated = "_rotated" if llama else ""
    if what == "resid_pre":
        if layer:
            return (f"{prefix}layers.{layer - 1}.resid_post",)
        return (f"{prefix}embed",) if llama else (f"{prefix}embed", f"{prefix}pos_embed")
    if what == "final_norm":
        return (f"{prefix}layers.{config.n_layers - 1}.resid_post",)
    table: dict[str, tuple[str, ...]] = {
        "embed": (f"{prefix}tokens",),
        "pos_embed": (f"{prefix}positions",),
        "rope.cos": (f"{prefix}positions",),
        "rope.sin": (f"{prefix}positions",),
        "attn_norm": (f"{block}resid_pre",),
        "attn.q": (f"{block}attn_norm",),
        "attn.k": (f"{block}attn_norm",),
        "attn.v": (f"{block}attn_norm",),
        "attn.q_rotated": (f"{block}attn.q", f"{prefix}rope.cos", f"{prefix}rope.sin"),
        "attn.k_rotated": (f"{block}attn.k", f"{prefix}rope.cos", f"{prefix}rope.sin"),
        "attn.scores": (f"{block}attn.q{rotated}", f"{block}attn.k{rotated}"),
        "attn.masked_scores": (f"{block}attn.scores", f"{prefix}mask"),
        "attn.pattern": (f"{block}attn.masked_scores",),
        "attn.z": (f"{block}attn.pattern", f"{block}attn.v"),
        "attn_out": (f"{block}attn.z",),
        "resid_mid": (f"{block}resid_pre", f"{block}attn_out"),
        "mlp_norm": (f"{block}resid_mid",),
        "mlp.pre": (f"{block}mlp_norm",),
        "mlp.gate": (f"{block}mlp_norm",),
        "mlp.up": (f"{block}mlp_norm",),
        "mlp.act": (f"{block}mlp.gate" if llama else f"{block}mlp.pre",),
        "mlp.hidden": (f"{block}mlp.act", f"{block}mlp.up"),
        "mlp_out": (f"{block}mlp.hidden" if llama else f"{block}mlp.act",),
        "resid_post": (f"{block}resid_mid", f"{block}mlp_out"),
        "logits": (f"{prefix}final_norm",),
    }
    return table.get(what, ())


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
    if what in ("attn.q", "attn.k", "attn.v", "mlp.pre", "mlp.gate", "mlp.up", "mlp_out", "logits"):
        return values[0].shape[-1]
    return setting.config.n_heads * setting.config.head_dim if what == "attn_out" else 1
