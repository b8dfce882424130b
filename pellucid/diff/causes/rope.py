"""RoPE: the tables of cos and sin, and how queries and keys are turned by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid import names
from pellucid.diff.causes.hypothesis import Hypothesis, given, in_setting, of_model, sibling
from pellucid.diff.causes.positions import positions
from pellucid.diff.causes.rope_angles import (
    fitting,
    likely,
    radians_per_position,
    theta_of,
    unscaled,
)
from pellucid.diff.replay.operations import Setting, leaf
from pellucid.diff.replay.replay import Replay
from pellucid.diff.replay.statistics import roundoff
from pellucid.models.attention import repeat_heads
from pellucid.models.rope import RopeConfig, RotaryEmbedding, frequencies, rotate

MOST_PLACED = 512  # tokens, of more the position of each is not looked for
Variant = tuple[RopeConfig, str, str]  # config, cause, evidence


def rope_table(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Other base, scaling, exponent or precision of the angles."""
    config, (which, table) = replay.setting.config, leaf(name).split(".")
    place = 0 if table == "cos" else 1
    for variant in (*_others(config, which), *rope_variants(config, getattr(config, which))):
        yield _with_rope(config, which, variant)
    for variant in () if observed is not None else likely(getattr(config, which), config):
        yield _with_rope(config, which, variant)
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
            lambda r, n, by=shift: _table_of(r, n, place, places=r.arguments(n)[0] + by),
        )
    for other in positions(replay, of_model(name, "positions"), None):
        if "off by one" not in other.cause:
            places = other.compute(replay, name)
            wrong = partial(_table_of, place=place, places=places)
            yield Hypothesis(other.cause, other.evidence, wrong)
    if place == 1:
        yield Hypothesis("RoPE direction", "minus the angles", lambda r, n: -_table_of(r, n, place))
    yield Hypothesis(
        "cos and sin swapped", "the other table", lambda r, n: _table_of(r, n, 1 - place)
    )
    for variant in _measured(replay, name, which):
        yield _with_rope(config, which, variant)


def _with_rope(config: Any, which: str, variant: Variant) -> Hypothesis:
    changed, cause, evidence = variant
    other = replace(config, **{which: changed})
    return Hypothesis(cause, evidence, in_setting(lambda s: replace(s, config=other)))


def _table_of(
    replay: Replay,
    name: str,
    place: int,
    *,
    places: Tensor | None = None,
    frequency_dtype: torch.dtype | None = None,
    position_dtype: torch.dtype | None = None,
    angle_dtype: torch.dtype | None = None,
) -> Tensor:
    s = replay.setting
    rope = getattr(s.config, leaf(name).split(".")[0])
    working = torch.promote_types(s.dtype, torch.float32)
    places = (replay.arguments(name)[0] if places is None else places)[..., None].to(working)
    width, seen = s.config.rotary_width(rope), places.amax(-2, keepdim=True) + 1
    turns = frequencies(rope, width, length=seen, dtype=working)
    turns = turns.to(frequency_dtype).to(working) if frequency_dtype else turns
    places = places.to(position_dtype).to(working) if position_dtype else places
    angles = places * turns
    if angle_dtype:
        angles = (places.to(angle_dtype) * turns.to(angle_dtype)).to(working)
    value = (angles.cos() if place == 0 else angles.sin()) * rope.magnitude
    return value.to(s.dtype) if s.dialect.rope == "x" else value


def _others(config: Any, which: str) -> Iterator[Variant]:
    """The RoPE of the other kind of layer, and other shares of a head's components."""
    rope = getattr(config, which)
    name = "second_rope" if which == "rope" else "rope"
    other = getattr(config, name)
    if other is not None:
        yield other, "RoPE of the other kind of layer", f"{name} for {which}"
    # factors of longrope stand for the pairs of its own share: a port with more or fewer stops
    for share in () if rope.short_factor else (1.0, rope.share / 2, 0.5, 0.25, rope.share * 2):
        width = int(config.head_dim * share) if 0 < share <= 1 else 0
        if width % 2 == 0 and width not in (0, config.rotary_width(rope)):
            said = (
                f"{width} of {config.head_dim} components turned, not {config.rotary_width(rope)}"
            )
            yield replace(rope, share=share), "rotary share", said


def rope_variants(config: Any, rope: RopeConfig) -> Iterator[Variant]:
    """Other scaling, theta and exponents than a config has."""
    width = config.rotary_width(rope)
    if rope.type != "default":
        yield unscaled(rope), "RoPE scaling missing", f"without the {rope.type} scaling"
        if rope.magnitude != 1:
            changed = replace(rope, attention_factor=1.0)
            said = f"cos and sin without {rope.type}'s factor {rope.magnitude:.4g}"
            yield changed, "RoPE magnitude missing", said
        for factor in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
            if factor != rope.factor:
                changed = replace(rope, factor=factor)
                yield (
                    changed,
                    "RoPE scaling factor",
                    f"factor {factor:g} instead of {rope.factor:g}",
                )
        if rope.short_factor != rope.long_factor:
            for one, said in ((rope.short_factor, "short"), (rope.long_factor, "long")):
                changed = replace(rope, short_factor=one, long_factor=one)
                yield changed, "RoPE factors of the other length", f"the {said} factors for all"
    for theta in (1e4, 5e5, 1e6, 1e5, 2.5e5, 1e3, 2e4, 4e4, 1e7):
        if theta != rope.theta:
            yield (
                replace(rope, theta=theta),
                "RoPE theta",
                f"theta {theta:g} instead of {rope.theta:g}",
            )
    # Frequencies are theta^(-2i/D) of the D components turned: dividing the exponent by something
    # else shows as another theta.
    for name, divisor in (
        ("D/2", width / 2),
        ("2 D", 2 * width),
        ("D + 2", width + 2),
        ("D − 2", width - 2),
        ("the whole head's width", config.head_dim),
    ):
        if divisor not in (0, width):
            evidence = f"exponents divided by {name} instead of D"
            yield replace(rope, theta=rope.theta ** (width / divisor)), "RoPE exponent", evidence


def _measured(replay: Replay, name: str, which: str) -> Iterator[Variant]:
    """The base that the observed angles themselves show."""
    tables = [replay.observed.get(of_model(name, f"{which}.{table}")) for table in ("cos", "sin")]
    positions = replay.arguments(name)[0]
    if tables[0] is not None and tables[1] is not None:
        angles = torch.atan2(tables[1].double(), tables[0].double())
        config, unit = replay.setting.config, roundoff(tables[0].dtype)
        doubt = unit / max(1, int(positions.max()))  # the last angle is off by a roundoff at most
        yield from fitting(getattr(config, which), angles, positions, config, doubt)
        yield from _of_angles(config, which, angles, positions)


def _of_angles(config: Any, which: str, angles: Tensor, positions: Tensor) -> Iterator[Variant]:
    rope = getattr(config, which)
    pairs = angles.shape[-1]
    turn = radians_per_position(angles[..., 1], positions) if pairs > 1 else None
    if turn is None or not 0 < turn < 1:
        return
    theta = theta_of(rope, 2 * pairs, turn)
    for digits in (1, 2, 3, 5, 9):
        rounded = float(f"{theta:.{digits - 1}e}")
        changed = replace(rope, theta=rounded)
        if changed not in (config.rope, config.second_rope):  # that is a hypothesis of its own
            evidence = f"theta {rounded:g} instead of {rope.theta:g}, by the angles"
            yield changed, "RoPE theta", evidence


def rotated(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Wrong pairs, missing, backwards, twice, other components, in a coarse dtype."""
    if names.step_of(name) and observed is None:
        which = replay.setting.config.layer(names.layer_of(name) or 0).rope

        def from_zero(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            rotary = RotaryEmbedding(getattr(s.config, which), s.config.head_dim, s.dialect)
            cos, sin = rotary(torch.arange(x.shape[2], device=x.device), s.dtype)
            return rotate(x, cos, sin, s.dialect)

        yield Hypothesis("positions restart", "positions start at 0 again", given(from_zero))
    for cause, evidence, function in _TURNED_WRONGLY:
        yield Hypothesis(cause, evidence, given(function))
    if leaf(name) == "attn.q_rotated":
        keys = sibling(name, "attn.k_rotated")

        def of_keys(replay: Replay, name: str) -> Tensor:
            heads = replay.setting.config.n_heads
            return repeat_heads(replay.compute(keys), heads)

        yield Hypothesis("q and k exchanged", "the keys where the queries should be", of_keys)
    yield from _elsewhere(replay, name, observed)
    for changed, cause, evidence in _seen_in(replay, name, observed):

        def turned(s: Setting, x: Tensor, cos: Tensor, sin: Tensor, rope=changed) -> Tensor:
            rotary = RotaryEmbedding(rope, s.config.head_dim, s.dialect)
            cos, sin = rotary(replay.value(of_model(name, "positions")), s.dtype)
            return rotate(x, cos, sin, s.dialect)

        yield Hypothesis(cause, evidence, given(turned))
    for coarse in (torch.bfloat16, torch.float16):
        short = str(coarse).removeprefix("torch.")

        def rounded(s: Setting, x: Tensor, cos: Tensor, sin: Tensor, c=coarse) -> Tensor:
            exact = replace(s.dialect, polar=False)
            return rotate(x.to(c), cos.to(c), sin.to(c), exact).to(s.dtype)

        yield Hypothesis("RoPE cast order", f"rotated in {short}", given(rounded))


def _elsewhere(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """The position at which each token was turned, by the angle of every pair."""
    which = replay.setting.config.layer(names.layer_of(name) or 0).rope
    seen = _angles_seen(replay, name, observed)
    if seen is None or names.step_of(name) or len(seen) > MOST_PLACED:
        return
    rope = getattr(replay.setting.config, which)
    width = replay.setting.config.rotary_width(rope)
    turns = frequencies(rope, width, length=0, dtype=torch.float64)
    count = len(seen)
    possible = torch.arange(-count, 2 * count + 1)
    fit = ((angles[None] - possible[:, None] * turns).cos().sum(-1) for angles in seen)
    near = possible[torch.stack([token.argmax() for token in fit])]
    if torch.equal(near, torch.arange(count)):
        return

    def turned(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotary = RotaryEmbedding(rope, s.config.head_dim, s.dialect)
        cos, sin = rotary(near, s.dtype)
        return rotate(x, cos, sin, s.dialect)

    said = ", ".join(str(int(place)) for place in near[:12])
    evidence = f"turned as at {said}{' …' if count > 12 else ''}"
    yield Hypothesis("other positions", evidence, given(turned))


def _partly(turn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A way to turn whole vectors, applied to as many components as the tables are for."""

    def turned(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, rest = x.tensor_split((2 * cos.shape[-1],), dim=-1)
        return torch.cat((turn(s, first, cos, sin), rest), dim=-1)

    return turned


def _interleaved(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    split = torch.cat((pairs[..., 0], pairs[..., 1]), -1)
    turned = rotate(split, cos, sin, s.dialect).chunk(2, -1)
    return torch.stack(turned, -1).flatten(-2)


def _mixed(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rotate_half on tables repeated for neighbours, a common mixture of both layouts."""
    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(s.dtype)


def _mixed_back(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours turned with tables repeated for halves, the opposite mixture."""
    cos, sin = cos.repeat(*[1] * (cos.ndim - 1), 2), sin.repeat(*[1] * (sin.ndim - 1), 2)
    first, second = x[..., 0::2], x[..., 1::2]
    return (x * cos + torch.stack((-second, first), -1).flatten(-2) * sin).to(s.dtype)


def _split_behind(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(torch.cat((x[..., 0::2], x[..., 1::2]), -1), cos, sin, s.dialect)


def _joined_behind(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.stack(rotate(x, cos, sin, s.dialect).chunk(2, -1), -1).flatten(-2)


def rotations(
    replay: Replay, name: str
) -> Iterator[tuple[str, Callable[[Tensor, Setting], Tensor]]]:
    """The turns of this layer's queries and keys, for a tensor (B, heads, T, D) that has none."""
    which = replay.setting.config.layer(names.layer_of(name) or 0).rope
    if not which or names.step_of(name):
        return
    for said, turn in (
        ("by pairs half apart", lambda s, x, c, d: rotate(x, c, d, s.dialect)),
        ("by pairs of neighbours", _partly(_interleaved)),
    ):

        def turned(x: Tensor, s: Setting, turn: Callable[..., Tensor] = turn) -> Tensor:
            tables = (replay.value(of_model(name, f"{which}.{part}")) for part in ("cos", "sin"))
            cos, sin = (table.to(x.dtype) for table in tables)
            return turn(s, x, cos, sin)

        yield said, turned


def _last_turned(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The last components of a head turned instead of the first."""
    rest, last = x.tensor_split((x.shape[-1] - 2 * cos.shape[-1],), dim=-1)
    return torch.cat((rest, rotate(last, cos, sin, s.dialect)), dim=-1)


def _one_sign(sign: int) -> Callable[..., Tensor]:
    """(x cos + s y sin, y cos + s x sin): no rotation, one of its two signs is wrong."""

    def turned(s: Setting, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        parts = (first * cos + sign * second * sin, second * cos + sign * first * sin)
        return torch.cat(parts, -1).to(s.dtype)

    return _partly(turned)


# Wrong ways to turn queries and keys: cause, evidence, function(setting, x, cos, sin).
_TURNED_WRONGLY: tuple[tuple[str, str, Callable[..., Tensor]], ...] = (
    ("RoPE pairing", "pairs are neighbours instead of half apart", _partly(_interleaved)),
    ("RoPE pairing", "half-split rotation with interleaved tables", _partly(_mixed)),
    ("RoPE pairing", "neighbours turned with tables for halves", _partly(_mixed_back)),
    ("RoPE pairing", "neighbours turned, then written as halves", _partly(_split_behind)),
    ("RoPE pairing", "halves turned, then written as neighbours", _partly(_joined_behind)),
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
    ("RoPE direction", "the sign of the first component's sin", _one_sign(1)),
    ("RoPE direction", "the sign of the second component's sin", _one_sign(-1)),
    ("RoPE on the last components", "the first stay as they are", _last_turned),
    (
        "heads split wrongly",
        "heads not moved before the tokens: (B, T, H·D) read as (B, H, T, D)",
        lambda s, x, cos, sin: rotate(
            x.transpose(1, 2).flatten(2).reshape(x.shape), cos, sin, s.dialect
        ),
    ),
)


def _seen_in(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Variant]:
    """The base that the turn from q to its rotation shows, where the tables were not observed."""
    config = replay.setting.config
    angles = _angles_seen(replay, name, observed)
    if angles is None:
        return
    which = config.layer(names.layer_of(name) or 0).rope
    positions = replay.value(of_model(name, "positions"))
    if positions.ndim == 1:
        unit = roundoff(observed.dtype) if observed is not None else 0.0
        doubt = unit / max(8.0, int(positions.max()) / 4)  # a turn of two rounded components
        yield from fitting(getattr(config, which), angles, positions, config, doubt)
        yield from _of_angles(config, which, angles, positions)


def _angles_seen(replay: Replay, name: str, observed: Tensor | None) -> Tensor | None:
    """By which angle (T, D/2) each pair of a token was turned, where no table was observed."""
    config = replay.setting.config
    which = config.layer(names.layer_of(name) or 0).rope
    if observed is None or of_model(name, f"{which}.cos") in replay.observed:
        return None
    width = config.rotary_width(getattr(config, which))
    first, second = replay.arguments(name)[0][..., :width].double().chunk(2, -1)  # (B, H, T, D/2)
    third, fourth = observed[..., :width].double().chunk(2, -1)
    if first.shape != third.shape:
        return None
    return torch.atan2(
        (first * fourth - second * third).sum((0, 1)), (first * third + second * fourth).sum((0, 1))
    )
