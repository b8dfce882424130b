"""Faults nobody put in the catalogue: one byte of a file, one number of a config."""

from __future__ import annotations

import json
import random
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from tiny import LLAMA, random_model

from pellucid import checkpoints, tokenizers
from pellucid.diff.two_models import diff

OURS = {
    "self_attn.": "attn.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "embed_tokens": "embed",
    "lm_head": "unembed",
}
TEXT = "the quick brown fox jumps over the lazy dog, twice a day; 1 2 3 4 5 6 7 8 9 10 " * 3


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A saved model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("healthy")
    tokenizer = tokenizers.train_bpe([TEXT], 280, folder / "tokenizer")
    config = replace(LLAMA, vocab_size=tokenizer.vocab_size, context_length=256)
    weights = random_model(config, torch.float32).state_dict()
    checkpoints.save(folder / "model", config, weights, tokenizer_from=folder / "tokenizer")
    return folder / "model"


@pytest.fixture
def copied(healthy, tmp_path):
    return shutil.copytree(healthy, tmp_path / "copy")


def _tensor_at(content, place):
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if start <= place < end:
                return name
    raise AssertionError(f"no tensor holds byte {place}")


@pytest.mark.parametrize("seed", range(8))
def test_one_bit_of_the_weights_file(healthy, copied, seed):
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    chance = random.Random(seed)
    place = chance.randrange(len(content) // 2, len(content))
    bit = chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    report = diff(str(healthy), str(copied), TEXT[:120])
    assert report.exit_status == 1
    (found,) = report.static
    assert found.cause in ("one bit flipped", "not finite")
    there = _tensor_at(content, place).removeprefix("model.")
    for stored, ours in OURS.items():
        there = there.replace(stored, ours)
    assert found.name == there
    if found.cause == "one bit flipped":
        assert f"(bit {8 * (place % 4) + bit})" in found.finding


@pytest.mark.parametrize(
    ("field", "value", "cause", "first"),
    [
        ("rms_norm_eps", 3e-4, "norm eps", "layers.0.attn_norm"),
        ("rope_theta", 12000.0, "RoPE theta", "rope.cos"),
    ],
)
def test_one_number_of_the_config(healthy, copied, field, value, cause, first):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    assert field in config
    path.write_text(json.dumps({**config, field: value}))
    report = diff(str(healthy), str(copied), TEXT[:120])
    assert [finding.cause for finding in report.static] == [cause]
    assert report.first is not None and report.first.name == first
    assert report.cause is not None and report.cause.name == cause


def test_a_number_that_makes_another_shape_is_one_clear_line(healthy, copied):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_key_value_heads": 4}))
    with pytest.raises(ValueError, match="k_proj"):
        diff(str(healthy), str(copied), TEXT[:120])
