"""Files whose names or numbers of tensors differ from what their config says, and still say it."""

from __future__ import annotations

import json

import checkpoint_writers as writers
import pytest
import torch
from safetensors.torch import load_file, save_file

from pellucid import checkpoints
from pellucid.checkpoints.wrappers import unwrapped_names

NAMES = {"model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"}


def loaded(folder) -> dict[str, torch.Tensor]:
    return dict(checkpoints.load_model(checkpoints.open_checkpoint(folder)).state_dict())


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "base_model.model.", "m."],
)
def test_a_wrapper_in_front_of_every_name_is_left_out_and_said(tmp_path, prefix):
    weights = writers.random_llama()
    want = loaded(writers.write_hf(tmp_path / "plain", writers.LLAMA_JSON, weights))
    spelt = {prefix + name: tensor for name, tensor in weights.items()}
    folder = writers.write_hf(tmp_path / "spelt", writers.LLAMA_JSON, spelt)
    with pytest.warns(UserWarning, match="carry a wrapper's prefix"):
        assert same(loaded(folder), want)


def test_a_wrapper_in_the_middle_of_names_and_in_meta_files(tmp_path):
    weights = writers.random_llama()
    want = loaded(writers.write_hf(tmp_path / "plain", writers.LLAMA_JSON, weights))
    inside = {
        name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."): tensor
        for name, tensor in weights.items()
    }
    folder = writers.write_hf(tmp_path / "inside", writers.LLAMA_JSON, inside)
    with pytest.warns(UserWarning, match="is read as model.layers.0.self_attn"):
        assert same(loaded(folder), want)
    meta = writers.write_meta(tmp_path / "meta", writers.PARAMS_JSON, weights, 2)
    want = {name: tensor.clone() for name, tensor in loaded(meta).items()}
    for path in meta.glob("*.pth"):
        tensors = torch.load(path, weights_only=True)
        torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, path)
    with pytest.warns(UserWarning, match="carry a wrapper's prefix"):
        assert same(loaded(meta), want)


def test_names_that_fit_as_they_are_or_would_fall_together_stay():
    for stored in (NAMES, {f"a.{name}" for name in NAMES} | NAMES):
        assert unwrapped_names(stored, lambda _: NAMES) == {name: name for name in stored}
    assert unwrapped_names((), lambda _: NAMES) == {}


def test_an_unknown_tensor_behind_a_wrapper_stays_unknown(tmp_path):
    weights = writers.random_llama() | {"lora_A": torch.zeros(2, 2)}
    spelt = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    folder = writers.write_hf(tmp_path / "spelt", writers.LLAMA_JSON, spelt)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="1 unknown: lora_A"):
        checkpoints.open_checkpoint(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_a_tied_pair_the_head_may_be_the_one_that_was_kept(tmp_path, family):
    if family == "llama":
        weights, name = writers.random_llama(tied=True), "model.embed_tokens.weight"
        config = writers.LLAMA_JSON | {"tie_word_embeddings": True}
    else:
        weights, name, config = writers.random_gpt2(), "transformer.wte.weight", writers.GPT2_JSON
    want = loaded(writers.write_hf(tmp_path / "plain", config, weights))
    name = name if name in weights else name.removeprefix("transformer.")
    weights["lm_head.weight"] = weights.pop(name)
    assert same(loaded(writers.write_hf(tmp_path / "head", config, weights)), want)


def test_an_index_overrides_what_another_file_still_holds(tmp_path):
    weights = writers.random_llama()
    folder = writers.write_hf(tmp_path / "m", writers.LLAMA_JSON, weights, 2)
    want, index = loaded(folder), folder / "model.safetensors.index.json"
    whole, name = json.loads(index.read_text()), "model.norm.weight"
    old = folder / whole["weight_map"][name]
    save_file({name: weights[name].clone()}, folder / "over.safetensors", {"format": "pt"})
    save_file(load_file(old) | {name: weights[name] * 0}, old, {"format": "pt"})
    whole["weight_map"][name] = "over.safetensors"
    index.write_text(json.dumps(whole))
    assert same(loaded(folder), want)


@pytest.mark.parametrize(
    ("keys", "change", "cure"),
    [
        ({}, lambda w: w.pop("lm_head.weight"), '"tie_word_embeddings": true'),
        ({"attention_bias": True}, lambda w: None, '"attention_bias": false'),
        ({"mlp_bias": True}, lambda w: None, '"mlp_bias": false'),
    ],
)
def test_an_error_names_the_key_that_would_cure_it(tmp_path, keys, change, cure):
    weights = writers.random_llama()
    change(weights)
    folder = writers.write_hf(tmp_path / "m", writers.LLAMA_JSON | keys, weights)
    with pytest.raises(ValueError) as caught:
        checkpoints.open_checkpoint(folder)
    assert cure in str(caught.value) and "\n" not in str(caught.value)


def test_a_qwen_2_written_as_a_llama_has_no_bias_behind_attention(tmp_path):
    """It is the Llama whose bias there is 0; of one layer's alone nothing may be left out."""
    weights, config = writers.random_llama(), writers.LLAMA_JSON | {"attention_bias": True}
    zeros = {}
    for name in list(weights):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name.replace("weight", "bias")] = torch.randn(len(weights[name]))
        if name.endswith("o_proj.weight"):
            zeros[name.replace("weight", "bias")] = torch.zeros(len(weights[name]))
    want, got = (
        checkpoints.load_model(
            checkpoints.open_checkpoint(writers.write_hf(tmp_path / place, config, stored))
        )
        for place, stored in (("zero", weights | zeros), ("without", weights))
    )
    tokens = torch.arange(9)[None]
    assert torch.equal(got(tokens), want(tokens))
    some = writers.write_hf(tmp_path / "some", config, weights | dict([*zeros.items()][:1]))
    with pytest.raises(ValueError, match="o_proj"):
        checkpoints.open_checkpoint(some)


def test_a_head_of_its_own_with_the_embeddings_values_goes_to_metas_layout(tmp_path):
    weights = writers.random_llama()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    folder = writers.write_hf(tmp_path / "m", writers.LLAMA_JSON, weights)
    checkpoints.convert(folder, tmp_path / "meta", "meta")
    again, want = loaded(tmp_path / "meta"), loaded(folder)
    assert same(again | {"unembed.weight": again["embed.weight"]}, want)
