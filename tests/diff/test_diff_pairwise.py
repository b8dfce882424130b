"""Two recordings without weights: rounding grows slowly, a fault jumps."""

from __future__ import annotations

import pytest
import torch
from tiny import LLAMA, random_model

from pellucid.diff import compare, from_trace
from pellucid.diff.sides.side import from_model
from pellucid.trace import Trace

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12]]


def _recorded(dtype=torch.float32, edit=None):
    seen = from_model(random_model(LLAMA, dtype), "m").observe(ROWS, 0)
    held = dict(seen)
    for name, change in (edit or {}).items():
        held[name] = change(held[name])
    return from_trace(Trace(held, seen.meta), str(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_healthy_recordings_agree(dtype):
    report = compare(_recorded(), _recorded(dtype))
    assert report.verdict in ("identical", "within-rounding") and not report.faults


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.attn.q_rotated", lambda x: x.flip(-1)),
        ("layers.1.mlp.act", lambda x: x * 1.01),
        ("logits", lambda x: x[:, 1:]),
        ("mask", lambda x: ~x),
    ],
)
def test_a_jump_is_the_first_divergence(name, change):
    report = compare(_recorded(), _recorded(edit={name: change}))
    assert report.first is not None and report.first.name == name
    assert "without weights" in report.note and report.exit_status == 1


def test_recordings_with_nothing_in_common_are_refused():
    whole = dict(_recorded().observe(ROWS, 0))
    a = from_trace(Trace({"tokens": whole["tokens"], "embed": whole["embed"]}), "A")
    b = from_trace(Trace({"tokens": whole["tokens"], "logits": whole["logits"]}), "B")
    with pytest.raises(ValueError, match="nothing was compared"):
        compare(a, b)
