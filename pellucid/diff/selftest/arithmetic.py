"""The arithmetic of the self-test's port, written from the papers: norms, RoPE, softmax, MLP.

Nothing here is shared with `pellucid.models`: an error in one of them shows as a divergence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.diff.selftest.port import Port

SPLITS = 4  # parts of the inner dimension in a split-K product
Parameters = tuple[Tensor | None, Tensor | None]  # weight and bias of a norm


def product(x: Tensor, y: Tensor, summation: str) -> Tensor:
    """x (…, K) @ y (…, K, N), in the order of summation the port has."""
    inner = x.shape[-1]
    if summation == "permuted":
        order = torch.randperm(inner, generator=torch.Generator().manual_seed(inner))
        return x[..., order] @ y[..., order, :]
    if summation == "split" and inner >= SPLITS:
        parts = zip(x.float().chunk(SPLITS, -1), y.float().chunk(SPLITS, -2), strict=True)
        return torch.stack([a @ b for a, b in parts]).sum(0).to(x.dtype)
    return x @ y


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, config: Any, port: Port
) -> Tensor:
    """x over its last axis: about its mean or about zero, as the config's norm is."""
    wide = x.to(port.norm_dtype or torch.float32)
    centres = (config.norm == "layer") != (port.norm in ("with mean", "without mean"))
    if centres:
        wide = wide - wide.mean(-1, keepdim=True)
    squares = wide.to(port.square_dtype or wide.dtype).square().to(wide.dtype)
    mean = squares.mean(-1, keepdim=True)
    if port.norm == "unbiased":
        mean = mean * x.shape[-1] / (x.shape[-1] - 1)
    normed = wide * torch.rsqrt(mean + (port.eps or config.norm_eps))
    if weight is None:
        return normed.to(x.dtype)
    if config.norm_offset:
        weight = weight.to(normed.dtype) + 1
    late = config.norm == "layer" or config.rounding in ("gemma", "olmo")
    if not late:
        return normed.to(x.dtype) * weight.to(x.dtype)
    product = normed * weight
    return (product if bias is None else product + bias).to(x.dtype)


def by_head(
    x: Tensor, parameters: Parameters, config: Any, port: Port
) -> tuple[Tensor, Parameters]:
    """x (B, heads, T, D) laid out for a norm of heads, and a weight and a bias that fit.

    Those made for the other kind of norm are cut or repeated: what a port that takes one for the
    other would do.
    """
    heads, width = x.shape[1], x.shape[-1]

    def fitted(vector: Tensor | None) -> Tensor | None:
        if vector is None:
            return None
        if config.qk_norm == "whole":
            return vector if len(vector) == heads * width else vector.repeat(heads)
        vector = vector[:width] if port.first_head_norm else vector
        return vector if len(vector) == width else vector.view(heads, 1, width)

    flat = x.transpose(1, 2).flatten(2) if config.qk_norm == "whole" else x  # (B, T, heads · D)
    return flat, (fitted(parameters[0]), fitted(parameters[1]))


def inverse_frequencies(rope: Any, width: int, exponent: str = "2i/D", length: int = 0) -> Tensor:
    """Radians per position of each pair, (width/2), with the scaling for longer contexts."""
    half = width // 2
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
        low = max(math.floor(edges[0]) if rope.truncate else edges[0], 0)
        high = min(math.ceil(edges[1]) if rope.truncate else edges[1], width - 1)
        slow = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain * (1 - slow) + plain / rope.factor * slow
    if rope.type == "longrope":
        longer = length > rope.original_context
        return plain / torch.tensor(rope.long_factor if longer else rope.short_factor)
    return plain


def _size(rope: Any) -> float:
    """What cos and sin are multiplied by: attention sharpens as the context grows."""
    if rope.type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.type == "longrope":
        return (1 + math.log(rope.factor) / math.log(rope.original_context)) ** 0.5
    scales = rope.mscale or 0.0, rope.mscale_all_dim or 0.0
    above, below = (
        0.1 * scale * math.log(rope.factor) + 1 for scale in (scales if all(scales) else (1.0, 0.0))
    )
    return above / below


def query_growth(positions: Tensor, config: Any) -> Tensor:
    """Factor on the query at each position: a little more with every original context passed."""
    passed = positions // config.rope.original_context
    return 1 + config.query_growth * (1 + passed).float().log()


def table(
    positions: Tensor, rope: Any, width: int, port: Port, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of each angle, (T, width/2) or (B, T, width/2)."""
    length = int(positions.max()) + 1
    turns = inverse_frequencies(rope, width, port.exponent, length).to(port.frequency_dtype).float()
    angles = positions.to(port.position_dtype).float()[..., None] * turns
    size = _size(rope)
    return (angles.cos() * size).to(dtype), port.direction * (angles.sin() * size).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, port: Port) -> Tensor:
    """x (B, heads, T, D) with as many components turned as the tables have twice."""
    width = 2 * cos.shape[-1]
    cos, sin = (table.unsqueeze(-3) for table in (cos, sin))
    if port.turned == "last" and width < x.shape[-1]:
        return torch.cat((x[..., :-width], _turn(x[..., -width:], cos, sin, port.pairs)), -1)
    return torch.cat((_turn(x[..., :width], cos, sin, port.pairs), x[..., width:]), -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    if pairs == "neighbours":
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    if pairs == "mixed back":
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        a, b = x[..., ::2], x[..., 1::2]
        return x * cos + torch.stack((-b, a), -1).flatten(-2) * sin
    if pairs == "mixed":
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """About x where it is small, between -cap and cap everywhere."""
    return cap * torch.tanh(x / cap)


def shares(masked: Tensor, sinks: Tensor | None, port: Port) -> Tensor:
    """Softmax over the last axis of (B, H, T, S); a sink per head (H) joins the sum."""
    if sinks is not None:
        column = sinks.float()[None, :, None, None]
        top = torch.maximum(masked.float().amax(-1, keepdim=True), column)
        powers, nothing = (masked.float() - top).exp(), (column - top).exp()
        total = powers.sum(-1, keepdim=True) + nothing
        whole = torch.cat((powers, nothing), -1) if port.sinks == "kept" else powers
        return (whole / total).to(masked.dtype)
    if port.softmax_dtype == torch.float32:
        return masked.float().softmax(-1).to(masked.dtype)
    coarse = masked.to(port.softmax_dtype)
    powers = (coarse - coarse.amax(-1, keepdim=True)).exp()
    return (powers / powers.sum(-1, keepdim=True)).to(masked.dtype)


def curve(x: Tensor, form: str, other: str) -> Tensor:
    """The activation of a config; `other` is what the port takes instead, or "right"."""
    if other == "relu":
        return F.relu(x)
    if other == "sigmoid":
        return x * torch.sigmoid(1.702 * x)
    if form == "silu":
        return F.silu(x)
    if form == "relu2":
        return x.clamp(min=0) * x
    return F.gelu(x, approximate="none" if form == "gelu" or other == "erf" else "tanh")
