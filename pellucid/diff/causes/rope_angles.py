"""Which RoPE turned these angles? The frequency of each pair, measured, against known scalings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pellucid.models.rope import RopeConfig, frequencies

_FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0)
_CONTEXTS = (2048, 4096, 8192, 16384, 32768)
_MEASURED_CONTEXTS = tuple(1 << power for power in range(6, 18))
_BANDS = ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0), (2.0, 4.0), (1.0, 3.0), (0.5, 4.0))
MOST = 4  # configs that are replayed, those with the fewest changes first
_WORDS = {
    "theta": "RoPE theta",
    "type": "RoPE scaling type",
    "factor": "RoPE scaling factor",
    "original_context": "RoPE original context",
    "low_freq_factor": "RoPE low_freq_factor",
    "high_freq_factor": "RoPE high_freq_factor",
}


def fitting(
    rope: RopeConfig, angles: Tensor, positions: Tensor, config: Any, doubt: float = 0.0
) -> Iterator[tuple[RopeConfig, str, str]]:
    """Configs (with cause and evidence) whose frequencies are those that the angles show.

    angles (T, D/2) are known up to whole turns; positions (T). `doubt` is by how many radians per
    position a slope may be off, since they were measured on rounded values.
    """
    pairs = angles.shape[-1]
    slopes = [radians_per_position(angles[..., pair], positions) for pair in range(pairs)]
    known = torch.tensor([slope is not None for slope in slopes])
    if int(known.sum()) < 2 or slopes[0] is None or not slopes[0] > 0:
        return
    seen = torch.tensor([slope or 0.0 for slope in slopes], dtype=torch.float64)
    ropes = (config.rope, config.second_rope) if config.second_rope is not None else ()
    declared = [frequencies(r, 2 * pairs, length=0, dtype=torch.float64) for r in ropes if r]
    found = []
    noise = 1e-5 + doubt
    for others, expected in _candidates(rope, seen, config.context_length, noise):
        off = (expected - seen).abs()[:, known]
        fits = (off < 1e-3 * expected[:, known] + noise).all(1)
        for place in fits.nonzero()[:, 0].tolist():
            if any(torch.allclose(expected[place], own) for own in declared):
                continue  # the other kind of layer's: a hypothesis of its own
            changes = _changes(rope, others[place])
            found.append((len(changes), off[place].sum().item(), others[place], changes))
    least = min((row[1] for row in found), default=0.0)
    # Of those that fit alike the roundest, which is tried first: 50,000, not 49,986 in 16 bits.
    found.sort(key=lambda row: (row[0], row[1] if row[1] > 3 * least else 0.0))
    for count, _, other, changes in found[:MOST]:
        cause = _cause(rope, other, changes) if count else ""
        if count:
            yield other, cause, _evidence(rope, other, changes)
        if count and "type" in changes and other.magnitude != 1:  # no angle tells it
            said = f"{_evidence(rope, other, changes)}, its factor on cos and sin left out"
            yield replace(other, attention_factor=1.0), cause, said


def unscaled(rope: RopeConfig) -> RopeConfig:
    """The same base without scaling; its original context stays, others count in it."""
    kept = {"share": rope.share, "original_context": rope.original_context}
    return RopeConfig(theta=rope.theta, **kept)


def _changes(rope: RopeConfig, other: RopeConfig) -> list[str]:
    return [f.name for f in fields(rope) if getattr(rope, f.name) != getattr(other, f.name)]


def _cause(rope: RopeConfig, other: RopeConfig, changes: list[str]) -> str:
    if other.type == "default" and rope.type != "default":
        return "RoPE theta and scaling" if "theta" in changes else "RoPE scaling missing"
    if "theta" in changes and len(changes) > 1:
        return "RoPE theta and scaling"
    return _WORDS.get("type" if "type" in changes else changes[0], "RoPE scaling")


def _evidence(rope: RopeConfig, other: RopeConfig, changes: list[str]) -> str:
    told = [
        n for n in changes if n in _WORDS and (other.type != "default" or n in ("theta", "type"))
    ]
    said = ", ".join(f"{n} {getattr(other, n)} instead of {getattr(rope, n)}" for n in told)
    return f"{said}, by the angles of all pairs"


def _candidates(
    rope: RopeConfig, seen: Tensor, context: int, noise: float
) -> Iterator[tuple[list[RopeConfig], Tensor]]:
    """Configs and their frequencies (N, D/2), those of one theta after those of another."""
    width = 2 * len(seen)
    first, second = float(seen[0]), float(seen[1])
    thetas = [rope.theta, 1e4, 5e5, 1e6]
    if 0 < second < first:
        theta = (second / first) ** -(width / 2)
        thetas += [float(f"{theta:.{digits}e}") for digits in (0, 2, 4)]
    # linear scaling slows the fastest pair too
    linear = _round(1 / first) if 0 < first < 0.99 else ()
    for theta in dict.fromkeys(thetas):
        plain = replace(unscaled(rope), theta=theta)
        own = frequencies(plain, width, length=0, dtype=torch.float64)
        slowed = [replace(plain, type="linear", factor=factor) for factor in linear]
        yield [plain, *slowed], _stacked([plain, *slowed], width)
        clear = seen > 20 * noise
        slowest = float((own / seen)[clear].amax()) if bool(clear.any()) else 0.0
        if slowest > 1.05:
            larger = (factor for factor in _FACTORS if factor > 0.9 * slowest)
            yield _scaled(plain, rope, context, width, (*_round(slowest), *larger))


def _round(number: float) -> tuple[float, ...]:
    """A measured number in one to three digits."""
    return tuple(dict.fromkeys(float(f"{number:.{digits}e}") for digits in (0, 1, 2)))


@lru_cache(maxsize=256)
def _scaled(
    plain: RopeConfig, rope: RopeConfig, context: int, width: int, measured: tuple[float, ...]
) -> tuple[list[RopeConfig], Tensor]:
    """The candidates of one theta in which slow pairs are slowed. Kept: there are hundreds."""
    found: list[RopeConfig] = []
    original = dict.fromkeys((rope.original_context or context, context, *_MEASURED_CONTEXTS))
    for factor in dict.fromkeys((rope.factor, *measured)):
        for length in original if factor > 1 else ():
            scaled = replace(plain, factor=factor, original_context=length)
            if rope.type != "llama3":
                found.append(replace(scaled, type="yarn"))
            for low, high in _BANDS:
                band = {"low_freq_factor": low, "high_freq_factor": high}
                found.append(replace(scaled, type="llama3", **band))
    return found, _stacked(found, width)


def _stacked(ropes: list[RopeConfig], width: int) -> Tensor:
    return torch.stack([frequencies(r, width, length=0, dtype=torch.float64) for r in ropes])


def likely(rope: RopeConfig, config: Any) -> Iterator[tuple[RopeConfig, str, str]]:
    """Other scalings by themselves or with another base, where no angle was seen to tell them."""
    found: list[RopeConfig] = []
    if rope.type != "default":
        found += [replace(unscaled(rope), theta=theta) for theta in (1e4, 5e5, 1e6)]
        found += [replace(rope, original_context=c) for c in (*_CONTEXTS, config.context_length)]
    else:
        found += [replace(rope, type="linear", factor=factor) for factor in _FACTORS]
        contexts = dict.fromkeys((config.context_length, *_CONTEXTS))
        for factor, original in product((8.0, 32.0, 4.0, 2.0), contexts):
            scaled = replace(rope, factor=factor, original_context=original)
            found += [replace(scaled, type=kind) for kind in ("yarn", "llama3")]
    if rope.type == "llama3":
        for low, high in _BANDS:
            found.append(replace(rope, low_freq_factor=low, high_freq_factor=high))
    for other in found:
        changes = [f.name for f in fields(rope) if getattr(rope, f.name) != getattr(other, f.name)]
        if changes and not (other.type == "default" and changes == ["type"]):
            said = _evidence(rope, other, changes).removesuffix(", by the angles of all pairs")
            yield other, _cause(rope, other, changes), said


def theta_of(rope: RopeConfig, width: int, turn: float) -> float:
    """The base for which pair 1 turns by so many radians per position, its scaling kept."""
    if rope.type == "default":
        return turn ** -(width / 2)
    low, high = 0.0, 30.0  # exponents of ten; a larger base turns slower
    for _ in range(60):
        middle = (low + high) / 2
        scaled = replace(rope, theta=10.0**middle)
        slower = float(frequencies(scaled, width, length=0, dtype=torch.float64)[1]) < turn
        low, high = (low, middle) if slower else (middle, high)
    return 10.0**low


def radians_per_position(angles: Tensor, positions: Tensor) -> float | None:
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
