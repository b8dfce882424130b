"""Where tokens stand and who sees whom: positions, masks, RoPE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pellucid import names
from pellucid.compare.ops import Setting, leaf
from pellucid.compare.replay import Replay
from pellucid.compare.wrong.base import (
    Hypothesis,
    given,
    in_setting,
)
from pellucid.models.rope import RopeConfig, frequencies, rotate


def positions(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    expected, _ = replay.expected_places(names.step_of(name))
    for shift in (1, -1):
        yield Hypothesis(
            "cache position off by one" if names.step_of(name) else "positions off by one",
            f"every position {shift:+d}",
            lambda r, n, by=shift: expected + by,
        )
    plain = torch.arange(expected.shape[-1]) + int(expected.max()) - expected.shape[-1] + 1
    yield Hypothesis(
        "left padding without positions",
        "positions count the padding",
        lambda r, n: plain.expand_as(expected),
    )
    counted = torch.arange(expected.shape[-1]).expand_as(expected)
    yield Hypothesis("positions restart", "positions start at 0 again", lambda r, n: counted)


def mask(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    step = names.step_of(name)
    _, expected = replay.expected_places(step)
    tokens, seen = expected.shape[-2:]
    rows, columns = torch.arange(tokens)[:, None], torch.arange(seen)[None]
    bottom = rows + seen - tokens
    for cause, evidence, value in (
        ("mask one too wide", "each token also sees the next one", columns <= bottom + 1),
        ("mask one too narrow", "no token sees itself", columns < bottom),
        ("top-left causal mask", "the mask ignores the tokens in the cache", columns <= rows),
        ("mask missing", "every token sees every other", columns >= 0),
        ("mask transposed", "every token sees only what follows it", columns >= bottom),
    ):
        allowed = value.expand(expected.shape)
        yield Hypothesis(cause, evidence, lambda r, n, v=allowed: v)
        if expected.ndim == 4:
            padded = allowed & expected.diagonal(dim1=-2, dim2=-1).any(-1)[..., None, None]
            yield Hypothesis(cause, evidence, lambda r, n, v=padded: v)
    if expected.ndim == 4:
        causal = (columns <= bottom).expand(expected.shape)
        yield Hypothesis("padding not masked", "tokens see the padding", lambda r, n: causal)


def rope_table(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    rope = replay.setting.config.rope
    for changed, cause, evidence in _rope_variants(rope, replay.setting.config.head_dim, observed):
        config = replace(replay.setting.config, rope=changed)
        variant = in_setting(lambda s, c=config: replace(s, config=c))
        yield Hypothesis(cause, evidence, variant)
    place = 0 if leaf(name) == "rope.cos" else 1
    for coarse in (torch.bfloat16, torch.float16):
        short = str(coarse).removeprefix("torch.")
        yield Hypothesis(
            "RoPE frequencies rounded",
            f"frequencies in {short}",
            lambda r, n, c=coarse: _table_of(r, n, place, frequency_dtype=c),
        )
        yield Hypothesis(
            "positions rounded",
            f"positions or angles in {short}",
            lambda r, n, c=coarse: _table_of(r, n, place, position_dtype=c),
        )
        yield Hypothesis(
            "positions rounded",
            f"positions × frequencies in {short}",
            lambda r, n, c=coarse: _table_of(r, n, place, angle_dtype=c),
        )
    for shift in (1, -1):
        yield Hypothesis(
            "positions off by one",
            f"table of position {shift:+d}",
            lambda r, n, by=shift: _table_of(r, n, place, shift=by),
        )
    yield Hypothesis(
        "cos and sin swapped", "the other table", lambda r, n: _table_of(r, n, 1 - place)
    )


def _table_of(
    replay: Replay,
    name: str,
    place: int,
    *,
    shift: int = 0,
    frequency_dtype: torch.dtype | None = None,
    position_dtype: torch.dtype | None = None,
    angle_dtype: torch.dtype | None = None,
) -> Tensor:
    s = replay.setting
    working = torch.promote_types(s.dtype, torch.float32)
    turns = frequencies(s.config.rope, s.config.head_dim, length=0, dtype=working)
    positions = (replay.arguments(name)[0] + shift)[..., None].to(working)
    turns = turns.to(frequency_dtype).to(working) if frequency_dtype else turns
    positions = positions.to(position_dtype).to(working) if position_dtype else positions
    angles = positions * turns
    if angle_dtype:
        angles = (positions.to(angle_dtype) * turns.to(angle_dtype)).to(working)
    value = (angles.cos() if place == 0 else angles.sin()) * s.config.rope.magnitude
    return value.to(s.dtype) if s.dialect.rope == "x" else value


def _rope_variants(
    rope: RopeConfig, head_dim: int, observed: Tensor
) -> Iterator[tuple[RopeConfig, str, str]]:
    if rope.type != "default":
        plain = RopeConfig(theta=rope.theta)
        yield plain, "RoPE scaling missing", f"without the {rope.type} scaling"
        for factor in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
            if factor != rope.factor:
                changed = replace(rope, factor=factor)
                yield (
                    changed,
                    "RoPE scaling factor",
                    f"factor {factor:g} instead of {rope.factor:g}",
                )
        if rope.type == "yarn":
            changed = replace(rope, attention_factor=1.0)
            yield changed, "RoPE magnitude missing", "cos and sin without yarn's factor"
    for theta in (1e4, 5e5, 1e6, 1e5, 2.5e5, 1e3, 2e4, 4e4, 1e7):
        if theta != rope.theta:
            yield (
                replace(rope, theta=theta),
                "RoPE theta",
                f"theta {theta:g} instead of {rope.theta:g}",
            )
    # Frequencies are theta^(-2i/D): dividing the exponent by something else shows as another theta.
    for name, power in (("D/2", 2.0), ("D + 2", head_dim / (head_dim + 2)), ("D − 2", 0.0)):
        power = head_dim / (head_dim - 2) if not power and head_dim > 2 else power
        if power:
            yield (
                replace(rope, theta=rope.theta**power),
                "RoPE exponent",
                f"exponents divided by {name} instead of D",
            )


def rotated(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    def interleaved(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2))
        split = torch.cat((pairs[..., 0], pairs[..., 1]), -1)
        turned = rotate(split, cos, sin, s.dialect).chunk(2, -1)
        return torch.stack(turned, -1).flatten(-2)

    def mixed(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """rotate_half on tables repeated for neighbours, a common mixture of both layouts."""
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).to(s.dtype)

    for cause, evidence, function in (
        ("RoPE pairing", "pairs are neighbours instead of half apart", interleaved),
        ("RoPE pairing", "half-split rotation with interleaved tables", mixed),
        ("RoPE missing", "not rotated", lambda s, x, cos, sin: x),
        (
            "RoPE direction",
            "rotated backwards",
            lambda s, x, cos, sin: rotate(x, cos, -sin, s.dialect),
        ),
        (
            "cos and sin swapped",
            "sin for cos",
            lambda s, x, cos, sin: rotate(x, sin, cos, s.dialect),
        ),
        (
            "RoPE applied twice",
            "rotated twice",
            lambda s, x, cos, sin: rotate(rotate(x, cos, sin, s.dialect), cos, sin, s.dialect),
        ),
    ):
        yield Hypothesis(cause, evidence, given(function))
    for coarse in (torch.bfloat16, torch.float16):
        short = str(coarse).removeprefix("torch.")

        def rounded(s: Setting, x: Tensor, cos: Tensor, sin: Tensor, c=coarse) -> Tensor:
            exact = replace(s.dialect, polar=False)
            return rotate(x.to(c), cos.to(c), sin.to(c), exact).to(s.dtype)

        yield Hypothesis("RoPE cast order", f"rotated in {short}", given(rounded))
