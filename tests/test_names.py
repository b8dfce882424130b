"""The vocabulary against real traces: the table is right when a run produces exactly it."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, random_model, random_tokens

from pellucid import graph, names
from pellucid.models import Cache
from pellucid.trace import trace


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_trace_holds_exactly_the_names_of_the_table_in_its_order(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    with trace(model) as seen:
        model(random_tokens(config, 3, 7))
    assert list(seen) == list(graph.expand(config))


def bound_dims(seen) -> dict[str, int]:
    """One size for each letter of a trace; an error where a letter has two."""
    sizes: dict[str, int] = {}
    for name, tensor in seen.items():
        letters = graph.dims(name)
        assert tensor.ndim == len(letters), f"{name}: {tuple(tensor.shape)} for {letters}"
        for letter, size in zip(letters, tensor.shape, strict=True):
            assert sizes.setdefault(letter, size) == size, f"{name}: {letter} is {size} here"
    return sizes


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_letter_binds_to_one_size(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    with trace(model) as seen:
        model(random_tokens(config, 3, 7))
    sizes = bound_dims(seen)
    expected = graph.sizes(config, batch=3, tokens=7, seen=7)
    assert sizes == {letter: expected[letter] for letter in sizes}
    with_heads = {"B", "T", "S", "C", "H", "Hkv", "D", "F", "V"}
    assert set(sizes) == with_heads | ({"D/2"} if config.family == "llama" else set())


@pytest.mark.parametrize("kind", CONFIGS)
def test_letters_bind_with_a_cache_where_t_and_s_differ(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    cache = Cache(config.n_layers)
    tokens = random_tokens(config, 3, 9)
    model(tokens[:, :5], cache=cache)
    with trace(model) as seen:
        model(tokens[:, 5:], cache=cache)
    sizes = bound_dims(seen)
    assert (sizes["T"], sizes["S"]) == (4, 9)


def test_rows_are_unique_and_described():
    for config in CONFIGS.values():  # a name may have two rows, of which a model has one
        for kind in (None, *config.kinds):
            inside = kind is not None
            there = [r.leaf for r in graph.ROWS if r.layer == inside and r.when(config, kind)]
            assert len(set(there)) == len(there)
    for row in graph.ROWS:
        assert row.sentence.endswith("."), row.name


def test_names_of_decoding_steps():
    assert names.without_step("step.12.layers.3.attn.q") == "layers.3.attn.q"
    assert names.without_step("layers.3.attn.q") == "layers.3.attn.q"
    assert (names.step_of("step.12.logits"), names.step_of("logits")) == (12, 0)
    assert (names.layer_of("step.2.layers.31.mlp_out"), names.layer_of("embed")) == (31, None)
    assert graph.dims("step.2.layers.31.attn.scores") == ("B", "H", "T", "S")
    assert graph.row("layers.31.mlp.up").name == "layers.N.mlp.up"


def test_batch_axis():
    assert graph.has_batch("layers.0.attn.q")
    assert not graph.has_batch("mask")
    assert not graph.has_batch("rope.cos")
    assert graph.has_batch("something.else")  # foreign tensors: the field's convention


@pytest.mark.parametrize("name", ["layers.0.attn.query", "layers.x.attn.q", "attn.q", ""])
def test_unknown_names_are_refused_and_not_known(name):
    with pytest.raises(KeyError, match="names look like"):
        graph.row(name)
    assert not graph.known(name)


@pytest.mark.parametrize(
    ("address", "name", "index"),
    [
        ("logits", "logits", ()),
        ("mask[0,:3]", "mask", (0, slice(None, 3))),
        ("a.b[ -1 , 2:-1 , :: 2]", "a.b", (-1, slice(2, -1), slice(None, None, 2))),
        ("x[:]", "x", (slice(None),)),
    ],
)
def test_addresses(address, name, index):
    assert names.parse(address) == (name, index)


@pytest.mark.parametrize("address", ["x[1", "x[]", "x[1.5]", "x[1:2:3:4]", "x[1,]", "x[1]y"])
def test_broken_addresses_are_one_clear_error(address):
    with pytest.raises(ValueError, match="address"):
        names.parse(address)


def test_an_address_reads_what_python_indexing_reads():
    config = CONFIGS["llama-gqa"]
    model = random_model(config)
    with trace(model) as seen:
        model(random_tokens(config, 1, 7))
    scores = seen["layers.1.attn.scores"]
    assert scores.shape == (1, 4, 7, 7)
    assert torch.equal(seen["layers.1.attn.scores[2]"], scores[0, 2])
    assert torch.equal(seen["layers.1.attn.scores[-1,3,:2]"], scores[0, -1, 3, :2])
    assert seen["layers.1.attn.scores[1,6,5]"] == scores[0, 1, 6, 5]
    assert torch.equal(seen["mask[2]"], seen["mask"][2])  # has no batch axis to leave out
    for address, message in [
        ("layers.1.attn.scores[4]", r"no such part of a tensor of shape \(4, 7, 7\)"),
        ("layers.1.attn.scores[0,0,0,0]", "4 indices"),
        ("layers.1.attn.scores[::-1]", "no such part"),
    ]:
        with pytest.raises(IndexError, match=message):
            seen[address]


def test_the_batch_axis_stays_in_an_address_of_a_batch():
    config = CONFIGS["gpt2"]
    model = random_model(config)
    with trace(model, only="logits") as seen:
        model(random_tokens(config, 3, 5))
    assert torch.equal(seen["logits[2,-1]"], seen["logits"][2, -1])
