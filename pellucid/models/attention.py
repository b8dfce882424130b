"""Attention from queries, keys and values: the mask, and the one place with two bodies.

B  batch    T  tokens in this pass    S  tokens seen so far    D  head width
H  query heads    Hkv  key/value heads; query head h reads key/value head h // (H / Hkv)
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid import trace
from pellucid.models.rope import interleaved
from pellucid.numerics import Dialect
from pellucid.trace import tap

# Where in its row a text begins: (B) for rows that are padded on the left, (B, T) for each token of
# rows that hold several texts; None: all begin with the row.
Starts = Tensor | None
_WIDE = torch.float32  # of softmax, unless the dialect keeps it in x


class Mask(NamedTuple):
    """What each query may look at: `allowed` (T, S) or (B, 1, T, S), True = may look.

    `plain`: no padding and no window in sight, so that the fused kernel may use its own causal
    mask, or none for one row.
    """

    allowed: Tensor
    plain: bool


def positions_and_mask(tokens: Tensor, past: int, starts: Starts) -> tuple[Tensor, Tensor]:
    """Positions and mask of a pass of tokens (B, T) that follows `past` cached tokens.

    Returns (T), (T, S); with `starts`, as `_from_starts` says, (B, T), (B, 1, T, S).
    """
    place = torch.arange(past + tokens.shape[1], device=tokens.device)
    here = place[past:]
    causal = here[:, None] >= place[None, :]  # (T, S)
    return (here, causal) if starts is None else _from_starts(starts, here, place, causal)


def _from_starts(
    starts: Tensor, here: Tensor, place: Tensor, causal: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions and mask where each text begins somewhere in its row.

    Positions count from there and no token looks before it. Padding looks at itself, so that no
    row of the softmax is empty.
    """
    starts = starts.view(len(starts), -1)  # (B, 1) or (B, T)
    inside = place >= starts[:, None, :, None]  # (B, 1, 1 or T, S)
    itself = here[:, None] == place
    return (here - starts).clamp(min=0), (causal & inside) | itself


def last_of(allowed: Tensor, window: int, end: Tensor | None = None) -> Tensor:
    """`allowed` (…, T, S) cut to the last `window` tokens; `end`: place of the last of T in S."""
    length, seen = allowed.shape[-2:]
    place = torch.arange(seen, device=allowed.device)
    here = place[seen - length :] if end is None else end + place[:length] - (length - 1)
    return allowed & (place > here[:, None] - window)


class Scores(NamedTuple):
    """How q · k becomes shares: factor (0: 1/√D), cap (0: none), sinks (H), casts, dropout."""

    scale: float
    cap: float
    sinks: Tensor | None
    dialect: Dialect
    dropout: float


def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: Scores) -> Tensor:
    """q (B, H, T, D), k and v (B, Hkv, S, D) -> z (B, H, T, D).

    By named steps while a trace is open, whatever it keeps: no value depends on what is recorded.
    """
    fusible = how.dialect.rope != "keep" and not how.cap and how.sinks is None
    if trace.names_steps() or not fusible:
        return _named_steps(module, q, k, v, mask.allowed, how)
    return tap(module, "z", _fused(q, k, v, mask, how))


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask, how: Scores) -> Tensor:
    tokens, seen = q.shape[2], k.shape[2]
    causal = mask.plain and tokens == seen
    allowed = None if mask.plain and (causal or tokens == 1) else mask.allowed
    kernel = partial(F.scaled_dot_product_attention, dropout_p=how.dropout, scale=how.scale or None)
    own = q.shape[1] == k.shape[1]
    return kernel(q, k, v, allowed, is_causal=causal and tokens > 1, enable_gqa=not own)


def _named_steps(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, how: Scores
) -> Tensor:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    if how.dialect.polar:
        q, k = interleaved(q), interleaved(k)  # so that q · k adds up in the reference's order
    products = q @ k.transpose(-1, -2)  # (B, H, T, S)
    scores = tap(module, "scores", scaled(products, q.shape[-1], how.scale, how.dialect))
    if how.cap:
        scores = tap(module, "capped_scores", capped(scores, how.cap))
    low = float("-inf") if how.dialect.mask == "-inf" else torch.finfo(scores.dtype).min
    masked = tap(module, "masked_scores", scores.masked_fill(~allowed, low))
    pattern = tap(module, "pattern", softmax(masked, how.sinks, how.dialect).to(v.dtype))
    pattern = F.dropout(pattern, how.dropout) if how.dropout else pattern
    return tap(module, "z", pattern @ v)


def scaled(products: Tensor, width: int, scale: float, dialect: Dialect) -> Tensor:
    """q · kᵀ times `scale`; where that is 0, by 1/√D of heads of so many components."""
    factor = scale or (width**-0.5 if dialect.scale == "multiply" else 0.0)
    return products * factor if factor else products / width**0.5


def capped(x: Tensor, cap: float) -> Tensor:
    """c · tanh(x / c): about x where it is small, never beyond c."""
    return torch.tanh(x / cap) * cap


def softmax(masked: Tensor, sinks: Tensor | None, dialect: Dialect) -> Tensor:
    """Shares of each row of (B, H, T, S); a head's sink (H) takes one too, and is left out."""
    wide = masked.dtype if dialect.softmax == "x" else torch.promote_types(masked.dtype, _WIDE)
    if sinks is None:
        return torch.softmax(masked, dim=-1, dtype=wide)
    beside = sinks.view(1, -1, 1, 1).expand(len(masked), -1, masked.shape[2], 1).to(masked.dtype)
    both = torch.cat((masked, beside), dim=-1)
    return torch.softmax(both, dim=-1, dtype=wide)[..., :-1]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, Hkv, S, D) -> (B, H, S, D): each key/value head serves H / Hkv query heads in a row."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
