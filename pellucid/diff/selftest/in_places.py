"""Faults of where tokens stand: RoPE, the positions of a cache, left padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pellucid.diff.selftest.fault import Change, every, fault, learned, turned
from pellucid.diff.selftest.port import Port
from pellucid.models.rope import RopeConfig


def _rope(**fields: Any) -> Change:
    return lambda config: replace(config, rope=replace(config.rope, **fields))


def _theta(times: float) -> Change:
    return lambda c: replace(c, rope=replace(c.rope, theta=c.rope.theta * times))


def _plain_rope(config: Any) -> Any:
    return replace(config, rope=RopeConfig(theta=config.rope.theta, share=config.rope.share))


def _scaled(kind: str, factor: float) -> Change:
    """A RoPE scaled for a context longer than the one (a short one) it was trained on."""
    return _rope(type=kind, factor=factor, original_context=32)


ROPE = (
    fault(
        "RoPE turns neighbours, not halves",
        "layers.0.attn.q_rotated",
        "RoPE pairing",
        port=Port(pairs="neighbours"),
        applies=turned,
    ),
    fault(
        "rotate_half with tables for neighbours",
        "layers.0.attn.q_rotated",
        "RoPE pairing",
        port=Port(pairs="mixed"),
        applies=turned,
    ),
    fault(
        "keys not rotated",
        "layers.0.attn.k_rotated",
        "RoPE missing",
        port=Port(rotates="q"),
        applies=turned,
    ),
    fault(
        "RoPE turns backwards",
        "rope.sin",
        "RoPE direction",
        port=Port(direction=-1),
        applies=turned,
    ),
    fault(
        "RoPE theta 100 times",
        "rope.cos",
        "RoPE theta",
        static="RoPE theta",
        config=_theta(100),
        applies=turned,
    ),
    fault(
        "RoPE theta a third more",
        "rope.cos",
        "RoPE theta",
        static="RoPE theta",
        config=_theta(4 / 3),
        applies=turned,
    ),
    fault(
        "RoPE theta, tables not seen",
        "layers.0.attn.q_rotated",
        "RoPE theta",
        static="RoPE theta",
        config=_theta(50),
        hides=("rope.cos", "rope.sin"),
        applies=turned,
    ),
    fault(
        "RoPE exponent i/D",
        "rope.cos",
        "RoPE exponent",
        port=Port(exponent="i/D"),
        applies=every(turned, lambda c: c.rope.type != "yarn"),  # whose edges know the base
    ),
    fault(
        "llama3 scaling missing",
        "rope.cos",
        "RoPE scaling missing",
        static="RoPE scaling missing",
        with_config=_scaled("llama3", 8.0),
        config=_plain_rope,
        applies=turned,
    ),
    fault(
        "llama3 factor 8 for 32",
        "rope.cos",
        "RoPE scaling factor",
        static="RoPE scaling factor",
        with_config=_scaled("llama3", 32.0),
        config=_rope(factor=8.0),
        applies=turned,
    ),
    fault(
        "linear factor ignored",
        "rope.cos",
        "RoPE scaling missing",
        static="RoPE scaling missing",
        with_config=_rope(type="linear", factor=4.0),
        config=_plain_rope,
        applies=turned,
    ),
    fault(
        "yarn ignored",
        "rope.cos",
        "RoPE scaling missing",
        static="RoPE scaling missing",
        with_config=_scaled("yarn", 4.0),
        config=_plain_rope,
        applies=turned,
    ),
    fault(
        "RoPE frequencies in bfloat16",
        "rope.cos",
        "RoPE frequencies rounded",
        port=Port(frequency_dtype=torch.bfloat16),
        rows="long",
        applies=turned,
    ),
    fault(
        "positions in bfloat16",
        "rope.cos",
        "positions rounded",
        port=Port(position_dtype=torch.bfloat16),
        # bfloat16 holds every integer up to 256
        applies=every(turned, lambda c: c.context_length > 300),
        rows="long",
    ),
)

PLACES = (
    fault(
        "cache position one too high",
        "step.1.positions",
        "cache position off by one",
        port=Port(cached_position=1),
        steps=2,
    ),
    fault(
        "cache position one too low",
        "step.1.positions",
        "cache position off by one",
        port=Port(cached_position=-1),
        steps=2,
    ),
    fault(
        "cache position, positions not seen",
        "step.1.rope.cos",
        "positions off by one",
        port=Port(cached_position=1),
        steps=2,
        hides=("positions",),
        applies=turned,
    ),
    fault(
        "left padding without positions",
        "positions",
        "left padding without positions",
        port=Port(counts_padding="always"),
        rows="padded",
        applies=learned,
    ),
    fault(
        "left padding without positions in decoding",
        "step.1.positions",
        "left padding without positions",
        port=Port(counts_padding="decoding"),
        rows="padded",
        steps=1,
    ),
    fault(
        "left padding not masked",
        "mask",
        "padding not masked",
        port=Port(sees_padding=True),
        rows="padded",
    ),
)
