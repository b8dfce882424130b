"""The dialects: their table of cast points, and each cast point seen in a real run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import GPT, LLAMA, random_model, random_tokens

from pellucid.numerics import NAMES, dialect
from pellucid.trace import trace


def test_the_table():
    def points(name, family):
        d = dialect(name, family)
        return d.norm, d.rope, d.scale, d.softmax, d.logits

    assert points("meta", "llama") == ("float32", "float32", "divide", "float32", "float32")
    assert points("hf", "llama") == ("float32", "x", "multiply", "float32", "x")
    assert points("notebook", "llama") == ("x", "keep", "divide", "float32", "x")
    assert points("hf", "gpt2")[2:] == ("multiply", "x", "x")


def test_a_dialect_is_frozen_and_named():
    for name in NAMES:
        for family in ("llama", "gpt2"):
            assert dialect(name, family).name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        dialect("hf", "llama").norm = "x"


def test_an_unknown_dialect_names_the_known_ones():
    with pytest.raises(ValueError, match="'hugging'.*meta, hf, notebook"):
        dialect("hugging", "llama")


def traced(config, name):
    model = random_model(config, torch.bfloat16, name)
    with trace(model) as seen:
        model(random_tokens(config, 1, 6))
    return seen


def float32_names(seen) -> set[str]:
    leaves = {name.removeprefix("layers.0.") for name in seen if "layers.1." not in name}
    return {
        leaf
        for leaf in leaves
        if seen[leaf if leaf in seen else f"layers.0.{leaf}"].dtype == torch.float32
    }


@pytest.mark.parametrize(
    ("config", "name", "wide"),
    [
        (LLAMA, "hf", set()),
        (LLAMA, "meta", {"rope.cos", "rope.sin", "logits"}),
        (
            LLAMA,
            "notebook",
            {"rope.cos", "rope.sin", "attn.q_rotated", "attn.k_rotated"}
            | {"attn.scores", "attn.masked_scores"},
        ),
        (GPT, "hf", set()),
        (GPT, "meta", {"logits"}),
        (GPT, "notebook", set()),
    ],
)
def test_which_tensors_of_a_bfloat16_run_are_float32(config, name, wide):
    assert float32_names(traced(config, name)) == wide


@pytest.mark.parametrize(("name", "low"), [("meta", -torch.inf), ("notebook", -torch.inf)])
def test_the_future_is_masked_with_infinity(name, low):
    seen = traced(LLAMA, name)
    masked = seen["layers.0.attn.masked_scores"]
    assert (masked[..., ~seen["mask"]] == low).all()


def test_transformers_masks_with_the_lowest_number():
    seen = traced(LLAMA, "hf")
    masked = seen["layers.0.attn.masked_scores"]
    assert (masked[..., ~seen["mask"]] == torch.finfo(torch.bfloat16).min).all()


@pytest.mark.parametrize("config", [LLAMA, GPT])
def test_dialects_agree_in_float64(config):
    tokens = random_tokens(config, 2, 8)
    logits = {name: random_model(config, torch.float64, name)(tokens).detach() for name in NAMES}
    for name in ("meta", "notebook"):
        torch.testing.assert_close(logits[name], logits["hf"], rtol=0, atol=1e-12)


def test_the_dialects_of_llama_differ_in_bfloat16():
    runs = [traced(LLAMA, name)["layers.1.resid_post"] for name in NAMES]
    assert not torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[1], runs[2])
    assert not torch.equal(runs[0], runs[2])


def test_dividing_the_scores_rounds_otherwise_than_multiplying():
    model, other = (random_model(GPT, torch.float32, name) for name in ("hf", "notebook"))
    tokens = random_tokens(GPT, 1, 12)
    with trace(model) as multiplied:
        model(tokens)
    with trace(other) as divided:
        other(tokens)
    scores = "layers.0.attn.scores"
    assert torch.equal(multiplied["layers.0.attn.q"], divided["layers.0.attn.q"])
    assert not torch.equal(multiplied[scores], divided[scores])
    torch.testing.assert_close(multiplied[scores], divided[scores])
