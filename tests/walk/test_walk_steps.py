"""What the walk shows: the order of its steps, formulas with true shapes, statistics, sources."""

from __future__ import annotations

import ast
import builtins
import json
import math
import re
import textwrap
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from tiny import CONFIGS, FEATURES, GPT, LLAMA, random_model, random_tokens

from pellucid import graph
from pellucid.models import RopeConfig
from pellucid.numerics import Dialect, dialect
from pellucid.walk import SCRIPT, Step, rope, walk
from pellucid.walk.steps import RUNNER_NAMES

COUNT = 7
STRINGS = list("abcdefg")
SCALED = RopeConfig(type="llama3", factor=8.0, original_context=16)


def walked(config, dtype=torch.float32, **more) -> list[Step]:
    more = {"token_strings": STRINGS, "specials": {"<s>": 1, "<pad>": 0}} | more
    weights = random_model(config, dtype).state_dict()
    tokens = random_tokens(config, COUNT)
    return list(walk(config, weights, tokens, dialect=dialect("hf", config.rounding), **more))


OPENING = ["specials", "tokens", "token_strings", "embed"]
CLOSING = ["final_norm", "logits[6]", "next_token"]
# The vocabulary with the layer left out; what stands on its own is of the whole model.
LLAMA_LAYER = """
    attn_norm attn.q_proj.weight attn.k_proj.weight attn.v_proj.weight attn.o_proj.weight
    attn.wq_heads attn.wq_head[H] attn.q[H] attn.q_pairs[H]
    rope.exponents rope.frequencies rope.angles rope.cis
    attn.q_complex[H] attn.q_turned[H] attn.q_turned_pairs[H] attn.q_rotated[H]
    attn.wk_heads attn.wk_head[K] attn.k[K] attn.k_pairs[K]
    attn.k_complex[K] attn.k_turned[K] attn.k_turned_pairs[K] attn.k_rotated[K]
    attn.scores[H] mask attn.masked_scores[H] attn.pattern[H]
    attn.wv_heads attn.wv_head[K] attn.v[K] attn.z[H]
    attn.z attn.z_side_by_side attn_out resid_mid mlp_norm
    mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight
    mlp.gate mlp.act mlp.up mlp.hidden mlp_out resid_post
"""
GPT_LAYER = """
    attn_norm.mean attn_norm.variance attn_norm.normalised attn_norm
    attn.q_proj.weight attn.k_proj.weight attn.v_proj.weight attn.o_proj.weight
    attn.wq_heads attn.wq_head[H] attn.q[H] attn.wk_heads attn.wk_head[H] attn.k[H]
    attn.scores[H] mask attn.masked_scores[H] attn.pattern[H]
    attn.wv_heads attn.wv_head[H] attn.v[H] attn.z[H]
    attn.z attn.z_side_by_side attn_out resid_mid mlp_norm
    mlp.up_proj.weight mlp.down_proj.weight mlp.pre mlp.inner mlp.act mlp_out resid_post
"""


def layer_steps(text: str, layer: int, head: int, kv_head: int) -> list[str]:
    own = text.replace("[H]", f"[{head}]").replace("[K]", f"[{kv_head}]").split()
    whole = ("rope.", "mask")
    return [name if name.startswith(whole) else f"layers.{layer}.{name}" for name in own]


def test_llama_in_the_order_of_the_design():
    addresses = [step.address for step in walked(LLAMA)]
    first = layer_steps(LLAMA_LAYER, 0, 0, 0)
    assert addresses == [*OPENING, *first, "layers.1.resid_post", *CLOSING]


def test_what_is_computed_once_is_shown_where_it_is_first_seen():
    addresses = [step.address for step in walked(LLAMA, layer=1, head=3)]
    second = layer_steps(LLAMA_LAYER, 1, 3, 1)
    assert addresses == [*OPENING, "layers.0.resid_post", *second, *CLOSING]


def test_gpt2_in_the_same_spirit():
    config = replace(GPT, n_layers=3)
    addresses = [step.address for step in walked(config, layer=1, head=2)]
    opening = [*OPENING, "pos_embed", "layers.0.resid_pre", "layers.0.resid_post"]
    own = layer_steps(GPT_LAYER, 1, 2, 2)
    assert addresses == [*opening, *own, "layers.2.resid_post", *CLOSING]


def test_everything_shows_each_thing_once():
    steps = walked(LLAMA, everything=True)
    addresses = [step.address for step in steps]
    assert len(set(addresses)) == len(addresses)
    expected = []
    for layer in range(2):
        for head in range(4):
            expected += [
                name
                for name in layer_steps(LLAMA_LAYER, layer, head, head // 2)
                if name not in expected
            ]
    assert set(addresses) == {*OPENING, *expected, *CLOSING}
    of_heads = [name for name in addresses if "attn.scores" in name]
    assert of_heads == [f"layers.{n}.attn.scores[{h}]" for n in range(2) for h in range(4)]


def test_scaled_frequencies_are_a_step_where_there_are_such():
    formulas = {step.name: step.formula for step in walked(replace(LLAMA, rope=SCALED))}
    assert formulas["rope.scaled_frequencies"] == "frequencies[5] as llama3, up to 8 × slower → [5]"
    assert formulas["rope.angles"] == "positions[7] ⊗ scaled_frequencies[5] → [7,5]"
    plain = {step.name: step.formula for step in walked(LLAMA)}
    assert "rope.scaled_frequencies" not in plain
    assert plain["rope.angles"] == "positions[7] ⊗ frequencies[5] → [7,5]"


def test_without_strings_the_steps_about_text_are_left_out():
    for config in (LLAMA, GPT):
        addresses = [step.address for step in walked(config, token_strings=None, specials=None)]
        assert addresses[:2] == ["tokens", "embed"]


@pytest.mark.parametrize(
    "config",
    [LLAMA, replace(LLAMA, tied=True, biases=("qkv", "o")), GPT, *FEATURES.values()],
)
def test_formulas_tell_the_true_shapes(config):
    weights = random_model(config).state_dict()
    named = {line.variable: line.name for line in SCRIPT.lines if line.title}
    steps = walked(config, layer=1, head=3)
    shapes: dict[str, tuple[int, ...]] = {}
    checked = 0
    for step in steps:
        left, _, right = step.formula.rpartition(" → ")
        if step.shape:
            assert right == str(list(step.shape)).replace(" ", ""), step.formula
        else:
            assert right == str(step.value.item())
        for name, shape in re.findall(r"(\w+)\[([\d,]+)\]", left):
            shape = tuple(map(int, shape.split(",")))
            if name in SCRIPT.weights:
                full = SCRIPT.weights["embedding" if config.tied and name == "unembed" else name]
                assert shape == tuple(weights[full.replace("N", "1")].shape), step.formula
            elif name in named and named[name] in shapes:
                assert shape == shapes[named[name]], step.formula
            checked += 1
        product = re.fullmatch(r"\w+\[([\d,]+)\] · \w+\[([\d,]+)\](ᵀ?)( .+)?", left)
        if product:
            a, b = (tuple(map(int, text.split(","))) for text in product.groups()[:2])
            rows, columns = b if product[3] else b[::-1]
            assert (a[-1], *a[:-1], rows) == (columns, *step.shape[:-1], step.shape[-1])
        for form in (step.name, step.name.replace("layers.1.", "layers.N.")):
            shapes[form] = step.shape
    assert checked > 40


def test_formulas_as_a_reader_sees_them():
    formulas = {step.address: step.formula for step in walked(LLAMA)}
    assert formulas["layers.0.attn.q[0]"] == "attn_norm[7,36] · wq_head[10,36]ᵀ → [7,10]"
    assert formulas["layers.0.attn.scores[0]"] == (
        "q_rotated[7,10] · k_rotated[7,10]ᵀ / √10 → [7,7]"
    )
    assert formulas["rope.frequencies"] == "1 / 10000^exponents[5] → [5]"
    assert formulas["layers.0.attn.z"] == "4 heads, key/value head = head // 2 → [4,7,10]"
    biased = {step.address: step.formula for step in walked(GPT)}
    assert biased["layers.0.attn.q[0]"] == "attn_norm[7,36] · wq_head[9,36]ᵀ + bq_head[9] → [7,9]"
    book = {step.address: step.formula for step in walked(replace(GPT, biases=("o", "mlp")))}
    assert book["layers.0.attn.q[0]"] == "attn_norm[7,36] · wq_head[9,36]ᵀ → [7,9]"
    erf = {step.address: step.formula for step in walked(replace(GPT, activation="gelu"))}
    assert erf["layers.0.mlp.act"] == "½ × pre[7,56] × (1 + erf(pre[7,56] / √2)) → [7,56]"


@pytest.mark.parametrize("config", [LLAMA, GPT, *FEATURES.values()])
def test_dims_stand_for_one_size_each(config):
    sizes = graph.sizes(config, batch=1, tokens=COUNT, seen=COUNT)
    sizes |= {"H·D": sizes["H"] * sizes["D"], "Hkv·D": sizes["Hkv"] * sizes["D"], "specials": 2}
    sizes["S+1"] = sizes["S"] + 1
    if config.rope is None and config.second_rope is not None:
        sizes["D/2"] = config.rotary_width(config.second_rope) // 2
    for step in walked(config, everything=True):
        expected = [sizes[dim] if dim in sizes else int(dim) for dim in step.dims]
        assert list(step.shape) == expected, step.address


@pytest.mark.parametrize("config", [LLAMA, GPT])
def test_every_argument_of_every_step_is_known(config):
    known = {*RUNNER_NAMES, *vars(config), *SCRIPT.weights}
    known |= {f"{weight}_{form}" for weight in SCRIPT.weights for form in ("stored", "head")}
    seen: set[str] = set()
    for line in SCRIPT.lines:
        for argument in line.arguments:
            assert argument in known or argument in seen, f"{line.variable}: {argument}"
        seen.add(line.variable)


def test_the_vocabulary_is_covered():
    """Each name of graph.py is a line; lines of other names say what their dims are."""
    written = {line.name.replace("layers.0.", "layers.N.") for line in SCRIPT.lines}
    # A second RoPE's steps are those of the first, under its own names.
    named = {row.name.replace("second_rope.", "rope.") for row in graph.ROWS}
    assert not named - written
    for line in SCRIPT.lines:
        if line.name and line.dims is None:
            graph.row(line.name.replace("N", "0"))


@pytest.mark.parametrize("config", [*CONFIGS.values(), *FEATURES.values()])
def test_a_value_has_one_step_in_every_kind_of_layer(config):
    for kind in set(config.kinds):
        there = [line.variable for line in SCRIPT.lines if line.when(config, kind)]
        assert len(set(there)) == len(there)


@pytest.mark.parametrize("config", [LLAMA, GPT])
def test_inputs_are_earlier_steps_or_weights(config):
    weights = random_model(config).state_dict()
    for asked in ({}, {"layer": 1, "head": 2}, {"everything": True}):
        seen: set[str] = set()
        for step in walked(config, **asked):
            assert set(step.inputs) <= seen | set(weights), step.address
            seen.add(step.address)
    inputs = {step.address: step.inputs for step in walked(LLAMA, head=3)}
    assert inputs["layers.0.attn.scores[3]"] == (
        "layers.0.attn.q_rotated[3]",
        "layers.0.attn.k_rotated[1]",
    )
    assert inputs["embed"] == ("embed.weight", "tokens")


def test_source_is_the_body_and_the_helpers_it_calls():
    sources = {step.name: step.source for step in walked(LLAMA)}
    product, _, helper = sources["layers.0.attn.q"].partition("\n\n")
    assert product == "return linear(attn_norm, wq_head, bq_head)"
    assert helper.startswith("def linear(x, weight, bias):") and helper.endswith("else None)")
    assert sources["layers.0.attn.q_proj.weight"] == 'weights["layers.0.attn.q_proj.weight"]'
    assert (
        sources["rope.angles"] == "return torch.outer(positions.to(frequencies.dtype), frequencies)"
    )
    body, _, helper = sources["layers.0.attn_norm"].partition("\n\n")
    assert body.startswith("return rms_norm(resid_pre,")
    assert helper.startswith("def rms_norm(x,") and "torch.rsqrt" in helper
    for source in sources.values():
        assert "@each" not in source and '"""' not in source.partition("\n\n")[0]


@pytest.mark.parametrize("config", [LLAMA, GPT, *FEATURES.values()])
def test_every_source_is_code_about_what_the_step_was_computed_from(config):
    """What is shown is reworded: no word may change in quotes, and each name must be known."""
    known = {*RUNNER_NAMES, *vars(config), *dir(builtins), "torch", "F", "math", "weights"}
    known |= {line.variable.removesuffix("_last") for line in SCRIPT.lines}
    known |= {f"{weight}{form}" for weight in SCRIPT.weights for form in ("", "_stored", "_head")}
    choices = {word for hint in get_type_hints(Dialect).values() for word in get_args(hint)}
    for step in walked(config, everything=True):
        if not step.source or step.source.startswith('weights["'):
            continue
        tree = ast.parse(f"def step():\n{textwrap.indent(step.source, '    ')}")
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert {node.id for node in names} <= known | own | set(vars(rope)), step.source
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("dialect."):
                assert ast.literal_eval(node.comparators[0]) in choices, step.source


def test_pictures():
    pictures = {step.name: step.picture for step in walked(LLAMA)}
    assert pictures["rope.cis"] == "rays"
    for leaf in ("scores", "masked_scores", "pattern"):
        assert pictures[f"layers.0.attn.{leaf}"] == "attention"
    assert pictures["layers.0.attn.q"] == pictures["embed"] == "heatmap"
    assert pictures["token_strings"] == "text" and pictures["rope.frequencies"] == "bars"
    assert pictures["layers.0.attn.q_proj.weight"] is None


def test_titles_say_which_head():
    titles = {step.address: step.title for step in walked(LLAMA, head=3)}
    assert "head 3" in titles["layers.0.attn.q[3]"]
    assert "head 1" in titles["layers.0.attn.k[1]"]
    assert "Layer 1" in titles["layers.1.resid_post"]
    assert all(titles.values())


def step_of(value) -> Step:
    return Step("x", "", "", value, (), "", None, ())


def test_statistics_against_numpy():
    value = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) + 3
    array = value.double().numpy()
    stats = step_of(value).stats()
    expected = {"min": array.min(), "max": array.max(), "mean": array.mean(), "std": array.std()}
    assert stats == pytest.approx(expected, rel=1e-12)
    wide = torch.randn(3, 1 << 20, generator=torch.Generator().manual_seed(0)).T  # in pieces
    stats = step_of(wide).stats()
    array = wide.double().numpy()
    expected = {"min": array.min(), "max": array.max(), "mean": array.mean(), "std": array.std()}
    assert stats == pytest.approx(expected, rel=1e-9)


def test_statistics_of_what_is_no_plain_number():
    assert step_of(torch.tensor([3 + 4j, 0])).stats() == {
        "min": 0,
        "max": 5,
        "mean": 2.5,
        "std": 2.5,
    }
    assert step_of(torch.tensor([True, False])).stats()["mean"] == 0.5
    assert step_of(torch.tensor([1, 2, 3])).stats()["max"] == 3
    assert step_of(torch.tensor(7)).stats() == {"min": 7, "max": 7, "mean": 7, "std": 0}
    closed = torch.tensor([[1.0, -math.inf], [2.0, torch.finfo(torch.float32).min]])
    assert step_of(closed).stats() == {"min": 1, "max": 2, "mean": 1.5, "std": 0.5}
    nothing = dict.fromkeys(("min", "max", "mean", "std"))
    assert step_of(["a", "b"]).stats() == nothing
    assert step_of(torch.full((2,), -math.inf)).stats() == nothing
    assert step_of(torch.empty(0, 3)).stats() == nothing
    assert math.isnan(step_of(torch.tensor([1.0, math.nan])).stats()["mean"])


def test_json_is_plain():
    for step in walked(LLAMA, torch.bfloat16):
        entry = json.loads(json.dumps(step.to_json(), allow_nan=False))
        assert {"name", "title", "formula", "shape", "dtype", "stats"} <= set(entry)
        assert entry["shape"] == list(np.shape(step.value))
    assert entry == {
        "name": "next_token",
        "address": "next_token",
        "title": "The token with the highest score",
        "formula": step.formula,
        "shape": [],
        "dtype": "int64",
        "stats": {"min": step.value, "max": step.value, "mean": step.value, "std": 0.0},
    }


@pytest.mark.parametrize(
    ("tokens", "more", "complaint"),
    [
        ([], {}, r"tokens of shape \(0,\)"),
        ([[1, 2]], {}, r"tokens of shape \(1, 2\)"),
        ([1, 97], {}, "from 0 to 96"),
        ([-1], {}, "from 0 to 96"),
        ([1.5], {}, "whole numbers"),
        ([1], {"layer": 2}, "layer 2: this model has layers 0 to 1"),
        ([1], {"head": -1}, "head -1: this model has heads 0 to 3"),
        ([1], {"token_strings": ["a", "b"]}, "2 token strings for 1 tokens"),
    ],
)
def test_what_cannot_be_walked(tokens, more, complaint):
    weights = random_model(LLAMA).state_dict()
    with pytest.raises(ValueError, match=complaint):
        walk(LLAMA, weights, tokens, dialect=dialect("hf", "llama"), **more)


def test_past_the_positions_of_a_gpt2():
    weights = random_model(GPT).state_dict()
    with pytest.raises(
        ValueError, match="65 tokens, but there are position embeddings for only 64"
    ):
        walk(GPT, weights, [1] * 65, dialect=dialect("hf", "gpt2"))
