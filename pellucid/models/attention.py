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

    `plain`: no padding and no window in sight, so that the fused kernel may use its own causal
    mask, or none for one row.
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


def last_of(allowed: Tensor, window: int, end: Tensor | None = None) -> Tensor:
    """The mask `allowed` (…, T, S), cut to the last `window` tokens, the token itself included.

    The T tokens are the last of S, or those up to place `end`.
    """
    tokens, seen = allowed.shape[-2:]
    place = torch.arange(seen, device=allowed.device)
    here = place[seen - tokens :] if end is None else end + place[:tokens] - (tokens - 1)
    return allowed & (place > here[:, None] - window)


class Scores(NamedTuple):
    """How scores are made of q · k: their factor, their cap (0: none), the sinks (H), if any."""

    scale: float
    cap: float
    sinks: Tensor | None


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    how: Scores,
    dialect: Dialect,
    dropout: float = 0.0,
) -> Tensor:
    """q (B, H, T, D), k and v (B, Hkv, S, D) -> z (B, H, T, D).

    Fused where no trace is open; the named steps while one is, whatever it keeps, so that a
    tensor's value does not depend on which others are recorded.
    """
    plain = not how.cap and how.sinks is None
    if trace.names_steps() or not dialect.fusible or not plain:
        return _named_steps(module, q, k, v, mask.allowed, how, dialect, dropout)
    tokens, seen = q.shape[2], k.shape[2]
    causal = mask.plain and tokens == seen
    z = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask.plain and (causal or tokens == 1) else mask.allowed,
        is_causal=causal and tokens > 1,
        dropout_p=dropout,
        scale=how.scale or None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return tap(module, "z", z)


def _named_steps(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    how: Scores,
    dialect: Dialect,
    dropout: float,
) -> Tensor:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    if dialect.polar:
        q, k = interleaved(q), interleaved(k)  # so that q · k adds up in the reference's order
    scores = tap(module, "scores", scaled(q @ k.transpose(-1, -2), q.shape[-1], how.scale, dialect))
    if how.cap:
        scores = tap(module, "capped_scores", capped(scores, how.cap))
    low = float("-inf") if dialect.mask == "-inf" else torch.finfo(scores.dtype).min
    masked = tap(module, "masked_scores", scores.masked_fill(~allowed, low))
    pattern = tap(module, "pattern", softmax(masked, how.sinks, dialect).to(v.dtype))
    if dropout:
        pattern = F.dropout(pattern, dropout)
    return tap(module, "z", pattern @ v)


def scaled(products: Tensor, width: int, scale: float, dialect: Dialect) -> Tensor:
    """q · kᵀ times `scale`; where that is 0, by 1/√D of heads of so many components."""
    if scale:
        return products * scale
    return products / width**0.5 if dialect.scale == "divide" else products * width**-0.5


def capped(x: Tensor, cap: float) -> Tensor:
    """c · tanh(x / c): about x where it is small, never beyond c."""
    return torch.tanh(x / cap) * cap


def softmax(masked: Tensor, sinks: Tensor | None, dialect: Dialect) -> Tensor:
    """Shares of each row of (B, H, T, S); a head's sink (H) takes one too, and is left out."""
    if sinks is not None:
        beside = sinks.view(1, -1, 1, 1).expand(*masked.shape[:3], 1)
        whole = torch.cat((masked, beside.to(masked.dtype)), dim=-1)
        return softmax(whole, None, dialect)[..., :-1]
    if dialect.softmax == "x":
        return torch.softmax(masked, dim=-1)
    working = torch.promote_types(masked.dtype, torch.float32)
    return torch.softmax(masked, dim=-1, dtype=working)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, Hkv, S, D) -> (B, H, S, D): each key/value head serves H / Hkv query heads in a row."""
    batch, kv_heads, seen, width = x.shape
    if kv_heads == heads:
        return x
    shape = (batch, kv_heads, heads // kv_heads, seen, width)
    return x[:, :, None].expand(shape).reshape(batch, heads, seen, width)
