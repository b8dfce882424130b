"""Mistakes that any operation can have: dropout left on, a range too small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pellucid.diff.causes.hypothesis import Hypothesis, in_setting
from pellucid.diff.replay.operations import leaf
from pellucid.diff.replay.replay import Replay
from pellucid.graph import inputs

_DROPPED = ("embed", "resid_pre", "attn.pattern", "attn_out", "resid_mid", "mlp_out", "resid_post")


def dropped(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    """Some values zero (or, of a sum, the addition), the others scaled up alike."""
    if leaf(name) not in _DROPPED or not bool(observed.isfinite().all()):
        return  # dropping values makes none infinite

    def compute(replay: Replay, name: str) -> Tensor:
        right = replay.compute(name)
        base = torch.zeros_like(right)
        if leaf(name) in ("resid_mid", "resid_post"):
            base = replay.value(inputs(replay.setting.config, name)[0]).to(right.dtype)
        added, seen = right - base, observed.to(right.dtype) - base
        size = added.abs().median()
        gone, kept = (seen == 0) & (added != 0), (seen != 0) & (added.abs() > size)
        if not gone.any() or not kept.any():
            return right
        scale = (seen[kept] / added[kept]).double().median()
        return base + torch.where(gone, 0.0, added * scale.to(right.dtype))

    yield Hypothesis("dropout left on", "some values dropped, the others scaled up", compute)


def overflowed(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    """A result, or a number on the way to it, beyond what float16 or the run's dtype holds."""
    if not observed.is_floating_point() or observed.isfinite().all():
        return

    def halved(replay: Replay, name: str) -> Tensor:
        right = replay.compute(name)
        return right.half().to(right.dtype)

    yield Hypothesis("float16 overflow", "the result through float16", halved)
    own = observed.dtype
    cause = "float16 overflow" if own == torch.float16 else "overflow"
    inside = in_setting(lambda s: replace(s, dtype=own))
    yield Hypothesis(cause, f"computed in {str(own).removeprefix('torch.')}", inside)
