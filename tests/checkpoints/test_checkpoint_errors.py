"""A checkpoint that is not whole, or not honest, is one clear line with the numbers in it."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import checkpoint_writers as writers
import pytest
import torch
from safetensors.torch import save_file

from pellucid import checkpoints

Q = "model.layers.1.self_attn.q_proj.weight"
WQ = "layers.1.attention.wq.weight"


def hf_folder(folder: Path, weights=None, files: int = 1, **config) -> Path:
    weights = writers.random_llama() if weights is None else weights
    return writers.write_hf(folder, writers.LLAMA_JSON | config, weights, files)


def meta_folder(folder: Path, shards: int = 1, **params) -> Path:
    return writers.write_meta(folder, writers.PARAMS_JSON | params, writers.random_llama(), shards)


def refuses(folder: Path, *expected: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind) as caught:
        checkpoints.load_model(checkpoints.open_checkpoint(folder))
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message


def edit_pth(path: Path, change) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


class Malicious:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "inside a tensor dict", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, kind):
    marker = tmp_path / "ran"
    folder = meta_folder(tmp_path / "model")
    path = folder / "consolidated.00.pth"
    evil = Malicious(marker)
    if kind == "zip":
        torch.save(evil, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        tensors = torch.load(path, weights_only=True)
        torch.save({**tensors, "extra": evil}, path)
    refuses(folder, str(path), "not a whole .pth archive" if kind == "bare pickle" else "refused")
    assert not marker.exists()
    if kind == "zip":  # the bait is real
        torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_pth(tmp_path, keep):
    folder = meta_folder(tmp_path)
    path = folder / "consolidated.00.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    refuses(folder, str(path), f"{len(whole[:keep]):,} bytes")


def test_pth_that_holds_something_else(tmp_path):
    folder = meta_folder(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}}, folder / "consolidated.00.pth")
    refuses(folder, "expected a dict of tensors by name")
    torch.save([torch.zeros(1)], folder / "consolidated.00.pth")
    refuses(folder, "found a list")


def test_pth_whose_archive_lacks_a_tensor(tmp_path):
    folder = meta_folder(tmp_path)
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path) as whole:
        kept = {name: whole.read(name) for name in whole.namelist() if not name.endswith("data/3")}
    with zipfile.ZipFile(path, "w") as part:
        for name, content in kept.items():
            part.writestr(name, content)
    refuses(folder, str(path), "not a whole .pth archive")


@pytest.mark.parametrize("missing", [-1, -5000])
def test_truncated_safetensors(tmp_path, missing):
    path = hf_folder(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:missing])
    refuses(tmp_path, f"{len(whole) + missing:,} bytes", f"describes {len(whole):,}", "cut short")
    path.write_bytes(whole + b"x")
    refuses(tmp_path, f"{len(whole) + 1:,} bytes", "appended")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "0 bytes"),
        (b"short", "5 bytes"),
        (struct.pack("<Q", 10**15) + b"{}", "1,000,000,000,000,000"),
        (struct.pack("<Q", 2) + b"{]", "not a safetensors header"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not a safetensors header"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors header"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "not a safetensors header"),
        (struct.pack("<Q", 60000) + b"[" * 60000, "header"),
    ],
)
def test_corrupt_safetensors_header(tmp_path, content, expected):
    (hf_folder(tmp_path) / "model.safetensors").write_bytes(content)
    refuses(tmp_path, "model.safetensors", expected)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "not a whole"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "not a whole"),
        ({"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}, "Q4"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "not a whole"),
        ({"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}, "not a whole"),
    ],
)
def test_header_that_does_not_fit_its_bytes(tmp_path, entry, expected):
    header = json.dumps({"x": entry}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(entry["data_offsets"][1])
    (hf_folder(tmp_path) / "model.safetensors").write_bytes(data)
    refuses(tmp_path, expected)


def test_missing_files(tmp_path):
    refuses(tmp_path / "nowhere", "no such folder", kind=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "not a model", "params.json", kind=FileNotFoundError)
    folder = hf_folder(tmp_path / "a", files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuses(folder, "1 of 3", "model-00002-of-00003.safetensors", kind=FileNotFoundError)
    folder = hf_folder(tmp_path / "b")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(folder, "pytorch_model.bin is not read", kind=FileNotFoundError)
    folder = meta_folder(tmp_path / "c", shards=4)
    (folder / "consolidated.02.pth").unlink()
    refuses(folder, "1 of 4 shards", "consolidated.02.pth", kind=FileNotFoundError)
    (folder / "consolidated.03.pth").unlink()  # two of four, numbered without a gap
    refuses(folder, "tensors of 2 shards", "wq.weight is (8, 32), expected (16, 32) (shard 0)")
    for path in folder.glob("*.pth"):
        path.unlink()
    refuses(folder, "no weights", kind=FileNotFoundError)


def test_pointers_that_git_left(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (hf_folder(tmp_path / "hf") / "model.safetensors").write_bytes(pointer)
    (meta_folder(tmp_path / "meta") / "consolidated.00.pth").write_bytes(pointer)
    for layout in ("hf", "meta"):
        refuses(tmp_path / layout, "only a Git LFS pointer", "git lfs pull")


def test_index_that_does_not_fit_its_files(tmp_path):
    folder = hf_folder(tmp_path, files=2)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())

    def write(weight_map) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))

    write(whole["weight_map"] | {"ghost": "model-00001-of-00002.safetensors"})
    refuses(folder, "1 of 22 tensors", "ghost in model-00001-of-00002.safetensors")
    write({name: file for name, file in whole["weight_map"].items() if name != Q})
    refuses(folder, "not in the index", Q)
    write(whole["weight_map"] | {Q: "../elsewhere.safetensors"})
    refuses(folder, "weight_map")
    write([1, 2])
    refuses(folder, "weight_map")
    index.write_text("{")
    refuses(folder, "index.json is not JSON")


def test_every_tensor_is_accounted_for(tmp_path):
    weights = writers.random_llama()
    del weights["model.norm.weight"]
    weights[Q] = torch.zeros(32, 31)
    weights["model.layers.7.extra"] = torch.zeros(3)
    refuses(
        hf_folder(tmp_path, weights),
        "1 missing: model.norm.weight (32,)",
        f"1 not as expected: {Q} is (32, 31), expected (32, 32)",
        "1 unknown: model.layers.7.extra (3,)",
    )


def test_many_missing_tensors_are_counted(tmp_path):
    refuses(hf_folder(tmp_path, num_hidden_layers=4), "18 missing", "and 12 more")
    refuses(hf_folder(tmp_path, num_hidden_layers=1), "9 unknown", "and 3 more")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 10**12}, "is 1000000000000; expected at most 100,000"),
        ({"hidden_size": 10**18, "head_dim": 4}, "no tensor can be this large"),
        ({"vocab_size": 10**30}, "no tensor can be this large"),
        ({"num_attention_heads": 10**30, "head_dim": 4}, "no tensor can be this large"),
        ({"intermediate_size": 2**55}, "no tensor can be this large"),
    ],
)
def test_sizes_beyond_all_bounds(tmp_path, config, expected):
    refuses(hf_folder(tmp_path, **config), "config.json", expected)


def test_tensors_that_are_no_floats(tmp_path):
    weights = writers.random_llama()
    weights[Q] = torch.zeros(32, 32, dtype=torch.int8)
    refuses(hf_folder(tmp_path, weights), f"{Q} is torch.int8")


def test_tied_head_must_be_the_embedding(tmp_path):
    weights = writers.random_llama()
    folder = hf_folder(tmp_path, weights, tie_word_embeddings=True)
    refuses(folder, "lm_head.weight differs from the embedding")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert checkpoints.load_model(checkpoints.open_checkpoint(folder)).unembed is None


def test_rotary_buffers_are_known(tmp_path):
    weights = writers.random_llama()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights[name] = torch.ones(writers.HEAD_DIM // 2)
    checkpoints.load_model(checkpoints.open_checkpoint(hf_folder(tmp_path, weights)))
    weights[name] = torch.ones(5)
    refuses(hf_folder(tmp_path, weights), f"{name} is (5,), expected (2,)")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"dim": 64}, ("tok_embeddings.weight is (40, 32), expected (40, 64)",)),
        ({"multiple_of": 256}, ("w1.weight is (96, 32), expected (256, 32)",)),
        ({"ffn_dim_multiplier": 2.0}, ("is (96, 32), expected (192, 32)",)),
        ({"n_kv_heads": 8}, ("wk.weight is (16, 32), expected (32, 32)",)),
        ({"n_kv_heads": 3}, ("8 query heads", "3 key/value heads")),
        ({"n_heads": 5}, ("dim 32", "n_heads 5")),
        ({"n_heads": 0}, ("dim 32", "n_heads 0")),
        ({"multiple_of": 0}, ("multiple_of", "0")),
        ({"n_layers": 3}, ("9 missing", "layers.2.attention.wq.weight (32, 32)")),
        ({"n_layers": 1}, ("9 unknown", "layers.1.attention.wq.weight (32, 32)")),
        ({"vocab_size": 41}, ("tok_embeddings.weight is (40, 32), expected (41, 32)",)),
        ({"quantization_args": {"scheme": "int4"}}, ("unknown key quantization_args",)),
        ({"dim": "32"}, ("dim is '32'; expected a whole number",)),
        ({"n_layers": None}, ("n_layers is missing",)),
        ({"norm_eps": True}, ("norm_eps is True; expected a number",)),
        ({"use_scaled_rope": 1}, ("use_scaled_rope is 1; expected true or false",)),
    ],
)
def test_params_that_do_not_fit_the_weights(tmp_path, params, expected):
    refuses(meta_folder(tmp_path, **params), "params.json", *expected)


def test_shards_that_do_not_fit_each_other(tmp_path):
    folder = meta_folder(tmp_path, shards=2)
    second = folder / "consolidated.01.pth"
    edit_pth(second, lambda tensors: tensors["norm.weight"].add_(1))
    refuses(folder, "norm.weight differs between shard 0 and shard 1")
    edit_pth(second, lambda tensors: tensors.update({WQ: torch.zeros(15, 32)}))
    refuses(folder, f"{WQ} is (15, 32), expected (16, 32) (shard 1)")
    edit_pth(second, lambda tensors: tensors.pop(WQ))
    refuses(folder, f"1 missing: {WQ} (16, 32) (shard 1)")
    edit_pth(second, lambda tensors: tensors.pop("output.weight"))
    refuses(folder, "output.weight (20, 32) (shard 1)")


def test_copies_that_drifted_in_the_last_bits_are_those_of_shard_0(tmp_path):
    folder = meta_folder(tmp_path, shards=2)
    want = checkpoints.open_checkpoint(folder).weights["norm.weight"].clone()
    edit_pth(folder / "consolidated.01.pth", lambda tensors: tensors["norm.weight"].mul_(1.001))
    with pytest.warns(UserWarning, match="norm.weight differs .* by up to 0.00"):
        assert torch.equal(checkpoints.open_checkpoint(folder).weights["norm.weight"], want)


def test_a_number_of_shards_that_does_not_divide(tmp_path):
    folder = meta_folder(tmp_path, shards=2)
    (folder / "consolidated.02.pth").write_bytes((folder / "consolidated.01.pth").read_bytes())
    refuses(folder, "does not divide into 3 shards")


def test_vocabulary_is_counted_where_params_leave_it_out(tmp_path):
    for shards, embed_dim in ((1, 1), (2, 1), (2, 0)):
        folder = writers.write_meta(
            tmp_path / f"{shards}{embed_dim}",
            writers.PARAMS_JSON | {"vocab_size": -1},
            writers.random_llama(),
            shards,
            embed_dim,
        )
        assert checkpoints.open_checkpoint(folder).config.vocab_size == 40
    folder = meta_folder(tmp_path / "none", vocab_size=-1)
    edit_pth(folder / "consolidated.00.pth", lambda tensors: tensors.pop("tok_embeddings.weight"))
    refuses(folder, "vocab_size is -1")
