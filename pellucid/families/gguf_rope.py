"""RoPE's scaling from the divisors of its frequencies, which is all that GGUF files keep of it.

Llama 3's scaling is made of four numbers; llama.cpp stores what they come to, ``rope_freqs``: what
each pair's plain frequency is divided by. The numbers are worked out again, and count where they
give the divisors again. Where none do, the divisors themselves are the scaling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid.models import RopeConfig
from pellucid.models.rope import frequencies

_EXACT = 2e-6  # relative: both sides are rounded to float32 a few times
_RELEASED = 8192  # the original context of every Llama 3


def divisors(rope: RopeConfig, head_dim: int) -> Tensor:
    """(D/2): what llama.cpp divides each plain frequency by, in float32."""
    plain = RopeConfig(theta=rope.theta)
    return frequencies(plain, head_dim) / frequencies(rope, head_dim)


def recovered(
    stored: Sequence[float], theta: float, original: int | None, context: int
) -> dict[str, Any]:
    """config.json's ``rope_scaling`` that gives these divisors (D/2).

    original  context length of pre-training, where the file states it

    ValueError for divisors below 1.
    """
    wanted = torch.tensor(stored, dtype=torch.float64)
    if not bool((wanted >= 1 - _EXACT).all()) or not bool(wanted.isfinite().all()):
        raise ValueError("rope_freqs.weight: expected divisors of 1 or more")
    for low, high, start in _candidates(wanted, theta, original, context):
        factor = float(f"{float(wanted.max()):.6g}")
        if not 0 < low < high or start < 1:
            continue
        rope = RopeConfig(
            theta=theta,
            type="llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=start,
        )
        if torch.allclose(divisors(rope, 2 * len(wanted)).double(), wanted, rtol=_EXACT, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": start,
            }
    factors = list(map(float, stored))
    exact = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    return {"rope_type": "longrope", "original_max_position_embeddings": context, **exact}


def _candidates(
    wanted: Tensor, theta: float, original: int | None, context: int
) -> Iterator[tuple[float, float, int]]:
    """(low, high, original context) in the order tried: the releases' numbers, then a fit.

    Between the two bounds 1 / divisor is a straight line over 1 / wavelength. Its slope and height
    are two numbers for three unknowns, so the original context, or else low = 1, is taken as given.
    """
    powers = (1 << n for n in range(1, max(context, 2).bit_length()))
    for start in dict.fromkeys([original or _RELEASED, context, *powers]):
        if original in (None, start):
            yield 1.0, 4.0, start
    pairs = torch.arange(len(wanted), dtype=torch.float64)
    waves = 2 * math.pi * theta ** (pairs / len(wanted))
    inside = (wanted > 1 + 1e-5) & (wanted < wanted.max() * (1 - 1e-5))
    if int(inside.sum()) < 2:
        return
    ramp = (1 / wanted - 1 / wanted.max()) / (1 - 1 / wanted.max())
    line = torch.stack((1 / waves[inside], torch.ones_like(waves[inside])), 1)
    slope, height = torch.linalg.lstsq(line, ramp[inside, None]).solution[:, 0].tolist()
    if slope <= 0 or height >= 0:
        return
    width = original / slope if original else 1 / -height
    low, high = -height * width, (1 - height) * width
    yield round(low, 3), round(high, 3), round(original or slope * width)
