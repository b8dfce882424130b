"""Attention from queries, keys and values: the mask, and the one place with two bodies.

B  batch    T  tokens in this pass    S  tokens seen so far    D  head width
H  query heads    Hkv  key/value heads; query head h reads key/value head h // (H / Hkv)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid import trace
from pellucid.models.rope import interleaved
from pellucid.numerics import Dialect
from pellucid.trace import tap


class Mask(NamedTuple):
    """Who may look where: `allowed` (T, S) or (B, 1, T, S), True = may look.

    `plain`: no padding, so that the fused kernel may use its own causal mask, or none for one row.
    """

    allowed: Tensor
    plain: bool


def positions_and_mask(tokens: Tensor, past: int, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions and mask of a pass of tokens (B, T) that follows `past` cached tokens.

    starts: where in its row a text begins; (B) for rows that are padded on the left, (B, T) for
    each token of rows that hold several texts. Positions count from there and no token looks before
    it. Padding looks at itself, so that no row of the softmax is empty.
    Returns (T), (T, S) without it and (B, T), (B, 1, T, S) with it.
    """
    seen = past + tokens.shape[1]
    place = torch.arange(seen, device=tokens.device)
    here = place[past:]
    causal = here[:, None] >= place[None, :]  # (T, S)
    if starts is None:
        return here, causal
    starts = starts.view(len(tokens), -1)  # (B, 1) or (B, T)
    inside = place >= starts[:, None, :, None]  # (B, 1, 1 or T, S)
    itself = here[:, None] == place
    return (here - starts).clamp(min=0), (causal & inside) | itself


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    dialect: Dialect,
    dropout: float = 0.0,
) -> Tensor:
    """q (B, H, T, D), k and v (B, Hkv, S, D) -> z (B, H, T, D).

    Fused where nobody looks; the named steps while a trace is open, whatever it keeps, so that a
    tensor's value does not depend on which others are recorded.
    """
    if trace.names_steps() or not dialect.fusible:
        return _named_steps(module, q, k, v, mask.allowed, dialect, dropout)
    tokens, seen = q.shape[2], k.shape[2]
    causal = mask.plain and tokens == seen
    z = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask.plain and (causal or tokens == 1) else mask.allowed,
        is_causal=causal and tokens > 1,
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return tap(module, "z", z)


def _named_steps(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    dialect: Dialect,
    dropout: float,
) -> Tensor:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    if dialect.polar:
        q, k = interleaved(q), interleaved(k)  # so that q · k adds up in the reference's order
    scores = q @ k.transpose(-1, -2)  # (B, H, T, S)
    width = q.shape[-1]
    scores = scores / width**0.5 if dialect.scale == "divide" else scores * width**-0.5
    scores = tap(module, "scores", scores)
    low = float("-inf") if dialect.mask == "-inf" else torch.finfo(scores.dtype).min
    masked = tap(module, "masked_scores", scores.masked_fill(~allowed, low))
    if dialect.softmax == "float32":
        working = torch.promote_types(masked.dtype, torch.float32)
        pattern = torch.softmax(masked, dim=-1, dtype=working).to(v.dtype)
    else:
        pattern = torch.softmax(masked, dim=-1).to(v.dtype)
    pattern = tap(module, "pattern", pattern)
    if dropout:
        pattern = F.dropout(pattern, dropout)
    return tap(module, "z", pattern @ v)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, Hkv, S, D) -> (B, H, S, D): each key/value head serves H / Hkv query heads in a row."""
    batch, kv_heads, seen, width = x.shape
    if kv_heads == heads:
        return x
    shape = (batch, kv_heads, heads // kv_heads, seen, width)
    return x[:, :, None].expand(shape).reshape(batch, heads, seen, width)
