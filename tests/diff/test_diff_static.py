"""What is told before anything runs: tokens, weights, constants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import GPT, LLAMA, random_model

from pellucid.diff.rounding import lies_anywhere, rounds_to
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


# ── A in 16 bits against the float32 numbers that it was rounded from ────────────────────────────


def _rounded_from(dtype, change=lambda weights: None, held=False, spread=1e-4):
    """A in `dtype`, or its numbers held in float32; B the originals, norms near 1, then changed."""
    random = torch.Generator().manual_seed(0)
    whole = {
        name: 1 + spread * torch.randn(x.shape, generator=random) if x.ndim == 1 else x
        for name, x in random_model(LLAMA, torch.float32).state_dict().items()
    }
    low = {name: x.to(dtype) for name, x in whole.items()}
    a = Side(
        label="A",
        dtype=torch.float32 if held else dtype,
        config=LLAMA,
        weights={name: x.float() for name, x in low.items()} if held else low,
    )
    change(whole)
    return a, replace(a, label="B", dtype=torch.float32, weights=whole)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("spread", [1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_model_is_its_original_rounded_norms_near_one_too(dtype, spread, held):
    a, b = _rounded_from(dtype, spread=spread, held=held)
    for sides in ((a, b), (b, a)):
        found = weight_findings(*sides)
        assert found and {finding.kind for finding in found} == {"explained"}, found


NORM = "layers.1.mlp_norm.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.update({NORM: torch.full_like(weights[NORM], 1.0005)}),
        lambda weights: weights[NORM].add_(0.01 * torch.rand_like(weights[NORM])),
    ],
)
def test_what_proves_most_of_a_model_does_not_excuse_a_changed_norm(change):
    found = weight_findings(*_rounded_from(torch.bfloat16, change))
    assert [f.name for f in found if f.kind == "fault"] == [NORM], found


def test_a_norm_with_noise_beside_exact_weights_is_no_original():
    """Nothing else was rounded: B is A's numbers, but for noise below their last place."""

    def change(weights):
        for name, x in weights.items():
            low = x.bfloat16().float()
            weights[name] = low * (1 + 1e-4 * torch.randn(x.shape)) if name == NORM else low

    torch.manual_seed(0)
    found = weight_findings(*_rounded_from(torch.bfloat16, change))
    assert [f.name for f in found if f.kind == "fault"] == [NORM], found


def test_a_model_trained_on_from_coarse_numbers_is_what_a_rounds():
    """Most values stay near a bfloat16 number; those that left go on to the edge and beyond it,
    where A has the next one. Noise on A's own numbers never gets there."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(192, 128, generator=random).bfloat16().float()
    for size in (2e-3, 4e-3):
        trained = base * (1 + size * torch.randn(base.shape, generator=random))
        assert rounds_to(trained, trained.bfloat16())
        assert lies_anywhere(trained, trained.bfloat16()), size
    even = 2 * torch.rand(base.shape, generator=random) - 1
    for moved in (base * 1.0019, base * (1 + 2.0**-9 * even), base * (1 + 5e-4 * even)):
        assert rounds_to(moved, base) and not lies_anywhere(moved, base.bfloat16())
