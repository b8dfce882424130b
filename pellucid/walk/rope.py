"""RoPE, the chapter of the walk on positions (Su et al., RoFormer, 2021).

    T  tokens      D  width of one head      pair i = components i and i + D/2 of a query or key

Where a model turns some of the components only, D counts those. A model may have a second RoPE for
some of its layers: the same steps with another theta, under the names second_rope.*.

A token at position p has its pair i turned by p × frequency i. Then the product of a query and a
key depends on how far apart they stand, not on where. The second half of the file is how the
frequencies are lowered for a context longer than the one a model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pellucid.models import RopeConfig
from pellucid.walk.steps import Script

script = Script()
step = partial(script.step, "rope")


def _turning(config, layer):
    return layer.rope != ""


def _slowed(config, layer):
    return layer.rope != "" and getattr(config, layer.rope).type in SLOWED


def _divided(config, layer):
    return layer.rope != "" and getattr(config, layer.rope).type == "longrope"


@step("rope.exponents", "i / {pairs}", dims="D/2", picture="bars", when=_turning)
def exponents(pairs, wide, device):
    """How far down the row each pair stands"""
    return torch.arange(pairs, device=device).to(wide) / pairs


@step(when=_turning)
def theta(rope, pairs, token_count):
    return base(rope, 2 * pairs, length=token_count)


@step(
    "rope.divisors", "for texts of {token_count} tokens", dims="D/2", picture="bars", when=_divided
)
def divisors(rope, token_count, exponents):
    """How much slower each pair turns, for a context longer than the one of the training"""
    longer = token_count > rope.original_context  # then all positions take the other divisors
    return exponents.new_tensor(rope.long_factor if longer else rope.short_factor)


@step(
    "rope.frequencies",
    "1 / {theta}^{exponents}",
    dims="D/2",
    picture="bars",
    when=lambda config, layer: layer.rope != "" and not _divided(config, layer),
)
def frequencies(exponents, theta):
    """Radians that each pair turns from one position to the next"""
    return 1.0 / (theta**exponents)


@step(
    "rope.frequencies",
    "1 / ({divisors} × {theta}^{exponents})",
    title="Radians that each pair turns from one position to the next",
    called="frequencies",
    dims="D/2",
    picture="bars",
    when=_divided,
)
def frequencies_divided(divisors, exponents, theta):
    # Ding et al., LongRoPE, 2024
    return 1.0 / (divisors * theta**exponents)


def _how_slowed(config, layer):
    rope = getattr(config, layer.rope)
    return f"{{frequencies}} as {rope.type}, up to {rope.factor:g} × slower"


@step("rope.scaled_frequencies", _how_slowed, dims="D/2", picture="bars", when=_slowed)
def scaled_frequencies(frequencies, rope, pairs):
    """The same, slowed for a context longer than the one of the training"""
    return SLOWED[rope.type](frequencies, rope, 2 * pairs)


@step("rope.angles", "{positions} ⊗ {scaled_frequencies}", dims="T D/2", when=_turning)
def angles(positions, scaled_frequencies):
    """The angle of each pair at each position"""
    return torch.outer(positions.to(scaled_frequencies.dtype), scaled_frequencies)


@step("rope.cis", "cos + i·sin of {angles}", dims="T D/2", picture="rays", when=_turning)
def cis(angles, rope, dialect, dtype):
    """The angles as complex numbers of length 1"""
    if dialect.polar:
        turn = torch.polar(torch.ones_like(angles), angles)
    else:
        turn = torch.complex(angles.cos(), angles.sin())
    turn = turn * magnitude(rope)
    return rounded(turn, dtype) if dialect.rope == "x" else turn


def rounded(number, dtype):
    """Both parts of complex numbers in the precision of dtype."""
    return torch.view_as_complex(torch.view_as_real(number).to(dtype).to(number.real.dtype))


@step("rope.cos", when=_turning)
def cos(cis, dialect, dtype):
    return cis.real.to(dtype if dialect.rope == "x" else cis.real.dtype)


@step("rope.sin", when=_turning)
def sin(cis, dialect, dtype):
    return cis.imag.to(dtype if dialect.rope == "x" else cis.imag.dtype)


# ── Longer contexts: the formulas of the reference implementations, frequencies (D/2) ─────────────


def base(rope: RopeConfig, head_dim: int, length: int) -> float:
    """theta; the dynamic type raises it for a prompt longer than the original context.

    Chen et al. and bloc97 (2023), as in transformers' dynamic NTK scaling.
    """
    trained = rope.original_context or length
    if rope.type != "dynamic" or length <= trained:
        return rope.theta
    growth = rope.factor * length / trained - (rope.factor - 1)
    return rope.theta * growth ** (head_dim / (head_dim - 2))


def linear(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Every position counts 1/factor (Chen et al., position interpolation, 2023)."""
    return frequencies / rope.factor


def llama3(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Waves longer than the context are slowed, short ones kept (Llama 3.1, `model.py`)."""
    waves_in_context = (rope.original_context or 1) / (2 * math.pi / frequencies)
    smooth = (waves_in_context - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)  # 0: slow it, 1: keep it
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Like llama3, with a ramp that is straight over the pairs (Peng et al., YaRN, 2023)."""
    ends = []
    for turns in (rope.beta_fast, rope.beta_slow):
        wavelength = (rope.original_context or 1) / turns
        ends.append(head_dim / 2 * math.log(wavelength / (2 * math.pi)) / math.log(rope.theta))
    if rope.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], head_dim - 1)
    pair = torch.arange(len(frequencies), device=frequencies.device).to(frequencies.dtype)
    slow = ((pair - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return frequencies / rope.factor * slow + frequencies * (1 - slow)


SLOWED: dict[str, Callable[[Tensor, RopeConfig, int], Tensor]] = {
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
}


def magnitude(rope: RopeConfig) -> float:
    """Length of cos + i·sin: 1, but yarn and longrope sharpen attention as the context grows.

    By 0.1·ln(factor) + 1, and by √(1 + ln(factor) / ln(original context)).
    """

    def sharper(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.type == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context or 1))
    if rope.mscale and rope.mscale_all_dim:
        return sharper(rope.mscale) / sharper(rope.mscale_all_dim)
    return sharper(1.0)
