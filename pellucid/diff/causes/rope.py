"""RoPE: the tables of cos and sin, and how queries and keys are turned by them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pellucid.diff.causes.hypothesis import Hypothesis, given, in_setting, of_model
from pellucid.diff.replay.operations import Setting, leaf
from pellucid.diff.replay.replay import Replay
from pellucid.models.rope import RopeConfig, RotaryEmbedding, frequencies, rotate

Variant = tuple[RopeConfig, str, str]  # config, cause, evidence


def rope_table(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Other base, scaling, exponent or precision of the angles."""
    config = replay.setting.config
    for variant in _variants(config.rope, config.head_dim):
        yield _with_rope(config, variant)
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
    if place == 1:
        yield Hypothesis("RoPE direction", "minus the angles", lambda r, n: -_table_of(r, n, place))
    yield Hypothesis(
        "cos and sin swapped", "the other table", lambda r, n: _table_of(r, n, 1 - place)
    )
    for variant in _measured(replay, name):
        yield _with_rope(config, variant)


def _with_rope(config: Any, variant: Variant) -> Hypothesis:
    changed, cause, evidence = variant
    other = replace(config, rope=changed)
    return Hypothesis(cause, evidence, in_setting(lambda s: replace(s, config=other)))


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


def _variants(rope: RopeConfig, head_dim: int) -> Iterator[Variant]:
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
    for name, power in (
        ("D/2", 2.0),
        ("2 D", 0.5),
        ("D + 2", head_dim / (head_dim + 2)),
        ("D − 2", 0.0),
    ):
        power = head_dim / (head_dim - 2) if not power and head_dim > 2 else power
        if power:
            yield (
                replace(rope, theta=rope.theta**power),
                "RoPE exponent",
                f"exponents divided by {name} instead of D",
            )


def _measured(replay: Replay, name: str) -> Iterator[Variant]:
    """The base that the observed angles themselves show."""
    tables = [replay.observed.get(of_model(name, what)) for what in ("rope.cos", "rope.sin")]
    positions = replay.arguments(name)[0]
    if tables[0] is not None and tables[1] is not None:
        yield from _of_angles(
            replay, torch.atan2(tables[1].double(), tables[0].double()), positions
        )


def _of_angles(replay: Replay, angles: Tensor, positions: Tensor) -> Iterator[Variant]:
    config = replay.setting.config
    turn = _radians_per_position(angles[..., 1], positions) if config.head_dim > 2 else None
    if turn is None or not 0 < turn < 1:
        return
    theta = turn ** (-config.head_dim / 2)
    for digits in (1, 2, 3, 5, 9):
        rounded = float(f"{theta:.{digits - 1}e}")
        if rounded != config.rope.theta:
            evidence = f"theta {rounded:g} instead of {config.rope.theta:g}, by the angles"
            yield replace(config.rope, theta=rounded), "RoPE theta", evidence


def _radians_per_position(angles: Tensor, positions: Tensor) -> float | None:
    """Slope of angles (…, T), known up to whole turns, over positions (…, T); None if unclear."""
    places = positions.expand(angles.shape).reshape(-1, angles.shape[-1])[0].tolist()
    pairs = sorted(zip(places, angles.reshape(-1, angles.shape[-1])[0].tolist(), strict=True))
    slope, last = None, 0
    for place, angle in pairs:
        if place <= 0:
            continue
        if slope is None:
            if place > 2:  # no longer within half a turn for certain
                return None
            slope, last = angle / place, place
        elif place <= 2 * last + 1:  # the slope so far says how many whole turns
            turns = round((slope * place - angle) / (2 * math.pi))
            slope, last = (angle + 2 * math.pi * turns) / place, place
    return slope


def rotated(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Wrong pairs, missing, backwards, twice, in a coarse dtype."""

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
    for changed, cause, evidence in _seen_in(replay, name, observed):
        config = replace(replay.setting.config, rope=changed)

        def turned(s: Setting, x: Tensor, cos: Tensor, sin: Tensor, c=config) -> Tensor:
            rotary = RotaryEmbedding(c.rope, c.head_dim, s.dialect)
            cos, sin = rotary(replay.value(of_model(name, "positions")), s.dtype)
            return rotate(x, cos, sin, s.dialect)

        yield Hypothesis(cause, evidence, given(turned))
    for coarse in (torch.bfloat16, torch.float16):
        short = str(coarse).removeprefix("torch.")

        def rounded(s: Setting, x: Tensor, cos: Tensor, sin: Tensor, c=coarse) -> Tensor:
            exact = replace(s.dialect, polar=False)
            return rotate(x.to(c), cos.to(c), sin.to(c), exact).to(s.dtype)

        yield Hypothesis("RoPE cast order", f"rotated in {short}", given(rounded))


def _seen_in(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Variant]:
    """The base that the turn from q to its rotation shows, where the tables were not observed."""
    if observed is None or of_model(name, "rope.cos") in replay.observed:
        return
    first, second = replay.arguments(name)[0].double().chunk(2, -1)  # (B, H, T, D/2)
    third, fourth = observed.double().chunk(2, -1)
    angles = torch.atan2(
        (first * fourth - second * third).sum((0, 1)), (first * third + second * fourth).sum((0, 1))
    )
    positions = replay.value(of_model(name, "positions"))
    if positions.ndim == 1:
        yield from _of_angles(replay, angles, positions)
