"""Rotary position embedding (Su et al., RoFormer, 2021).

    T  tokens in this pass      D  head width      pair i  =  components i and i + D/2

A token at position p has its pair i turned by the angle p × frequency i. The frequencies fall from
1 to nearly 1/theta; `rope_scaling` lowers some of them for a context longer than the training's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pellucid.models.rope_scaling import SCALED, RopeConfig, frequencies
from pellucid.numerics import Dialect
from pellucid.trace import tap

__all__ = ["RopeConfig", "RotaryEmbedding", "frequencies", "interleaved", "rotate"]


class RotaryEmbedding(nn.Module):
    """cos and sin of the angles of one pass; no parameters, no buffers."""

    def __init__(self, rope: RopeConfig, head_dim: int, dialect: Dialect) -> None:
        super().__init__()
        self.rope, self.head_dim, self.dialect = rope, int(head_dim * rope.share), dialect
        self.size = rope.magnitude

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (T) or (B, T) -> cos, sin (T, D/2) or (B, T, D/2)."""
        wide, rope, width = torch.promote_types(dtype, torch.float32), self.rope, self.head_dim
        exponents = torch.arange(0, width, 2, dtype=wide, device=positions.device) / width
        turns = 1.0 / (rope.theta**exponents)  # (D/2), radians per position
        if rope.type != "default":  # (D/2), or (B, 1, D/2) as rows differ
            length = positions[..., None].amax(-2, keepdim=True) + 1  # of each row, as if alone
            turns = SCALED[rope.type](rope, exponents, length)
        angles = positions[..., None].to(wide) * turns
        cos, sin = angles.cos(), angles.sin()
        if self.dialect.polar and not torch.compiler.is_compiling():
            cis = torch.polar(torch.ones_like(angles), angles)
            cos, sin = cis.real, cis.imag
        kept = dtype if self.dialect.rope == "x" else wide
        cos, sin = (cos * self.size).to(kept), (sin * self.size).to(kept)
        return tap(self, "cos", cos), tap(self, "sin", sin)


# What `rotate` returns lies in memory as (B, T, H, D), the order in which the references leave it:
# the product q · k may add up its terms in another order else.
def rotate(x: Tensor, cos: Tensor, sin: Tensor, dialect: Dialect) -> Tensor:
    """Turn each pair of x (B, H, T, D) by its angle; cos, sin (T, D/2) or (B, T, D/2)."""
    if 2 * cos.shape[-1] < x.shape[-1]:
        return _rotate_some(x, cos, sin, dialect)
    if dialect.polar and not torch.compiler.is_compiling():
        turned = _rotate_complex(x, torch.complex(cos, sin))
    else:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (…, T, 1, D/2): the same for every head
        first, second = x.transpose(1, 2).to(cos.dtype).chunk(2, dim=-1)  # (B, T, H, D/2) each
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return (turned if dialect.rope == "keep" else turned.to(x.dtype)).transpose(1, 2)


def _rotate_some(x: Tensor, cos: Tensor, sin: Tensor, dialect: Dialect) -> Tensor:
    """As `rotate` for the first components of a head; the rest stay as they are (GPT-NeoX, Phi)."""
    first, rest = x.tensor_split((2 * cos.shape[-1],), dim=-1)
    turned = rotate(first, cos, sin, dialect).transpose(1, 2)
    rest = rest.transpose(1, 2).to(turned.dtype)
    return torch.cat((turned, rest), dim=-1).transpose(1, 2)


def _rotate_complex(x: Tensor, cis: Tensor) -> Tensor:
    """x (B, H, T, D) times cis (T, D/2) or (B, T, D/2) -> (B, T, H, D), in cis' precision.

    Complex multiplication may fuse a product with a sum where separate operations round twice, and
    which elements it does so for depends on the memory order: Meta's, (B, T, H, D/2), is kept.
    The compiler knows no complex numbers; compiled code takes the real arithmetic of `rotate`.
    """
    first, second = x.transpose(1, 2).to(cis.real.dtype).chunk(2, dim=-1)  # (B, T, H, D/2) each
    pairs = torch.complex(first.contiguous(), second.contiguous())
    turned = pairs * cis[..., :, None, :]  # the same for every head
    return torch.cat((turned.real, turned.imag), dim=-1)


def interleaved(x: Tensor) -> Tensor:
    """x (B, H, T, D) with pair i at components i and i + D/2 -> with pair i at 2i and 2i + 1.

    half-split    a0 a1 a2 b0 b1 b2
    interleaved   a0 b0 a1 b1 a2 b2
    """
    pairs = x.transpose(1, 2).unflatten(-1, (2, -1))  # (B, T, H, 2, D/2)
    return pairs.transpose(-1, -2).flatten(-2).transpose(1, 2)
