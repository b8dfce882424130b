"""config.json: every key used, known to be harmless, or an error that names it."""

from __future__ import annotations

import json

import checkpoint_writers as writers
import pytest
import torch

from pellucid.checkpoints.formats.hf_config import read_config, write_config
from pellucid.files import read_json
from pellucid.models import GPTConfig, LlamaConfig, RopeConfig

LLAMA, GPT2 = writers.LLAMA_JSON, writers.GPT2_JSON


def rope(**keys) -> RopeConfig:
    config = read_config({**LLAMA, **keys}, "config.json")
    assert config.family == "llama"
    return config.rope


def test_llama_keys():
    config = read_config(LLAMA | {"head_dim": 6, "attention_bias": True}, "config.json")
    assert config == LlamaConfig(
        vocab_size=40, context_length=64, width=32, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=6,
        hidden_width=96, norm_eps=1e-5, rope=RopeConfig(theta=10000.0), attention_bias=True,
    )  # fmt: skip


def test_llama_defaults_are_those_of_transformers():
    required = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    required += ("num_attention_heads", "vocab_size")
    config = read_config({key: LLAMA[key] for key in required}, "config.json")
    assert config == LlamaConfig(
        vocab_size=40, context_length=2048, width=32, n_layers=2, n_heads=8, n_kv_heads=8,
        head_dim=4, hidden_width=96, norm_eps=1e-6, rope=RopeConfig(theta=10000.0),
    )  # fmt: skip
    for key in required:
        with pytest.raises(ValueError, match=f"{key} is missing"):
            read_config({name: LLAMA[name] for name in required if name != key}, "config.json")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, RopeConfig()),
        ({"rope_theta": 500000}, RopeConfig(theta=500000.0)),
        ({"rope_scaling": None}, RopeConfig()),
        ({"rope_scaling": {"rope_type": "default"}}, RopeConfig()),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            RopeConfig(type="linear", factor=4.0),
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            RopeConfig(type="dynamic", factor=2.0, original_context=64),
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "factor": 32.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 16,
                    "rope_type": "llama3",
                },
            },
            RopeConfig(theta=5e5, type="llama3", factor=32.0, original_context=16),
        ),
        (  # transformers 5
            {"rope_theta": None, "rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}},
            RopeConfig(theta=123.0),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 24,
                    "beta_slow": None,
                    "mscale": 0.7,
                    "mscale_all_dim": 0,
                    "truncate": False,
                }
            },
            RopeConfig(
                theta=1e6, type="yarn", factor=4.0, original_context=16, beta_fast=24.0,
                mscale=0.7, truncate=False,
            ),
        ),
        (  # both spellings, as some files have them
            {
                "rope_theta": 9.0,
                "rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": None},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 9.0},
            },
            RopeConfig(theta=9.0, type="linear", factor=4.0),
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}},
            RopeConfig(type="yarn", factor=4.0, original_context=16),
        ),
    ],
)  # fmt: skip
def test_rope_spellings(keys, expected):
    assert rope(**keys) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; Pellucid computes 'silu' only"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "bert"}, "model_type is 'bert'; Pellucid has .*gpt2, .*llama, .*mistral, "),
        ({"hidden_size": 33}, "hidden_size 33 does not divide into 8 heads"),
        ({"num_attention_heads": 0}, "hidden_size 32 does not divide into 0 heads"),
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5; expected a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is not finite"),
        ({"rope_theta": 10**400}, "rope_theta is not finite"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; expected an object"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "unknown rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs a factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "wavelength": 1}}, "key wavelength"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2},
             "rope_parameters": {"rope_type": "linear", "factor": 4}},
            r"contradict each other \(factor\)",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2},
             "rope_parameters": {"rope_type": "dynamic", "factor": 2}},
            r"contradict each other \(type\)",
        ),
    ],
)  # fmt: skip
def test_llama_errors(keys, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        read_config({**LLAMA, **keys}, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json")


@pytest.mark.parametrize(
    ("base", "keys", "expected"),
    [
        (LLAMA, {"sliding_window": 512, "b": 1}, "unknown keys b = 1, sliding_window = 512"),
        (LLAMA, {"unk_token_id": 0, "_model_name_or_path": "x"}, "_model_name_or_path = x, unk_t"),
        (GPT2, {"rotary_dim": 64}, "unknown key rotary_dim = 64; transformers' GPT2LMHeadModel"),
    ],
)
def test_a_key_that_the_format_does_not_know_is_a_note(base, keys, expected):
    with pytest.warns(UserWarning, match=expected):
        assert read_config({**base, **keys}, "config.json") == read_config(base, "config.json")
    nulls = dict.fromkeys(keys)  # null means absent, known or not
    assert read_config({**base, **nulls}, "config.json") == read_config(base, "config.json")


def test_gpt2_keys():
    keys = GPT2 | {"n_ctx": 16, "n_inner": 50, "resid_pdrop": 0.3, "activation_function": "gelu"}
    assert read_config(keys, "") == GPTConfig(
        vocab_size=30, context_length=16, width=24, n_layers=2, n_heads=3, hidden_width=50,
        gelu="erf", resid_dropout=0.3,
    )  # fmt: skip
    del keys["n_positions"]
    assert read_config(keys, "").context_length == 16


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"activation_function": "relu"},
            "activation_function is 'relu'; expected one of gelu_new",
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_head": 5}, "width 24 does not divide into 5 heads"),
        ({"n_embd": 0}, "width is 0"),
        ({"hidden_size": 25}, "n_embd is 24 and hidden_size, its other name, 25"),
    ],
)
def test_gpt2_errors(keys, expected):
    with pytest.raises(ValueError, match=expected):
        read_config({**GPT2, **keys}, "config.json")


CONFIGS = [
    LlamaConfig(),
    LlamaConfig(tied=True, attention_bias=True, mlp_bias=True, head_dim=64),
    LlamaConfig(rope=RopeConfig(type="linear", factor=3.0)),
    LlamaConfig(rope=RopeConfig(type="dynamic", factor=3.0, original_context=8192)),
    LlamaConfig(
        rope=RopeConfig(theta=5e5, type="llama3", factor=8.0, original_context=8192)
    ),
    LlamaConfig(
        rope=RopeConfig(
            type="yarn", factor=8.0, original_context=512, beta_fast=16.0, mscale=0.5,
            mscale_all_dim=0.8, truncate=False,
        )
    ),
    LlamaConfig(
        rope=RopeConfig(type="yarn", factor=8.0, original_context=512, attention_factor=1.5)
    ),
    GPTConfig(),
    GPTConfig(qkv_bias=False, tied=False, gelu="erf", hidden_width=100, attn_dropout=0.1),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_writing_and_reading_is_the_identity(config):
    written = json.loads(json.dumps(write_config(config, torch.bfloat16)))
    assert written["torch_dtype"] == "bfloat16"
    assert read_config(written, "") == config


def test_a_config_the_format_cannot_state():
    config = LlamaConfig(rope=RopeConfig(type="dynamic", factor=2.0, original_context=512))
    with pytest.raises(ValueError, match="grows from 512 tokens, but the context length is 8192"):
        write_config(config, torch.float32)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000])
def test_config_files_that_are_no_json_object(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(path)


@pytest.mark.peers
def test_every_key_transformers_writes_is_known(tmp_path):
    transformers = pytest.importorskip("transformers")
    for theirs in (transformers.LlamaConfig(), transformers.GPT2Config()):
        theirs.save_pretrained(tmp_path)
        read_config(read_json(tmp_path / "config.json"), "")
        full = theirs.to_dict()  # with every default spelt out
        full["model_type"] = theirs.model_type
        read_config(json.loads(json.dumps(full)), "")
