"""Name maps: foreign recordings come out under our names and in our axes, value for value."""

from __future__ import annotations

import pytest
import torch
from peers import CONFIGS, rows
from tiny import random_model

from pellucid import graph, names
from pellucid.diff import from_model
from pellucid.diff.sides.layouts import lay_out, parse_layout
from pellucid.diff.sides.maps import guess_map, load_map, read_map, section_of
from pellucid.diff.sides.propose import as_yaml, propose_map
from pellucid.models.rope import interleaved
from pellucid.trace import Trace

LLAMA, GPT2 = CONFIGS["gqa"], CONFIGS["gpt2"]


def recorded(config, steps=0):
    return from_model(random_model(config, torch.float32), "ours").observe(rows(config, 7), steps)


def flat(x):
    """(B, heads, T, D) -> (B, T, heads · D)."""
    return x.transpose(1, 2).flatten(2)


def under(seen, table):
    """A recording as an engine with other names would have written it: ours -> (name, change)."""
    out = {}
    for name, tensor in seen.items():
        step, plain = names.step_of(name), names.without_step(name)
        layer, leaf = names.layer_of(name), graph.row(name).leaf
        if leaf in table:
            foreign, change = table[leaf]
            foreign = foreign.format(N=layer) if layer is not None else foreign
            out[f"step.{step}.{foreign}" if step else foreign] = change(tensor)
        assert plain
    return Trace(out)


def same(x):
    return x


META = {
    "tokens": ("tokens", same),
    "embed": ("tok_embeddings", same),
    "attn_norm": ("layers.{N}.attention_norm", same),
    "attn.q": ("layers.{N}.attention.wq", lambda x: flat(interleaved(x))),
    "attn.k": ("layers.{N}.attention.wk", lambda x: flat(interleaved(x))),
    "attn.v": ("layers.{N}.attention.wv", flat),
    "attn.z": ("layers.{N}.attention.wo.input", flat),
    "attn_out": ("layers.{N}.attention", same),
    "mlp.gate": ("layers.{N}.feed_forward.w1", same),
    "mlp.up": ("layers.{N}.feed_forward.w3", same),
    "resid_post": ("layers.{N}", same),
    "logits": ("output", same),
}
LENS = {
    "embed": ("hook_embed", same),
    "pos_embed": ("hook_pos_embed", lambda x: x[None]),
    "resid_mid": ("blocks.{N}.hook_resid_mid", same),
    "attn.q": ("blocks.{N}.attn.hook_q", lambda x: x.transpose(1, 2)),
    "attn.pattern": ("blocks.{N}.attn.hook_pattern", same),
    "mlp.pre": ("blocks.{N}.mlp.hook_pre", same),
    "mlp.act": ("blocks.{N}.mlp.hook_post", same),
}
GGUF = {
    "tokens": ("inp_tokens", lambda x: x[0].int()),
    "embed": ("inp_embd", lambda x: x[0]),
    "attn.q_rotated": ("Qcur-{N}", lambda x: interleaved(x)[0].transpose(0, 1)),
    "attn.k_rotated": ("Kcur-{N}", lambda x: interleaved(x)[0].transpose(0, 1)),
    "attn.v": ("Vcur-{N}", lambda x: x[0].transpose(0, 1)),
    "attn.pattern": ("kq_soft_max-{N}", lambda x: x[0]),
    "resid_post": ("l_out-{N}", lambda x: x[0]),
    "logits": ("result_output", lambda x: x[0]),
}
TRANSFORMERS = {
    "rope.cos": ("model.rotary_emb.cos", lambda x: torch.cat((x, x), -1)[None]),
    "attn.q": ("model.layers.{N}.self_attn.q_proj", flat),
    "attn.k": ("model.layers.{N}.self_attn.k_proj", flat),
    "mlp.hidden": ("model.layers.{N}.mlp.down_proj.input", same),
    "final_norm": ("model.norm", same),
}
SPOKEN = {"llama": LLAMA, "gpt2": GPT2}
CASES = {
    "meta": (LLAMA, META),
    "transformerlens": (GPT2, LENS),
    "gguf": (LLAMA, GGUF),
    "transformers": (LLAMA, TRANSFORMERS),
}


@pytest.mark.parametrize("given", ["by name", "found out"])
@pytest.mark.parametrize("kind", CASES)
def test_a_shipped_map_brings_everything_home(kind, given):
    config, table = CASES[kind]
    seen = recorded(config, steps=1)
    foreign = under(seen, table)
    chosen = load_map(kind, section_of(config)) if given == "by name" else guess_map(foreign)
    assert chosen is not None and chosen.label == kind
    home = chosen.apply(foreign, config)
    assert set(home) == {name for name in seen if graph.row(name).leaf in table}
    assert list(home) == [name for name in seen if name in home], "in the order of the pass"
    for name, tensor in home.items():
        assert torch.equal(tensor, seen[name]), name
        assert tensor.dtype == seen[name].dtype, name
    assert home.meta["unmapped"] == []


def test_joined_queries_keys_and_values_are_taken_apart():
    for kind, config in (("litgpt", LLAMA), ("transformers", GPT2)):
        seen = recorded(config)
        leaf = "qkv" if kind == "litgpt" else "c_attn"
        parts = [flat(seen[f"layers.1.attn.{letter}"]) for letter in "qkv"]
        foreign = Trace({f"transformer.h.1.attn.{leaf}": torch.cat(parts, dim=-1)})
        home = load_map(kind, section_of(config)).apply(foreign, config)
        for letter in "qkv":
            assert torch.equal(home[f"layers.1.attn.{letter}"], seen[f"layers.1.attn.{letter}"])


def test_every_shipped_map_speaks_of_names_that_exist():
    for kind in ("transformers", "meta", "transformerlens", "gguf", "litgpt"):
        for family in ("llama", "gpt2"):
            for targets in load_map(kind, family).entries.values():
                for target in targets:
                    leaf = graph.leaf(target.name.replace("{N}", "0"))
                    assert graph.has(SPOKEN[family], leaf) or kind in ("meta", "litgpt"), target


def test_sizes_come_from_other_tensors_or_from_the_map():
    seen = recorded(LLAMA)
    text = "'q{N}': layers.{N}.attn.q (B T H*D)\n'p{N}': layers.{N}.attn.pattern\n"
    foreign = Trace({"q0": flat(seen["layers.0.attn.q"]), "p0": seen["layers.0.attn.pattern"]})
    home = read_map(text, "mine").apply(foreign)
    assert torch.equal(home["layers.0.attn.q"], seen["layers.0.attn.q"])
    alone = Trace({"q0": foreign["q0"]})
    with pytest.raises(ValueError, match="nothing says how large H and D are"):
        read_map(text, "mine").apply(alone)
    home = read_map(text + "sizes: {H: 4}\n", "mine").apply(alone)
    assert torch.equal(home["layers.0.attn.q"], seen["layers.0.attn.q"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected lines such as"),
        ("- a\n- b\n", "expected lines such as"),
        ("a: [", "is not YAML"),
        ("a.{N}: layers.{N}.attn.qq", "no tensor is called 'layers.{N}.attn.qq'; did you mean"),
        ("a.{N}: logits", "must stand on both sides or none"),
        ("a: logits (B T X)", "'X' is none of B T S"),
        ("a: logits (B T C)", "axes 'B T C', but logits has B T V"),
        ("a: embed (B T C, turned)", "'turned' is no hint"),
        ("sizes: {H: many}", "sizes"),
    ],
)
def test_a_map_that_is_none_is_one_line(text, message):
    with pytest.raises(ValueError) as error:
        read_map(text, "mine.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_such_map():
    with pytest.raises(ValueError, match="no name map 'tensorflow': expected gguf, litgpt, meta"):
        load_map("tensorflow")


def test_a_tensor_of_another_layout_is_named():
    foreign = Trace({"blocks.0.attn.hook_q": torch.zeros(1, 7, 3, 16)})
    with pytest.raises(ValueError, match=r"blocks.0.attn.hook_q: H of 'B T H D' is 3, expected 4"):
        load_map("transformerlens").apply(foreign, LLAMA)


def test_layouts():
    x = torch.arange(24.0).view(2, 3, 4)
    sizes = {"H": 2, "D": 2}
    assert torch.equal(lay_out(x, parse_layout("B T C"), ("B", "T", "C"), {}), x)
    heads = lay_out(x, parse_layout("B T H*D"), ("B", "H", "T", "D"), sizes)
    assert torch.equal(heads, x.view(2, 3, 2, 2).transpose(1, 2))
    twice = torch.stack((x, x), dim=-2)
    assert torch.equal(lay_out(twice, parse_layout("B T 2 C"), ("B", "T", "C"), {}), x)
    with pytest.raises(ValueError, match="holds no repetition"):
        lay_out(x, parse_layout("B T 2*D/2"), ("T", "D/2"), {})
    with pytest.raises(ValueError, match="has not the 2 axes"):
        lay_out(x, parse_layout("T C"), ("B", "T", "C"), {})


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_map_is_proposed_for_an_engine_nobody_knows(config):
    """Names that say nothing, other axes, values off by a per cent: by value, in the right axes."""
    ours = recorded(config)
    torch.manual_seed(0)
    foreign = {}
    for name, tensor in ours.items():
        if not tensor.is_floating_point() or name.endswith("scores"):
            continue
        x = flat(tensor)[0] if "attn.q" in name or "attn.k" in name else tensor
        foreign[f"engine/{names.layer_of(name)}/{name.split('.')[-1]}_out"] = x * (
            1 + torch.randn_like(x) / 200
        )
    del foreign[next(name for name in foreign if name.endswith("resid_pre_out"))]
    proposed = propose_map(foreign, ours)
    text = as_yaml(proposed)
    home = read_map(text, "proposed").apply(Trace(foreign), config)
    twins = {"embed", "layers.0.resid_pre", "layers.0.resid_post", "layers.1.resid_pre"}
    for name in home:
        error = (home[name] - ours[name]).norm() / ours[name].norm()
        assert error < 0.05, f"{name} in\n{text}"
    assert {n for n in ours if ours[n].is_floating_point() and "scores" not in n} - set(
        home
    ) <= twins
    assert all(row.confidence > 0.9 for row in proposed)
    assert "engine/{N}/z_out: layers.{N}.attn.z  # 99%" in text or "z_out" in text


def test_what_no_value_speaks_for_is_placed_by_order_and_shape():
    ours = recorded(LLAMA)
    foreign = {
        "a": ours["layers.0.attn.q"],
        "b": torch.randn_like(ours["layers.0.attn.v"][0]),  # wrong values: an engine with a fault
        "c": ours["layers.0.attn.scores"],
    }
    del ours["layers.0.attn.k"], ours["layers.0.attn.k_rotated"]
    del ours["layers.0.attn.q_rotated"]
    found = {row.foreign: row for row in propose_map(foreign, ours)}
    assert found["b"].ours == "layers.0.attn.v"
    assert found["b"].confidence == 0.5
    assert found["a"].confidence == found["c"].confidence == 1.0
