"""Conversion between the layouts: nothing lost, nothing half done, nothing claimed unproven."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import weakref
from importlib import import_module
from pathlib import Path

import checkpoint_writers as writers
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_loader import MetaModel

from pellucid import checkpoints, tokenizers
from pellucid.checkpoints import proof
from pellucid.checkpoints.formats.meta import half_split, hidden_width, interleaved
from pellucid.checkpoints.formats.meta_writing import _hidden
from pellucid.checkpoints.proof import probe_logits, probe_tokens
from pellucid.checkpoints.weights import Weights
from pellucid.checkpoints.writers import PthWriter

module = import_module("pellucid.checkpoints.convert")  # its name is also the function's
LLAMA3_JSON = writers.LLAMA_JSON | {"rope_theta": 500000.0}
SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes and values, NaN included."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [writers.LLAMA_JSON, LLAMA3_JSON])
def test_there_and_back_is_bit_equal_and_metas_own_loader_reads_it(tmp_path, config, tied, shards):
    weights = writers.random_llama(tied, torch.bfloat16)
    weights["model.norm.weight"][3] = -0.0  # a value like any other
    source = writers.write_hf(tmp_path / "a", config | {"tie_word_embeddings": tied}, weights)
    done = checkpoints.convert(source, tmp_path / "b", "meta", shards=shards)
    assert done.tensors == len(weights)
    assert sorted(path.name for path in (tmp_path / "b").glob("*.pth")) == [
        f"consolidated.{shard:02}.pth" for shard in range(shards)
    ]
    back = checkpoints.convert(tmp_path / "b", tmp_path / "c", "hf", context_length=64)
    assert same(hf_tensors(tmp_path / "c"), weights)
    assert (back.digests, back.digest) == (done.digests, done.digest)
    assert back.left_out == (("output.weight",) if tied else ())
    opened = [checkpoints.open_checkpoint(folder) for folder in (source, tmp_path / "c")]
    assert opened[0].config == opened[1].config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("config", "llama3"),
    [
        (writers.LLAMA_JSON | {"tie_word_embeddings": True}, False),
        (LLAMA3_JSON | {"tie_word_embeddings": True}, True),
        (LLAMA3_JSON | {"rope_scaling": SCALED}, True),
        (LLAMA3_JSON | {"rope_theta": 10000.0, "rope_scaling": SCALED}, True),
    ],
)
def test_metas_own_loader_reads_the_result(tmp_path, config, llama3, shards):
    weights = writers.random_llama(config["tie_word_embeddings"])
    source = writers.write_hf(tmp_path / "a", config, weights)
    checkpoints.convert(source, tmp_path / "b", "meta", shards=shards)
    tokens = [1, 5, 39, 0, 17, 17, 3, 22]
    theirs = MetaModel(tmp_path / "b", llama3).logits(tokens)
    for folder in (source, tmp_path / "b"):
        model = checkpoints.load_model(checkpoints.open_checkpoint(folder), torch.float64)
        with torch.no_grad():
            ours = model(torch.tensor([tokens]))[0]
        assert ours.std() > 0.3
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert ("use_scaled_rope" in json.loads((tmp_path / "b/params.json").read_text())) == llama3


@pytest.mark.parametrize(("shards", "theta", "dim"), [(1, 1e4, 1), (2, 1e4, 1), (4, 5e5, 0)])
def test_from_meta_and_back_gives_the_same_shards(tmp_path, shards, theta, dim):
    params = {name: value for name, value in writers.PARAMS_JSON.items() if name != "max_seq_len"}
    params |= {"rope_theta": theta}
    weights = writers.random_llama(dtype=torch.float16)
    source = writers.write_meta(tmp_path / "a", params, weights, shards, dim)
    done = checkpoints.convert(source, tmp_path / "b", "hf")
    assert done.left_out == ("rope.freqs",)
    assert any("context length" in note for note in done.notes)
    assert same(hf_tensors(tmp_path / "b"), weights)
    checkpoints.convert(tmp_path / "b", tmp_path / "c", "meta", shards=shards)
    for path in sorted(source.glob("*.pth")):
        before = torch.load(path, weights_only=True)
        before.pop("rope.freqs")
        assert same(before, torch.load(tmp_path / "c" / path.name, weights_only=True))
    stated = json.loads((tmp_path / "c" / "params.json").read_text())
    assert (
        {name: params.get(name, value) for name, value in stated.items()}
        == stated | {"use_scaled_rope": False}
        if theta == 5e5
        else stated
    )


@pytest.mark.parametrize("bias", [True, False])
def test_gpt2_to_more_files_and_back(tmp_path, bias):
    weights = writers.random_gpt2()
    if not bias:
        for layer in range(2):
            weights[f"transformer.h.{layer}.attn.c_attn.bias"].zero_()
    config = writers.GPT2_JSON | ({} if bias else {"qkv_bias": False})
    source = writers.write_hf(tmp_path / "a", config, weights)
    done = checkpoints.convert(source, tmp_path / "b", "hf", shards=3)
    sizes = [size for name, size in done.files.items() if name.endswith(".safetensors")]
    assert len(sizes) == 3 and max(sizes) < 2 * min(sizes)
    assert same(hf_tensors(tmp_path / "b"), weights)
    checkpoints.convert(tmp_path / "b", tmp_path / "c", "hf", max_shard_bytes=10_000)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 3
    checkpoints.convert(tmp_path / "c", tmp_path / "d", "hf")
    assert same(safetensors.torch.load_file(tmp_path / "d" / "model.safetensors"), weights)
    with pytest.raises(ValueError, match=r"of a Llama; this gpt2 model has .*norm_bias"):
        checkpoints.convert(source, tmp_path / "e", "meta")


def test_another_dtype(tmp_path):
    weights = writers.random_llama()
    source = writers.write_hf(tmp_path / "a", writers.LLAMA_JSON, weights)
    done = checkpoints.convert(source, tmp_path / "b", "meta", dtype=torch.bfloat16)
    assert done.dtype == "bfloat16"
    assert any("float32 became bfloat16" in note for note in done.notes)
    checkpoints.convert(tmp_path / "b", tmp_path / "c", "hf")
    expected = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert same(hf_tensors(tmp_path / "c"), expected)


def test_values_beyond_a_dtype_are_not_made_infinite(tmp_path):
    weights = writers.random_llama(dtype=torch.bfloat16)
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = -70_000
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf  # was so before
    source = writers.write_hf(tmp_path / "a", writers.LLAMA_JSON, weights)
    with pytest.raises(
        ValueError, match=r"layers\.0.*: 1 values do not fit float16, .* is 7.01e\+04"
    ):
        checkpoints.convert(source, tmp_path / "b", "hf", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_tied_head_is_a_second_name_for_the_embedding(tmp_path):
    weights = writers.random_llama(tied=True)
    source = writers.write_hf(tmp_path / "a", LLAMA3_JSON | {"tie_word_embeddings": True}, weights)
    checkpoints.convert(source, tmp_path / "b", "meta", shards=2)
    shard = torch.load(tmp_path / "b" / "consolidated.01.pth", weights_only=True)
    head, embed = shard["output.weight"], shard["tok_embeddings.weight"]
    assert head.data_ptr() == embed.data_ptr() and head.shape == (20, 32)
    # Llama 2 splits the embedding the other way, so there the head is written out.
    config = writers.LLAMA_JSON | {"tie_word_embeddings": True}
    source = writers.write_hf(tmp_path / "c", config, weights)
    checkpoints.convert(source, tmp_path / "d", "meta", shards=2)
    shard = torch.load(tmp_path / "d" / "consolidated.01.pth", weights_only=True)
    assert shard["output.weight"].shape == (20, 32)
    assert shard["tok_embeddings.weight"].shape == (40, 16)


def test_the_archive_is_laid_out_as_torch_does(tmp_path):
    source = writers.write_hf(tmp_path / "a", writers.LLAMA_JSON, writers.random_llama())
    checkpoints.convert(source, tmp_path / "b", "meta")
    path = tmp_path / "b" / "consolidated.00.pth"
    reader = torch._C.PyTorchFileReader(str(path))
    records = [name for name in reader.get_all_records() if name.startswith("data/")]
    assert len(records) == 21
    assert all(reader.get_record_offset(name) % 64 == 0 for name in records)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert same(mapped, torch.load(path, weights_only=True))


RELEASED = {
    "Llama 2 7B": (4096, 11008), "Llama 2 13B": (5120, 13824), "Llama 1 30B": (6656, 17920),
    "Llama 1 65B": (8192, 22016), "Llama 2 70B": (8192, 28672), "Llama 3 8B": (4096, 14336),
    "Llama 3.1 405B": (16384, 53248), "Llama 3.2 1B": (2048, 8192), "Llama 3.2 3B": (3072, 8192),
    "stories260K": (64, 172),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_the_hidden_width_of_released_models_can_be_stated(name):
    width, hidden = RELEASED[name]
    multiple_of, multiplier = _hidden(width, hidden)
    assert hidden_width(width, multiple_of, multiplier) == hidden
    assert multiplier is None or multiplier == round(multiplier, 2)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 80_000))
def test_any_hidden_width_comes_out_exactly(width, hidden):
    multiple_of, multiplier = _hidden(width, hidden)
    whole = int(2 * (4 * width) / 3)
    if multiplier is not None:
        whole = int(multiplier * whole)
    assert multiple_of * ((whole + multiple_of - 1) // multiple_of) == hidden


def test_interleaved_undoes_half_split():
    weight = torch.arange(4 * 6 * 3).view(24, 3)
    assert torch.equal(interleaved(half_split(weight, 4), 4), weight)
    assert torch.equal(interleaved(weight, 4), writers.interleaved(weight, 4))


REFUSED = {
    "head_dim": (
        {"head_dim": 6},
        r"head width from the width, 32 / 8 heads; this model sets it apart, to 6",
    ),
    "attention_bias": ({"attention_bias": True}, r"no biases; this model has attention_bias"),
    "mlp_bias": ({"mlp_bias": True}, r"no biases; this model has mlp_bias"),
    "linear RoPE": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        r"RoPE plain or scaled as in Llama 3.1; this model's is 'linear'",
    ),
    "another factor": (
        {"rope_scaling": SCALED | {"factor": 32.0}},
        r"for width 32 this model has factor 32.0 instead of 8.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_metas_layout_cannot_state_is_refused(tmp_path, name):
    change, message = REFUSED[name]
    config = writers.LLAMA_JSON | change
    weights = writers.random_llama()
    wide = {"q_proj": (48, 32), "k_proj": (24, 32), "v_proj": (24, 32), "o_proj": (32, 48)}
    for key, tensor in list(weights.items()):
        leaf = key.split(".")[-2]
        if name == "head_dim" and leaf in wide:
            weights[key] = torch.zeros(wide[leaf])
        biased = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."}.get(name)
        if biased and biased in key:
            weights[key.replace("weight", "bias")] = torch.zeros(len(tensor))
    source = writers.write_hf(tmp_path / "a", config, weights)
    with pytest.raises(ValueError, match=message):
        checkpoints.convert(source, tmp_path / "b", "meta")
    checkpoints.convert(source, tmp_path / "c", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


def test_bad_arguments(tmp_path, monkeypatch):
    source = writers.write_hf(tmp_path / "a", writers.LLAMA_JSON, writers.random_llama())
    there = tmp_path / "b"
    for layout, arguments, message in (
        ("onnx", {}, "expected one of hf, meta, gguf"),
        ("meta", {"shards": 3}, "3 shards: query heads 8 does not divide by 3"),
        ("meta", {"shards": 8}, "8 shards: key/value heads 4 does not divide by 8"),
        ("meta", {"shards": 0}, "0 shards: expected 1 or more"),
        ("hf", {"shards": 22}, "22 files: expected 1 to 21"),
        ("hf", {"shards": 0}, "0 files: expected 1 to 21"),
        ("meta", {"max_shard_bytes": 10}, "split by a number of shards"),
        ("hf", {"context_length": 10}, "states 64"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.convert(source, there, layout, **arguments)
    with pytest.raises(FileExistsError, match="not empty; convert into a new folder"):
        checkpoints.convert(source, source, "hf")
    with pytest.raises(NotADirectoryError, match="a file stands"):
        checkpoints.convert(source, source / "config.json", "hf")
    disk = module.shutil.disk_usage(tmp_path)._replace(free=40_000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(OSError, match=r"takes 0.00 GB and .* has 0.00 GB free"):
        checkpoints.convert(source, there, "hf")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    there.mkdir()  # an empty folder is a place to convert into
    checkpoints.convert(source, there, "hf")
    assert checkpoints.open_checkpoint(there).layout == "hf"


def test_the_proof_finds_what_went_wrong(tmp_path, monkeypatch):
    source = writers.write_hf(tmp_path / "a", writers.LLAMA_JSON, writers.random_llama())

    def flips_a_bit(self, name, tensor, plain=PthWriter.write):
        if name == "layers.1.attention.wk.weight":
            tensor = tensor.clone()
            tensor.view(torch.int32)[5, 7] ^= 1
        plain(self, name, tensor)

    with monkeypatch.context() as broken:
        broken.setattr(PthWriter, "write", flips_a_bit)
        with pytest.raises(
            ValueError, match=r"1 of 21 tensors .*: layers\.1\.attn\.k_proj\.weight"
        ):
            checkpoints.convert(source, tmp_path / "b", "meta")
    with monkeypatch.context() as broken:
        plain = module.write_params
        broken.setattr(module, "write_params", lambda *given: plain(*given) | {"norm_eps": 1e-6})
        with pytest.raises(ValueError, match="come out otherwise: norm_eps 1e-05 as 1e-06"):
            checkpoints.convert(source, tmp_path / "b", "meta")
    with monkeypatch.context() as broken:
        calls = []

        def drifts(*given):
            calls.append(1)
            return probe_logits(*given) + 1e-3 * len(calls)

        broken.setattr(proof, "probe_logits", drifts)
        with pytest.raises(ValueError, match=r"logits over 16 tokens differ by up to 0.00"):
            checkpoints.convert(source, tmp_path / "b", "meta")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_probes_logits_are_those_of_the_loaded_model(tmp_path, family):
    weights = writers.random_llama() if family == "llama" else writers.random_gpt2()
    config = writers.LLAMA_JSON if family == "llama" else writers.GPT2_JSON
    opened = checkpoints.open_checkpoint(writers.write_hf(tmp_path / "a", config, weights))
    tokens = probe_tokens(opened.config)
    assert (len(tokens), tokens[0], tokens[-1]) == (16, 0, opened.config.vocab_size - 1)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            expected = checkpoints.load_model(opened, dtype)(torch.tensor([tokens]))[0]
        found = probe_logits(opened, tokens, dtype, "hf")
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_one_tensor_at_a_time(tmp_path, monkeypatch, layout):
    source = writers.write_hf(tmp_path / "a", writers.LLAMA_JSON, writers.random_llama(), files=2)
    alive, most = weakref.WeakSet(), []

    def watched(self, name, plain=Weights.__getitem__):
        tensor = plain(self, name)
        if self._where == str(source):
            most.append(len(alive))
            alive.add(tensor)
        return tensor

    monkeypatch.setattr(Weights, "__getitem__", watched)
    checkpoints.convert(source, tmp_path / "b", layout)
    assert len(most) >= 21
    assert max(most) <= 1  # the one before, while the next is read


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_killed_conversion_leaves_no_folder_that_looks_whole(tmp_path, layout):
    source = writers.write_hf(tmp_path / "a", writers.LLAMA_JSON, writers.random_llama())
    program = f"""
import os, signal
from pellucid import checkpoints
from pellucid.checkpoints.writers import PthWriter, SafetensorsWriter
for writer in (PthWriter, SafetensorsWriter):
    def dies(self, name, tensor, plain=writer.write):
        plain(self, name, tensor)
        if len(self._missing) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    writer.write = dies
checkpoints.convert({str(source)!r}, {str(tmp_path / "b")!r}, {layout!r})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path != source]
    assert len(left) == 1 and left[0].name.startswith(".b.") and left[0].suffix == ".part"
    with pytest.raises(FileNotFoundError):
        checkpoints.open_checkpoint(left[0])
    checkpoints.convert(source, tmp_path / "b", layout)  # what is left is in nobody's way
    assert (tmp_path / "b").is_dir()


@pytest.mark.assets
def test_stories_both_ways(tmp_path, assets):
    theirs = assets / "stories260K"
    checkpoints.convert(theirs / "meta", tmp_path / "hf", "hf")
    assert same(hf_tensors(tmp_path / "hf"), hf_tensors(theirs / "hf"))
    stated = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = json.loads((theirs / "hf" / "config.json").read_text())
    assert {name: stated.get(name) for name in expected} == expected
    checkpoints.convert(theirs / "hf", tmp_path / "meta", "meta")
    found = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    original = torch.load(theirs / "meta" / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(found[name], original[name]) for name in found)
    assert original.keys() - found.keys() <= {"rope.freqs"}
    for folder in ("hf", "meta"):
        tokenizer = (tmp_path / folder / "tokenizer.model").read_bytes()
        assert tokenizer == (theirs / "hf" / "tokenizer.model").read_bytes()
        MetaModel(tmp_path / "meta", llama3=False)


@pytest.mark.slow
@pytest.mark.assets
def test_llama3s_tokenizer_both_ways(tmp_path, assets):
    """Only Meta's file, then only Hugging Face's; in the end the very same bytes."""
    original = assets / "llama3" / "tokenizer.model"
    weights = writers.random_llama()
    source = writers.write_hf(tmp_path / "a", LLAMA3_JSON | {"rope_scaling": SCALED}, weights)
    (source / "tokenizer.model").write_bytes(original.read_bytes())
    there = checkpoints.convert(source, tmp_path / "b", "hf")
    assert there.tokenizer == ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    assert there.notes == ()
    (tmp_path / "b" / "tokenizer.model").unlink()
    assert tokenizers.load(tmp_path / "b").kind == "tokenizer.json"
    back = checkpoints.convert(tmp_path / "b", tmp_path / "c", "meta")
    assert back.tokenizer == ("tokenizer.model",)
    assert (tmp_path / "c" / "tokenizer.model").read_bytes() == original.read_bytes()


def test_a_tokenizer_that_metas_layout_cannot_hold_is_named(tmp_path):
    source = writers.write_hf(tmp_path / "a", writers.LLAMA_JSON, writers.random_llama())
    done = checkpoints.convert(source, tmp_path / "b", "meta")
    assert any("no tokenizer" in note and "has none" in note for note in done.notes)
    tokenizers.train_bpe(["some text to learn from"], 260, source)
    done = checkpoints.convert(source, tmp_path / "c", "meta")
    assert done.tokenizer == ()
    assert any("special tokens only" in note for note in done.notes)
