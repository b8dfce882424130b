"""What is saved opens again as it was, or is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import checkpoint_writers as writers
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pellucid import checkpoints
from pellucid.checkpoints.writers import SafetensorsWriter
from pellucid.models import GPTConfig, LlamaConfig, RopeConfig, build, initialise

TINY_GPT = {"vocab_size": 30, "context_length": 16, "width": 24, "n_layers": 2, "n_heads": 3}
TINY_LLAMA = {
    "vocab_size": 40, "context_length": 64, "width": 32, "n_layers": 2, "n_heads": 4,
    "n_kv_heads": 2, "head_dim": 6, "hidden_width": 50,
}  # fmt: skip
CONFIGS = {
    "gpt2": GPTConfig(**TINY_GPT),
    "gpt2 untied": GPTConfig(**TINY_GPT, tied=False),
    "the book's gpt2": GPTConfig(**TINY_GPT, tied=False, qkv_bias=False),
    "llama": LlamaConfig(**TINY_LLAMA),
    "llama tied, biased": LlamaConfig(
        **TINY_LLAMA, tied=True, attention_bias=True, mlp_bias=True,
        rope=RopeConfig(type="llama3", factor=8.0, original_context=16),
    ),
}  # fmt: skip


def random_model(config):
    model = build(config)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():  # no bias stays zero, no norm weight one
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_is_the_model(tmp_path, name):
    model = random_model(CONFIGS[name])
    checkpoints.save(tmp_path / "saved", model.config, model.state_dict())
    opened = checkpoints.open_checkpoint(tmp_path / "saved")
    assert opened.config == model.config
    again = checkpoints.load_model(opened)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(again(tokens), model(tokens), atol=1e-6)
    # Lazy weights save as well as a state dict, into the same bytes.
    checkpoints.save(tmp_path / "copied", opened.config, opened.weights)
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "copied" / path.name).read_bytes()


def test_zero_biases_of_the_books_model_must_be_zero(tmp_path):
    model = random_model(CONFIGS["the book's gpt2"])
    checkpoints.save(tmp_path / "x", model.config, model.state_dict())
    path = tmp_path / "x" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    bias = tensors["transformer.h.1.attn.c_attn.bias"]
    assert bias.shape == (72,)
    assert not bias.any()
    bias[3] = 1.0
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"c_attn\.bias is not zero"):
        checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / "x"))


def test_from_meta_to_hugging_face(tmp_path):
    weights = writers.random_llama(dtype=torch.bfloat16)
    source = writers.write_meta(tmp_path / "meta", writers.PARAMS_JSON, weights, shards=2)
    words = {"<s>": 0, "</s>": 1, "once": 2, "upon": 3}
    Tokenizer(WordLevel(words, unk_token="</s>")).save(str(source / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(roles))
    opened = checkpoints.open_checkpoint(source)
    checkpoints.save(tmp_path / "hf", opened.config, opened.weights, tokenizer_from=source)
    written = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    stated = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"]) == (0, 1)
    assert checkpoints.open_checkpoint(tmp_path / "hf").dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        checkpoints.save(tmp_path / "x", opened.config, opened.weights, tokenizer_from=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "meta"]


def test_large_models_are_split(tmp_path):
    model = random_model(CONFIGS["the book's gpt2"])
    state = model.state_dict()
    checkpoints.save(
        tmp_path / "x", model.config, state, dtype=torch.bfloat16, max_shard_bytes=10_000
    )
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "x").glob("*.safetensors")}
    assert len(sizes) > 3
    assert all(size < 10_000 + 2_000 for size in sizes.values())  # and a header
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == sizes.keys()
    zero_biases = 2 * 72
    expected = sum(tensor.numel() for tensor in state.values()) + zero_biases
    assert index["metadata"]["total_size"] == 2 * expected
    opened = checkpoints.open_checkpoint(tmp_path / "x")
    assert all(torch.equal(opened.weights[name], state[name].bfloat16()) for name in state)


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    config = CONFIGS["gpt2 untied"]
    state = dict(random_model(config).state_dict())
    block = torch.randn(40, 24)
    state |= {
        "embed.weight": block[:30],
        "unembed.weight": block[10:],
        "pos_embed.weight": block[:16],
    }
    checkpoints.save(tmp_path / "x", config, state)
    weights = checkpoints.open_checkpoint(tmp_path / "x").weights
    assert all(torch.equal(weights[name], state[name]) for name in state)


def test_weights_must_fit_the_config(tmp_path):
    model = random_model(CONFIGS["gpt2"])
    state = model.state_dict()
    state["extra"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(7)
    del state["embed.weight"]
    with pytest.raises(
        ValueError,
        match=r"1 missing: embed\.weight \(30, 24\); 1 not as expected: norm\.bias is \(7,\), "
        r"expected \(24,\); 1 unknown: extra",
    ):
        checkpoints.save(tmp_path / "x", model.config, state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError("no space left")])
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, interrupt):
    model = random_model(CONFIGS["gpt2"])
    plain = SafetensorsWriter.write

    def fails_in_the_second_file(self, name, tensor):
        if self.path.name.startswith("model-00002"):
            raise interrupt
        plain(self, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", fails_in_the_second_file)
    with pytest.raises((KeyboardInterrupt, OSError)):
        checkpoints.save(tmp_path / "x", model.config, model.state_dict(), max_shard_bytes=10_000)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_save_leaves_no_folder_that_looks_whole(tmp_path):
    program = f"""
import os
from pellucid import checkpoints
from pellucid.checkpoints.writers import SafetensorsWriter
from pellucid.models import GPTConfig, build
model = build(GPTConfig(**{TINY_GPT!r}))
plain = SafetensorsWriter._close
def dies(self, complete):
    plain(self, complete)
    os._exit(9)
SafetensorsWriter._close = dies
checkpoints.save({str(tmp_path / "x")!r}, model.config, model.state_dict())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    assert done.returncode == 9
    assert not (tmp_path / "x").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x.")
    with pytest.raises(FileNotFoundError):
        checkpoints.open_checkpoint(left)


def test_what_may_be_replaced(tmp_path):
    first, second = (random_model(CONFIGS[name]) for name in ("llama", "gpt2"))
    folder = tmp_path / "x"
    folder.mkdir()  # an empty folder is a place to save into
    checkpoints.save(folder, first.config, first.state_dict())
    with pytest.raises(FileExistsError, match="holds a model already"):
        checkpoints.save(folder, second.config, second.state_dict())
    checkpoints.save(folder, second.config, second.state_dict(), overwrite=True)
    assert checkpoints.open_checkpoint(folder).config == second.config
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds more than a model \(thesis\.tex\)"):
        checkpoints.save(folder, first.config, first.state_dict(), overwrite=True)
    with pytest.raises(NotADirectoryError, match="a file stands"):
        checkpoints.save(folder / "thesis.tex", first.config, first.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
