"""Faults of what differs from layer to layer: windows, RoPE of another base or none at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pellucid.diff.selftest.fault import Change, every, fault, first_turned, learned, plain_scores
from pellucid.diff.selftest.port import Port
from pellucid.models import RopeConfig
from pellucid.models.config import Layer

_OTHER: dict[str, Any] = {"rope": "second_rope", "second_rope": "rope", "": ""}


def _kinds(change: Callable[[Any, Layer], Layer]) -> Port:
    """A port that takes every layer for another kind."""
    return Port(misreads=lambda c: replace(c, layers=tuple(change(c, kind) for kind in c.kinds)))


def _share(times: float) -> Change:
    return lambda c: replace(c, rope=replace(c.rope, share=min(1.0, c.rope.share * times)))


def _at(leaf: str, found: Callable[[Any], bool] = lambda kind: True) -> Callable[[Any], str]:
    """A leaf of the first layer whose kind is so."""

    def name(config: Any) -> str:
        return f"layers.{next(i for i, kind in enumerate(config.kinds) if found(kind))}.{leaf}"

    return name


def _windowed(kind: Layer) -> bool:
    return kind.window


def _after_rope(config: Any) -> str:
    """What reads rotated queries first."""
    if config.qk_norm and config.qk_norm_last:
        return "layers.0.attn.q_normed"
    return "layers.0.attn.q_scaled" if config.query_growth else "layers.0.attn.scores"


def _first_rope(config: Any) -> Any:
    """The RoPE of the first layer, or None."""
    return getattr(config, config.kinds[0].rope) if config.kinds[0].rope else None


def _table(config: Any) -> str:
    return f"{config.kinds[0].rope}.cos"


def _first_as(change: Change) -> Port:
    """A port that takes the RoPE of the first layer for another."""
    return Port(misreads=lambda c: replace(c, **{c.kinds[0].rope: change(_first_rope(c))}))


def _any_share(config: Any) -> bool:
    """The first RoPE may turn any share: it has no factors for so many pairs."""
    return config.kinds[0].rope == "rope" and not config.rope.short_factor


WINDOWS = (
    fault(
        "window one too wide",
        "window_mask",
        "window one too wide",
        applies=lambda c: c.has_windows,
        port=Port(misreads=lambda c: replace(c, window=c.window + 1)),
    ),
    fault(
        "window one too narrow",
        "window_mask",
        "window one too narrow",
        applies=lambda c: c.has_windows and c.window > 1,
        port=Port(misreads=lambda c: replace(c, window=c.window - 1)),
    ),
    fault(
        "window one too wide, masks not seen",
        _at("attn.masked_scores", _windowed),
        "window one too wide",
        applies=lambda c: c.has_windows,
        port=Port(misreads=lambda c: replace(c, window=c.window + 1)),
        hides=("mask",),
    ),
    fault(
        "window one too narrow, in a fused kernel",
        _at("attn.z", _windowed),
        "window one too narrow",
        applies=every(plain_scores, lambda c: c.has_windows and c.window > 1),
        port=Port(misreads=lambda c: replace(c, window=c.window - 1), fused=True),
        hides=("mask",),
    ),
    fault(
        "window left out",
        _at("attn.masked_scores", _windowed),
        "window missing",
        applies=lambda c: c.has_windows,
        port=_kinds(lambda c, kind: kind._replace(window=False)),
    ),
    fault(
        "window left out, in a fused kernel",
        _at("attn.z", _windowed),
        "window missing",
        applies=every(plain_scores, lambda c: c.has_windows),
        port=Port(
            misreads=lambda c: replace(c, layers=tuple(k._replace(window=False) for k in c.kinds)),
            fused=True,
        ),
    ),
    fault(
        "window on the other layers",
        "layers.0.attn.masked_scores",
        "window on the wrong layers",
        applies=lambda c: len({kind.window for kind in c.kinds}) == 2,
        port=_kinds(lambda c, kind: kind._replace(window=not kind.window)),
    ),
    fault(
        "window on every layer",
        _at("attn.masked_scores", lambda kind: not kind.window),
        "window on the wrong layers",
        applies=lambda c: len({kind.window for kind in c.kinds}) == 2,
        port=_kinds(lambda c, kind: kind._replace(window=True)),
    ),
    fault(
        "window one too wide in decoding",
        "step.1.window_mask",
        "window one too wide",
        applies=lambda c: c.has_windows,
        port=Port(decoding_window=1),
        steps=2,
    ),
    fault(
        "window left out in decoding",
        "step.1.window_mask",
        "window missing",
        applies=lambda c: c.has_windows,
        port=Port(decoding_window=1 << 20),
        steps=2,
    ),
    fault(
        "window one too narrow in decoding, masks not seen",
        lambda c: "step.1." + _at("attn.masked_scores", _windowed)(c),
        "window one too narrow",
        applies=lambda c: c.has_windows and c.window > 1,
        port=Port(decoding_window=-1),
        hides=("mask",),
        steps=2,
    ),
)

ROPE = (
    fault(
        "RoPE of the other kind of layer",
        "layers.0.attn.q_rotated",
        "RoPE of the other kind of layer",
        applies=lambda c: {"rope", "second_rope"} <= {kind.rope for kind in c.kinds},
        port=_kinds(lambda c, kind: kind._replace(rope=_OTHER[kind.rope])),
    ),
    fault(
        "one theta for all layers",
        "second_rope.cos",
        "RoPE of the other kind of layer",
        applies=lambda c: {"rope", "second_rope"} <= {kind.rope for kind in c.kinds},
        port=Port(misreads=lambda c: replace(c, second_rope=c.rope)),
    ),
    fault(
        "one RoPE for all layers",
        _at("attn.q_rotated", lambda kind: kind.rope == "second_rope"),
        "RoPE of the other kind of layer",
        applies=lambda c: {"rope", "second_rope"} <= {kind.rope for kind in c.kinds},
        port=_kinds(lambda c, kind: kind._replace(rope="rope" if kind.rope else "")),
    ),
    fault(
        "NoPE layers turned",
        _at("attn.scores", lambda kind: not kind.rope),
        "NoPE layer turned",
        applies=lambda c: {"", "rope"} <= {kind.rope for kind in c.kinds} and not c.qk_norm_last,
        port=_kinds(lambda c, kind: kind if kind.rope else kind._replace(rope="rope")),
    ),
    fault(
        "RoPE left out of all layers",
        _after_rope,
        "RoPE missing",
        applies=lambda c: first_turned(c) and not learned(c),
        port=_kinds(lambda c, kind: kind._replace(rope="")),
    ),
    fault(
        "all components turned",
        "rope.cos",
        "rotary share",
        applies=every(_any_share, lambda c: c.rope.share < 1),
        port=Port(misreads=lambda c: replace(c, rope=replace(c.rope, share=1.0))),
    ),
    fault(
        "half of the components turned",
        "rope.cos",
        "rotary share",
        applies=every(_any_share, lambda c: c.rotary_width(c.rope) % 4 == 0),
        port=Port(misreads=_share(0.5)),
    ),
    fault(
        "scaling of RoPE left out",
        _table,
        "RoPE scaling missing",
        applies=lambda c: _first_rope(c) is not None and _first_rope(c).type != "default",
        port=_first_as(
            lambda rope: RopeConfig(
                theta=rope.theta, share=rope.share, original_context=rope.original_context
            )
        ),
    ),
    fault(
        "factor of yarn or longrope on cos and sin left out",
        _table,
        "RoPE magnitude missing",
        applies=lambda c: _first_rope(c) is not None and _first_rope(c).magnitude != 1,
        port=_first_as(lambda rope: replace(rope, attention_factor=1.0)),
    ),
    fault(
        "longrope's factors of a short text for a long one",
        _table,
        "RoPE factors of the other length",
        applies=lambda c: _first_rope(c) is not None and bool(_first_rope(c).short_factor),
        port=_first_as(lambda rope: replace(rope, long_factor=rope.short_factor)),
        rows="long",
    ),
    fault(
        "longrope's factors of a long text for a short one",
        _table,
        "RoPE factors of the other length",
        applies=lambda c: _first_rope(c) is not None and bool(_first_rope(c).short_factor),
        with_config=lambda c: replace(c, rope=replace(c.rope, original_context=c.context_length)),
        port=_first_as(lambda rope: replace(rope, short_factor=rope.long_factor)),
    ),
    fault(
        "the last components turned",
        "layers.0.attn.q_rotated",
        "RoPE on the last components",
        applies=lambda c: c.kinds[0].rope == "rope" and c.rope.share < 1,
        port=Port(turned="last"),
    ),
)
