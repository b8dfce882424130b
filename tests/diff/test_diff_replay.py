"""Replaying: each operation on observed inputs gives the models' own tensors, and verdicts."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, FEATURES, in_turn, random_model

from pellucid import graph
from pellucid.diff.replay.operations import SOURCES, Setting, leaf
from pellucid.diff.replay.replay import Replay
from pellucid.diff.sides.side import from_model
from pellucid.graph import inputs
from pellucid.prompts import padded

EVERY = {**CONFIGS, **FEATURES}
DIALECTS = ("hf", "meta", "notebook")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ROWS = {"one": [list(range(5, 16))], "padded": [[5, 6, 7, 8, 9], [11, 12, 13]]}


def _side(name, dtype, dialect="hf"):
    model = random_model(EVERY[name], dtype, dialect)
    setting = Setting(
        config=model.config, dialect=model.dialect, weights=model.state_dict().get, dtype=dtype
    )
    return from_model(model, name), setting


def _hold_every_operation(side, setting, rows, steps=2):
    """Each named tensor of a traced run is its operation on the traced inputs, bit for bit.

    A pass without a cache has the same tensors as the first one with it.
    """
    seen = side.observe(ROWS[rows], steps)
    assert len(seen) == (steps + 1) * len(list(graph.expand(setting.config)))
    replay = Replay(dict(seen), setting, padded(ROWS[rows])[1])
    for key in seen:
        if leaf(key) not in SOURCES:
            _assert_same(replay.compute(key), seen[key], key)
    for key, value in side.observe(ROWS[rows], 0).items():
        _assert_same(value, seen[key], key)


def _assert_same(found, expected, key):
    assert found.dtype == expected.dtype, key
    if not torch.equal(found, expected):  # quicker to ask than what differs
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_its_operation_on_its_inputs(name, dialect, rows):
    """Bit for bit in bfloat16, in each dialect, with a cache and with padding."""
    _hold_every_operation(*_side(name, torch.bfloat16, dialect), rows)


@pytest.mark.parametrize(("name", "dtype", "dialect"), in_turn(FEATURES, DTYPES, DIALECTS))
def test_every_feature_is_an_operation_of_its_row(name, dtype, dialect):
    """Padded and not, with a cache and without, in each dtype and each dialect."""
    side, setting = _side(name, dtype, dialect)
    for rows in ROWS:
        _hold_every_operation(side, setting, rows)


@pytest.mark.parametrize("name", CONFIGS)
def test_unobserved_tensors_follow_from_those_before(name):
    """From nothing but the tokens to the logits of the last step, in float64."""
    side, setting = _side(name, torch.float64)
    rows = ROWS["padded"]
    seen = side.observe(rows, 2)
    given = {key: seen[key] for key in seen if leaf(key) == "tokens"}
    replay = Replay(given, setting, padded(rows)[1])
    for key in ("layers.1.attn.pattern", "logits", "step.2.layers.0.attn.z", "step.2.logits"):
        mine = replay.real_tokens(key, replay.value(key))
        theirs = replay.real_tokens(key, seen[key])
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", EVERY)
def test_inputs_name_tensors_that_come_before(name):
    order = list(graph.expand(EVERY[name]))
    for place, key in enumerate(order):
        for source in inputs(EVERY[name], key):
            assert order.index(source) < place, (key, source)


@pytest.mark.parametrize("name", EVERY)
def test_the_weights_that_are_read_are_those_the_operations_ask_for(name):
    """`module_of` against what each operation really looks up, and every parameter is read."""
    config = EVERY[name]
    model = random_model(config, torch.float64)
    parameters, asked = model.state_dict(), set()

    def weights(wanted):
        asked.add(wanted)
        return parameters.get(wanted)

    setting = Setting(config=config, dialect=model.dialect, weights=weights, dtype=torch.float64)
    seen = from_model(model, name).observe([[5, 6, 7]], 0)
    replay, read = Replay(dict(seen), setting), set()
    for key in seen:
        asked.clear()
        if leaf(key) in SOURCES:
            continue
        replay.compute(key)
        module = graph.module_of(config, key)
        found = {each for each in asked if each in parameters and not each.endswith("sinks")}
        assert {each.rpartition(".")[0] for each in found} == ({module} if found else set()), key
        owned = [each for each in parameters if each.rpartition(".")[0] == module]
        assert found == set(owned) if module else not found, key
        read |= asked & set(parameters)
    assert read == set(parameters) - ({"unembed.weight"} if config.tied else set())


def test_a_wrong_mask_of_windows_says_who_sees_whom():
    side, setting = _side("window", torch.float32)
    for rows in ROWS:
        seen = dict(side.observe(ROWS[rows], 1))
        replay = Replay(seen, setting, padded(ROWS[rows])[1])
        key = "step.1.window_mask"
        right = replay.compute(key)
        assert replay.hold(key, right, right, seen[key]).verdict == "identical"
        wrong = seen[key].clone()
        wrong[..., -1, 0] = True  # 6 or more tokens back, the window is 5
        found = replay.hold(key, right, right, wrong)
        assert found.verdict == "diverged" and found.note == "token 0 may look at token 0"


def test_an_input_that_cannot_be_had_is_named():
    _, setting = _side("llama-gqa", torch.float32)
    with pytest.raises(KeyError, match="tokens"):
        Replay({}, setting).compute("logits")


def test_what_padding_computes_is_ignored():
    side, setting = _side("gpt2", torch.float32)
    rows = ROWS["padded"]
    seen = dict(side.observe(rows, 0))
    replay = Replay(seen, setting, padded(rows)[1])
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
