"""Replaying: each operation on observed inputs gives the models' own tensors, and verdicts."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, random_model

from pellucid import graph
from pellucid.diff.replay.operations import SOURCES, Setting, inputs, leaf
from pellucid.diff.replay.replay import Replay
from pellucid.diff.sides.side import from_model, pad_left

ROWS = {"one": [list(range(5, 16))], "padded": [[5, 6, 7, 8, 9], [11, 12, 13]]}


def _side(name, dtype, dialect="hf"):
    model = random_model(CONFIGS[name], dtype, dialect)
    setting = Setting(
        config=model.config, dialect=model.dialect, weights=model.state_dict().get, dtype=dtype
    )
    return from_model(model, name), setting


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dialect", ["hf", "meta", "notebook"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_its_operation_on_its_inputs(name, dialect, rows):
    """Bit for bit in bfloat16, in each dialect, with a cache and with padding."""
    side, setting = _side(name, torch.bfloat16, dialect)
    seen = side.observe(ROWS[rows], 2)
    replay = Replay(dict(seen), setting, pad_left(ROWS[rows])[1])
    for key in seen:
        if leaf(key) not in SOURCES:
            torch.testing.assert_close(replay.compute(key), seen[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_unobserved_tensors_follow_from_those_before(name):
    """From nothing but the tokens to the logits of the last step, in float64."""
    side, setting = _side(name, torch.float64)
    rows = ROWS["padded"]
    seen = side.observe(rows, 2)
    given = {key: seen[key] for key in seen if leaf(key) == "tokens"}
    replay = Replay(given, setting, pad_left(rows)[1])
    for key in ("layers.1.attn.pattern", "logits", "step.2.layers.0.attn.z", "step.2.logits"):
        mine = replay.real_tokens(key, replay.value(key))
        theirs = replay.real_tokens(key, seen[key])
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_name_tensors_that_come_before(name):
    order = list(graph.expand(CONFIGS[name]))
    for place, key in enumerate(order):
        for source in inputs(CONFIGS[name], key):
            assert order.index(source) < place, (key, source)


def test_an_input_that_cannot_be_had_is_named():
    _, setting = _side("llama-gqa", torch.float32)
    with pytest.raises(KeyError, match="tokens"):
        Replay({}, setting).compute("logits")


def test_what_padding_computes_is_nobodys():
    side, setting = _side("gpt2", torch.float32)
    rows = ROWS["padded"]
    seen = dict(side.observe(rows, 0))
    replay = Replay(seen, setting, pad_left(rows)[1])
    key = "layers.0.attn.z"
    plain = replay.compute(key)
    padding, real = plain.clone(), plain.clone()
    padding[1, :, :2] += 1  # the second row has two padding tokens
    real[1, :, 2] += 1
    assert replay.hold(key, plain.double(), plain, padding).verdict == "identical"
    assert replay.hold(key, plain.double(), plain, real).verdict == "diverged"


def test_another_shape_is_a_divergence_and_a_padded_vocabulary_is_none():
    side, setting = _side("llama-gqa", torch.float32)
    seen = dict(side.observe(ROWS["one"], 0))
    replay = Replay(seen, setting)
    logits = replay.compute("logits")
    longer = torch.cat((logits, logits[..., :3]), -1)
    assert replay.hold("logits", logits.double(), logits, longer).verdict == "identical"
    cut = logits[:, 1:]
    assert "shape" in replay.hold("logits", logits.double(), logits, cut).note
