"""The base of RoPE's frequencies, and how they are lowered for a longer context.

    D  head width      pair i  =  components i and i + D/2

Some frequencies are lowered so that larger positions stay in the range the model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Base and scaling of RoPE; fields are named as in Hugging Face's ``rope_scaling``.

    original_context  context length of pre-training, in tokens; all but linear scaling need it
    short_factor, long_factor
                      longrope's divisors of each pair's frequency, for texts within the original
                      context and for longer ones
    share             of a head's components that are turned, the first ones
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"unknown rope type {self.type!r}: expected one of {', '.join(TYPES)}")
        if self.theta <= 0:
            raise ValueError(f"rope theta is {self.theta}: expected a number above 0")
        if not 0 < self.share <= 1:
            raise ValueError(f"rope share is {self.share}: expected a share above 0, at most 1")
        if self.factor < 1:
            raise ValueError(f"rope scaling factor is {self.factor}: expected 1 or more")
        if self.type in ("dynamic", "llama3", "yarn", "longrope") and not self.original_context:
            raise ValueError(f"rope type {self.type!r} needs the original context length")
        if self.type == "llama3" and self.low_freq_factor <= 0:
            raise ValueError(
                f"rope low_freq_factor is {self.low_freq_factor}: expected a number above 0"
            )
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor {self.low_freq_factor} must lie below "
                f"high_freq_factor {self.high_freq_factor}"
            )

        if self.type == "longrope" and not len(self.short_factor) == len(self.long_factor) > 0:
            raise ValueError(
                f"rope has {len(self.short_factor)} short and {len(self.long_factor)} long "
                "factors: longrope needs one of each for every pair"
            )

    @property
    def follows_length(self) -> bool:
        """Whether its frequencies depend on how long the text is, not on the position alone."""
        return self.type in ("dynamic", "longrope")

    @property
    def magnitude(self) -> float:
        """Factor on cos and sin: yarn and longrope sharpen attention as the context grows."""
        if self.type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.type == "longrope":
            stretch = math.log(self.factor) / math.log(self.original_context or 1)
            return math.sqrt(1 + stretch) if self.factor > 1 else 1.0
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def frequencies(
    rope: RopeConfig,
    head_dim: int,
    *,
    length: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Radians per position of each pair, (D/2).

    `length` is the number of tokens seen so far; only dynamic and longrope look at it. One per
    row, (B, 1, 1), gives (B, 1, D/2).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    if rope.type == "default":
        return 1.0 / (rope.theta**exponents)
    return SCALED[rope.type](rope, exponents, length)


# A function per type: (config, 2i / D of each pair, tokens seen so far) -> radians per position.


def _linear(rope: RopeConfig, exponents: Tensor, length: int | Tensor) -> Tensor:
    """Every position counts 1 / factor (Chen et al., position interpolation, 2023)."""
    return 1.0 / (rope.theta**exponents) / rope.factor


def _dynamic(rope: RopeConfig, exponents: Tensor, length: int | Tensor) -> Tensor:
    """A larger theta for a longer text ("NTK-aware", as in transformers' dynamic type)."""
    original, head_dim = rope.original_context or 1, 2 * len(exponents)
    seen = torch.as_tensor(length, dtype=exponents.dtype, device=exponents.device)
    stretch = rope.factor * seen.clamp(min=original) / original - (rope.factor - 1)
    return 1.0 / ((rope.theta * stretch ** (head_dim / (head_dim - 2))) ** exponents)


def _longrope(rope: RopeConfig, exponents: Tensor, length: int | Tensor) -> Tensor:
    """A divisor per pair, another beyond the original context (Ding et al., LongRoPE, 2024)."""
    short, long = exponents.new_tensor(rope.short_factor), exponents.new_tensor(rope.long_factor)
    longer = torch.as_tensor(length, device=exponents.device) > (rope.original_context or 1)
    return 1.0 / (torch.where(longer, long, short) * rope.theta**exponents)


def _llama3(rope: RopeConfig, exponents: Tensor, length: int | Tensor) -> Tensor:
    """Long waves divided by the factor, short ones kept, a ramp between (Llama 3.1 `model.py`)."""
    plain, low, high = 1.0 / (rope.theta**exponents), rope.low_freq_factor, rope.high_freq_factor
    original = rope.original_context or 1
    wavelength = 2 * math.pi / plain
    slowed = torch.where(wavelength > original / low, plain / rope.factor, plain)
    ramp = (original / wavelength - low) / (high - low)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, (1 - ramp) * plain / rope.factor + ramp * plain, slowed)


def _yarn(rope: RopeConfig, exponents: Tensor, length: int | Tensor) -> Tensor:
    """Ramp over the pair index between two numbers of turns (Peng et al., YaRN, 2023)."""
    head_dim, context = 2 * len(exponents), rope.original_context or 1
    # The pairs that make beta_fast and beta_slow turns in the context.
    low = head_dim * math.log(context / (rope.beta_fast * 2 * math.pi)) / (2 * math.log(rope.theta))
    high = (
        head_dim * math.log(context / (rope.beta_slow * 2 * math.pi)) / (2 * math.log(rope.theta))
    )
    low, high = (math.floor(low), math.ceil(high)) if rope.truncate else (low, high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = torch.arange(len(exponents), dtype=exponents.dtype, device=exponents.device)
    # Where both ends meet: a step instead of a division by zero.
    keep = 1 - torch.clamp((pairs - low) / (high - low or 0.001), 0, 1)  # 1: as trained, 0: slowed
    waves = rope.theta**exponents
    return 1.0 / (rope.factor * waves) * (1 - keep) + 1.0 / waves * keep


SCALED: dict[str, Callable[[RopeConfig, Tensor, int | Tensor], Tensor]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
TYPES = ("default", *SCALED)
