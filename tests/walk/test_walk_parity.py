"""The walk and the models bear witness against each other: names, dtypes, dialects."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, FEATURES, GPT, LLAMA, random_model, random_tokens

import pellucid.walk
from pellucid import graph
from pellucid.models import RopeConfig
from pellucid.numerics import NAMES, dialect
from pellucid.trace import trace
from pellucid.walk import walk, witness

SCALED = {
    "linear": RopeConfig(theta=1000.0, type="linear", factor=4.0),
    "dynamic": RopeConfig(theta=1000.0, type="dynamic", factor=4.0, original_context=8),
    "dynamic, short prompt": RopeConfig(type="dynamic", factor=4.0, original_context=32),
    "llama3": RopeConfig(theta=1000.0, type="llama3", factor=8.0, original_context=32),
    "yarn": RopeConfig(theta=1000.0, type="yarn", factor=4.0, original_context=32),
    "yarn, all fields": RopeConfig(
        type="yarn", factor=4.0, original_context=32, mscale=0.7, mscale_all_dim=0.9, truncate=False
    ),
    "yarn, given factor": RopeConfig(
        type="yarn", factor=4.0, original_context=32, attention_factor=1.3
    ),
    "longrope, beyond": replace(FEATURES["longrope"].rope, original_context=8),
    "longrope, given factor": replace(FEATURES["longrope"].rope, attention_factor=1.3),
}
SHAPES = {
    **CONFIGS,
    "gpt2-qkv-bias-untied": replace(GPT, tied=False),
    "gpt2-no-bias-tied": replace(GPT, biases=("o", "mlp")),
    "gpt2-erf": replace(GPT, activation="gelu"),
    "llama-biases": replace(LLAMA, biases=("qkv", "o", "mlp")),
    **{f"llama-{name}": replace(LLAMA, rope=rope) for name, rope in SCALED.items()},
}


def both(config, dtype, dialect_name="hf", count=13):
    """What the traced model and the walk say, name by name."""
    model = random_model(config, dtype, dialect_name)
    tokens = random_tokens(config, count)
    with trace(model) as seen:
        model(tokens[None])
    said = witness(config, model.state_dict(), tokens, dialect(dialect_name, config.rounding))
    assert list(said) == list(graph.expand(config))
    assert set(said) == set(seen)
    for name in said:
        assert said[name].shape == seen[name].shape, name
        assert said[name].dtype == seen[name].dtype, name
    return said, seen


def error(said, seen):
    """Largest difference relative to the largest number; masked cells must agree exactly."""
    said, seen = said.double(), seen.double()
    closed = seen < -1e30
    assert torch.equal(said[closed], seen[closed])
    apart = (said - seen)[~closed].abs().max()
    return (apart / seen[~closed].abs().max().clamp(min=1e-9)).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_name_in_float64(shape):
    said, seen = both(SHAPES[shape], torch.float64)
    for name in said:
        assert error(said[name], seen[name]) <= 1e-12, name


@pytest.mark.parametrize("dialect_name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_name_in_float32(shape, dialect_name):
    said, seen = both(SHAPES[shape], torch.float32, dialect_name)
    for name in said:
        assert error(said[name], seen[name]) <= 1e-5, name


@pytest.mark.parametrize("dialect_name", NAMES)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_name_of_every_feature_in_float64(feature, dialect_name):
    said, seen = both(FEATURES[feature], torch.float64, dialect_name)
    for name in said:
        assert error(said[name], seen[name]) <= 1e-12, name


def reordered() -> bool:
    """Whether bfloat16 products add in tiles of rows (AMX): one head alone adds otherwise."""
    return torch.cpu._is_amx_tile_supported()


def whole_registers(config):
    """Sizes that fill vector registers: else a product takes its last columns by another path."""
    ropes = {}
    for name in ("rope", "second_rope"):
        rope = getattr(config, name)
        if rope and rope.share < 1:
            ropes[name] = replace(rope, share=0.5)
        if rope and rope.type == "longrope":  # of a head of 16: 8 pairs
            short, long = (1.0, 1.1, 1.2, 1.3) * 2, (1.0, 1.5, 2.0, 3.0) * 2
            ropes[name] = replace(rope, short_factor=short, long_factor=long)
    sizes = {"width": 64, "hidden_width": 96, "head_dim": 16}
    return replace(config, **sizes, **ropes)


@pytest.mark.parametrize("dialect_name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_name_in_bfloat16(shape, dialect_name):
    """Bit for bit, but for the notebook's models with RoPE, whose scores are float32 products:
    there a joint product of all heads may add in another order than the walk's, head by head."""
    config = whole_registers(SHAPES[shape])
    said, seen = both(config, torch.bfloat16, dialect_name)
    for name in said:
        if dialect(dialect_name, config.rounding).rope == "keep":
            assert error(said[name], seen[name]) <= 2**-6, name
        elif reordered():
            assert error(said[name], seen[name]) <= 2**-7, name
        else:
            assert torch.equal(said[name], seen[name]), name


@pytest.mark.parametrize("dialect_name", NAMES)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_name_of_every_feature_in_bfloat16(feature, dialect_name):
    """As above, over three layers; a LayerNorm of heads may round a tie the other way."""
    config = whole_registers(FEATURES[feature])
    said, seen = both(config, torch.bfloat16, dialect_name)
    tie = config.qk_norm in ("head", "each") and config.norm == "layer"
    for name in said:
        if dialect(dialect_name, config.rounding).rope == "keep":
            assert error(said[name], seen[name]) <= 2**-5, name
        elif tie or reordered():
            assert error(said[name], seen[name]) <= 2**-7, name
        else:
            assert torch.equal(said[name], seen[name]), name


@pytest.mark.parametrize("length", [1, 2, 40])
def test_other_lengths(length):
    for config in (LLAMA, GPT):
        said, seen = both(config, torch.float64, count=length)
        assert error(said["logits"], seen["logits"]) <= 1e-12


@pytest.mark.parametrize("shape", ["gpt2", "llama-gqa", "llama-mqa"])
@pytest.mark.parametrize("asked", [{"everything": True}, {"layer": 1, "head": 2}, {}])
def test_a_step_is_what_its_address_names_in_a_trace(shape, asked):
    config = SHAPES[shape]
    model = random_model(config)
    tokens = random_tokens(config, 9)
    with trace(model) as seen:
        model(tokens[None])
    steps = list(
        walk(config, model.state_dict(), tokens, dialect=dialect("hf", config.rounding), **asked)
    )
    vocabulary = set(graph.expand(config))
    compared = {step.name for step in steps if step.name in vocabulary}
    for step in steps:
        if step.name in vocabulary:
            theirs = seen[step.address]
            theirs = theirs[0] if graph.has_batch(step.name) and not step.index else theirs
            assert error(step.value, theirs) <= 1e-12, step.address
    assert steps[-1].value == seen["logits"][0, -1].argmax()
    # What stands in no step of its own: given to the walk, or another step's value.
    unshown = {"positions", "rope.cos", "rope.sin"} | {n for n in vocabulary if "resid_pre" in n}
    if "everything" in asked:
        assert vocabulary - compared <= unshown


def test_another_dtype_than_the_stored_one():
    """Weights are converted as they are read; the embedding and the head, piece by piece."""
    for config in (replace(LLAMA, vocab_size=9000), replace(GPT, vocab_size=9000)):
        model = random_model(config, torch.bfloat16)
        tokens = random_tokens(config, 9)
        said = witness(
            config, model.state_dict(), tokens, dialect("hf", config.rounding), torch.float64
        )
        with trace(model.double()) as seen:
            model(tokens[None])
        for name in said:
            assert said[name].dtype == seen[name].dtype, name
            assert error(said[name], seen[name]) <= 1e-12, name


def test_the_walk_shares_no_arithmetic_with_the_models():
    """From the models it takes what a config is, and nothing that computes."""
    allowed = {"Config", "Layer", "RopeConfig"}
    for path in Path(pellucid.walk.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pellucid."):
                if node.module.startswith("pellucid.models"):
                    assert node.module == "pellucid.models", path.name
                    assert {alias.name for alias in node.names} <= allowed, path.name
                else:
                    assert node.module.split(".")[1] in ("walk", "numerics", "notebook"), path.name
