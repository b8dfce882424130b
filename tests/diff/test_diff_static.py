"""What is told before anything runs: tokens, weights, constants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import GPT, LLAMA, random_model

from pellucid.diff.sides.side import Side, from_model
from pellucid.diff.static import (
    constant_findings,
    shape_mismatch,
    token_findings,
    weight_findings,
)
from pellucid.models import Layer, RopeConfig


def _tokenizer(**fields):
    return Side(label="side", dtype=torch.float32, bos_id=1, **fields)


@pytest.mark.parametrize(
    ("ids_b", "cause"),
    [
        ([1, 5, 6, 7], None),
        ([5, 6, 7], "BOS missing"),
        ([1, 1, 5, 6, 7], "BOS doubled"),
        ([1, 5, 67], "other splitting of the text"),
        ([1, 5, 6], "other splitting of the text"),
        ([1, 5, 6, 8], "other splitting of the text"),
    ],
)
def test_tokens(ids_b, cause):
    found = token_findings([1, 5, 6, 7], ids_b, _tokenizer(), _tokenizer())
    assert [finding.cause for finding in found] == ([cause] if cause else [])


def test_tokens_that_differ_only_in_special_ones():
    a = _tokenizer(specials={"<s>": 1, "<end>": 90})
    b = _tokenizer(specials={"<s>": 1, "<end>": 91})
    (found,) = token_findings([1, 5, 90, 7], [1, 5, 91, 7], a, b)
    assert found.cause == "other special-token table" and "token 2" in found.finding


def _sides(config, change):
    model = random_model(config, torch.float32)
    a = from_model(model, "A")
    weights = dict(model.state_dict())
    change(weights)
    return a, replace(a, label="B", weights=weights)


def test_equal_weights_say_nothing():
    assert not list(weight_findings(*_sides(LLAMA, lambda weights: None)))


@pytest.mark.parametrize(
    ("config", "gone", "cause"),
    [
        (GPT, "layers.0.attn.q_proj.bias", "missing bias"),
        (LLAMA, "layers.0.mlp_norm.weight", "missing tensor"),
        (LLAMA, "unembed.weight", "head tied"),
    ],
)
def test_a_tensor_that_is_not_there(config, gone, cause):
    (found,) = weight_findings(*_sides(config, lambda weights: weights.pop(gone)))
    assert (found.name, found.cause, found.kind) == (gone, cause, "fault")


def test_a_bias_of_zeros_and_a_head_stored_twice_are_the_same_model():
    def change(weights):
        weights["layers.0.attn.q_proj.bias"] = torch.zeros(40)

    assert not list(weight_findings(*_sides(LLAMA, change)))

    def twice(weights):
        weights["unembed.weight"] = weights["embed.weight"].clone()

    assert not list(weight_findings(*_sides(GPT, twice)))


def test_a_head_of_its_own_where_it_should_be_tied():
    def untied(weights):
        weights["unembed.weight"] = weights["embed.weight"] + 1

    (found,) = weight_findings(*_sides(GPT, untied))
    assert found.cause == "head untied"


LONG = replace(LLAMA, rope=RopeConfig(type="llama3", factor=8.0, original_context=32))


@pytest.mark.parametrize(
    ("config", "other", "cause"),
    [
        (LLAMA, replace(LLAMA, norm_eps=1e-6), "norm eps"),
        (LLAMA, replace(LLAMA, rope=RopeConfig(theta=5e5)), "RoPE theta"),
        (LONG, LLAMA, "RoPE scaling missing"),
        (LONG, replace(LONG, rope=replace(LONG.rope, factor=32.0)), "RoPE scaling factor"),
        (GPT, replace(GPT, activation="gelu"), "GELU form"),
        (LLAMA, replace(LLAMA, activation="gelu"), "activation"),
        (GPT, replace(GPT, context_length=128, attn_dropout=0.1), None),
        (LLAMA, replace(LLAMA, family="mistral"), None),
    ],
)
def test_constants(config, other, cause):
    a = Side(label="A", dtype=torch.float32, config=config)
    found = list(constant_findings(a, replace(a, config=other)))
    assert (found[0].cause if found else None) == cause


@pytest.mark.parametrize(("seen", "kind"), [(11, "explained"), (12, "explained"), (13, "fault")])
def test_a_window_as_wide_as_the_text_is_no_fault_of_its_run(seen, kind):
    a = Side(label="A", dtype=torch.float32, config=LLAMA)
    windowed = replace(LLAMA, window=12, layers=(Layer(window=True), Layer()))
    found = list(constant_findings(a, replace(a, config=windowed), seen))
    assert {finding.name for finding in found} == {"window", "layers"}
    assert {finding.kind for finding in found} == {kind}
    assert {f.kind for f in constant_findings(a, replace(a, config=windowed))} == {"fault"}
    unturned = replace(windowed, layers=(Layer(window=True), Layer(rope="")))
    assert {f.kind for f in constant_findings(a, replace(a, config=unturned), 5)} == {"fault"}


def test_models_of_different_shape_are_no_pair():
    a = Side(label="A", dtype=torch.float32, config=LLAMA)
    wider = replace(a, label="B", config=replace(LLAMA, hidden_width=60))
    assert shape_mismatch(a, a) is None
    message = shape_mismatch(a, wider)
    assert message is not None and "56" in message and "60" in message
