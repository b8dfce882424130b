"""What is right although it differs, and what is wrong although it is small."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens

from pellucid.diff import compare, from_model
from pellucid.diff.selftest.damage import all_int8
from pellucid.models import build

ROWS = [random_tokens(LLAMA, 24).tolist()]
PADDED = [ROWS[0], ROWS[0][:11], ROWS[0][3:9]]


def _side(config=LLAMA, dtype=torch.float32, **options):
    return from_model(random_model(config, dtype), str(dtype), **options)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rows", [ROWS, PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_against_float32_is_explained(name, rows, steps):
    report = compare(_side(CONFIGS[name]), _side(CONFIGS[name], torch.bfloat16), rows, steps=steps)
    assert report.verdict == "explained" and report.exit_status == 0
    assert not report.faults


def test_float16_and_another_dialect_are_explained():
    for other in (
        _side(dtype=torch.float16),
        from_model(random_model(LLAMA, torch.bfloat16, "notebook"), "notebook"),
    ):
        report = compare(_side(), other, ROWS)
        assert report.verdict == "explained", report.summary()


def _changed(change, config=LLAMA, shown=True):
    model = random_model(config, torch.float32)
    weights = dict(model.state_dict())
    change(weights, config)
    other = build(config)
    other.load_state_dict(weights, assign=True)
    side = from_model(other.eval(), "B")
    return side if shown else replace(side, weights=None, config=None, dialect=None)


def test_quantised_weights_are_explained_where_they_can_be_seen():
    report = compare(_side(), _changed(all_int8), ROWS)
    assert report.verdict == "explained"
    assert {finding.cause for finding in report.static} == {"quantised weights"}
    blind = compare(_side(), _changed(all_int8, shown=False), ROWS)
    assert blind.verdict == "diverged"  # nobody said so


def test_a_fault_beside_quantised_weights_is_still_found():
    def change(weights, config):
        all_int8(weights, config)
        weights["layers.1.mlp_norm.weight"] = weights["layers.1.mlp_norm.weight"] + 1

    report = compare(_side(), _changed(change), ROWS)
    assert [fault.name for fault in report.faults] == ["layers.1.mlp_norm"]


def _edited(edit, config=LLAMA, rows=ROWS, steps=0):
    """B's recording with some tensors changed and everything after them left as it was."""
    inner = _side(config)

    def run(rows, steps):
        seen = inner.observe(rows, steps)
        for name, change in edit.items():
            seen[name] = change(seen[name])
        return seen

    blind = replace(inner, run=run, weights=None, config=None, dialect=None)
    return compare(_side(config), blind, rows, steps=steps)


def test_a_uniform_shift_of_positions_is_right_under_rope_and_wrong_without():
    shift = {name: lambda x: x + 5 for name in ("positions", "step.1.positions")}
    llama = _edited(shift, steps=1)
    assert not any(fault.name.endswith("positions") for fault in llama.faults)
    gpt2 = _edited(shift, GPT, steps=1)
    assert gpt2.first is not None and gpt2.first.name == "positions"


def test_a_shift_that_begins_later_is_wrong():
    report = _edited({"step.1.positions": lambda x: x + 1}, steps=1)
    assert report.first is not None and report.first.name == "step.1.positions"
    assert report.cause is not None and report.cause.name == "cache position off by one"


def test_a_mask_says_who_looks_at_whom():
    def opened(mask):
        mask = mask.clone()
        mask[3, 7] = True
        return mask

    report = _edited({"mask": opened})
    assert report.first is not None and report.first.name == "mask"
    assert report.first.measure.note == "token 3 may look at token 7"


def test_other_tokens_than_asked_for():
    report = _edited({"tokens": lambda x: x.flip(-1)})
    assert report.first is not None and report.first.name == "tokens"


def test_what_is_not_observed_is_listed():
    inner = _side()

    def run(rows, steps):
        seen = inner.observe(rows, steps)
        for name in [name for name in seen if "attn." in name]:
            del seen[name]
        return seen

    report = compare(_side(), replace(inner, run=run), ROWS)
    assert report.verdict == "identical"
    assert "layers.1.attn.pattern" in report.not_observed
