"""A model folder against a GGUF file made of it, rightly and wrongly."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from tiny import LLAMA, random_model

import pellucid
from pellucid.checkpoints import load_model, open_checkpoint
from pellucid.checkpoints.formats.gguf_tokenizer import NONE, tokenizer_keys
from pellucid.checkpoints.formats.gguf_writing import write_gguf
from pellucid.diff.gguf_types import declared_type
from pellucid.families.names import Order
from pellucid.language_model import LanguageModel
from pellucid.models import RopeConfig
from pellucid.tokenizers.gguf import PRE, from_keys

SCALED = RopeConfig(theta=1e4, type="llama3", factor=8.0, original_context=32)
CONFIG = replace(LLAMA, width=64, hidden_width=96, head_dim=16, rope=SCALED)
ORDER = Order(pairs="neighbours", head_dim=16, turned=16)
TOKENS = list(range(2, 14))


@pytest.fixture(scope="module")
def state():
    return random_model(CONFIG, torch.float32).state_dict()


@pytest.fixture(scope="module")
def model(state):
    model = random_model(CONFIG, torch.float32)
    model.load_state_dict(state)
    return model


def side(path):
    """What a path with a tokenizer would be, for a file without."""
    checkpoint = open_checkpoint(path)
    tokenizer = pellucid.tokenizers.load(pellucid.checkpoints.resolve("demo"))
    return LanguageModel(load_model(checkpoint), tokenizer, checkpoint)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_each_block_is_proven(state, kind):
    a, number = state["layers.0.mlp.up_proj.weight"], gguf.GGMLQuantizationType[kind]
    b = torch.from_numpy(gguf.dequantize(gguf.quantize(a.numpy(), number), number))
    cause, finding, verdict = declared_type(a, b, kind)
    assert (cause, verdict) == ("quantised weights", "explained") and "192 blocks" in finding
    b[5, 40] += 0.01
    cause, finding, verdict = declared_type(a, b, kind)
    assert verdict == "fault" and "1 of 192 blocks" in finding and "[5, 32:64] first" in finding
    assert declared_type(torch.randn_like(a), b, kind) is None


def test_a_file_in_eight_bits_is_explained(tmp_path, model, state):
    write_gguf(tmp_path / "a.gguf", CONFIG, state.__getitem__, "Q8_0", NONE)
    report = pellucid.diff(model, side(tmp_path / "a.gguf"), TOKENS)
    assert report.verdict == "explained"


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_permutation_left_out_is_named(tmp_path, model, state, kind):
    def unpermuted(name):  # the writer permutes: what it gets here comes out as it was
        turned = name.endswith(("q_proj.weight", "k_proj.weight"))
        return ORDER.ours(state[name]) if turned else state[name]

    write_gguf(tmp_path / "a.gguf", CONFIG, unpermuted, kind, NONE)
    report = pellucid.diff(model, side(tmp_path / "a.gguf"), TOKENS)
    assert report.verdict == "diverged"
    assert "q/k not permuted" in str(report.to_json())


def test_a_scaling_left_out_is_named(tmp_path, model, state):
    plain = replace(CONFIG, rope=RopeConfig(theta=1e4))
    write_gguf(tmp_path / "a.gguf", plain, state.__getitem__, "F32", NONE)
    report = pellucid.diff(model, side(tmp_path / "a.gguf"), TOKENS)
    assert report.verdict == "diverged" and "RoPE scaling missing" in str(report.to_json())


def test_a_wrong_pre_tokenizer_is_seen():
    folder = pellucid.checkpoints.resolve("demo")
    before = pellucid.load("demo")
    keys = tokenizer_keys(before.tokenizer, folder, before.config.vocab_size)
    text = "x = 12345;  don't\n\n  y(ab)\t!!\n"
    ids = before.tokenizer.encode(text)
    assert from_keys(keys, "right.gguf").encode(text) == ids
    every = (from_keys({**keys, "tokenizer.ggml.pre": word}, "wrong.gguf") for word in PRE)
    wrong = next(tokenizer for tokenizer in every if tokenizer.encode(text) != ids)
    after = LanguageModel(before.model, wrong, before.checkpoint)
    report = pellucid.diff(before, after, text)
    assert report.verdict == "diverged" and "other splitting of the text" in str(report.to_json())
