"""Trace files: bit-exact round trips, readable by anyone, whole or absent."""

from __future__ import annotations

import json

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from tiny import LLAMA, random_model, random_tokens

from pellucid.trace import Trace, trace

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.fixture
def seen():
    model = random_model(LLAMA, torch.bfloat16, "meta")
    tokens = random_tokens(LLAMA, 1, 6)
    with trace(model) as seen:
        model(tokens)
    seen.meta.update(model="tiny", tokens=tokens[0].tolist(), token_strings=["a", " b\n", "é", '"'])
    return seen


def test_a_round_trip_is_bit_exact_and_keeps_the_order(seen, tmp_path):
    seen.save(tmp_path / "t.safetensors")
    back = Trace.load(tmp_path / "t.safetensors")
    assert list(back) == list(seen)
    for name, tensor in seen.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
    assert {key: back.meta[key] for key in seen.meta} == seen.meta
    assert back.dims("layers.1.attn.scores") == ("B", "H", "T", "S")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_to_the_bit(dtype, tmp_path):
    bits = torch.randint(0, 256, (6, 8), generator=torch.Generator().manual_seed(0))
    bits = (bits % 2 if dtype == torch.bool else bits).to(torch.uint8)
    tensor = bits.view(torch.bool) if dtype == torch.bool else bits.view(dtype)
    Trace({"x": tensor}).save(tmp_path / "t.safetensors")
    back = Trace.load(tmp_path / "t.safetensors")["x"]
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))  # NaN bits included


def test_views_and_shared_memory_are_written_as_they_read(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    Trace({"x": x, "again": x, "turned": x.t(), "part": x[:, 1::2]}).save(
        tmp_path / "t.safetensors"
    )
    back = Trace.load(tmp_path / "t.safetensors")
    assert torch.equal(back["again"], x)
    assert torch.equal(back["turned"], x.t())
    assert torch.equal(back["part"], x[:, 1::2])


def test_a_graph_is_no_obstacle_to_saving(tmp_path):
    model = random_model(LLAMA)
    with trace(model, only="logits", gradients=True) as seen:
        model(random_tokens(LLAMA, 1, 3))
    seen.save(tmp_path / "t.safetensors")
    assert torch.equal(Trace.load(tmp_path / "t.safetensors")["logits"], seen["logits"].detach())


def test_a_trace_file_reads_with_nothing_but_safetensors(seen, tmp_path):
    seen.save(tmp_path / "t.safetensors")
    with safetensors.safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        stated = file.metadata()
        assert set(file.keys()) == set(seen)
        assert torch.equal(file.get_tensor("layers.0.attn.z"), seen["layers.0.attn.z"])
    assert stated["model"] == "tiny"
    assert json.loads(stated["token_strings"]) == ["a", " b\n", "é", '"']
    assert json.loads(stated["dims"])["layers.0.attn.z"] == ["B", "H", "T", "D"]


@pytest.mark.parametrize(
    "value",
    ["plain", "123", "true", "null", '"quoted"', "NaN", "", "[1]", 7, 1.5, None, {"a": 1}],
)
def test_metadata_comes_back_as_it_was(value, tmp_path):
    Trace({"x": torch.ones(1)}, {"value": value}).save(tmp_path / "t.safetensors")
    assert Trace.load(tmp_path / "t.safetensors").meta["value"] == value


def test_names_outside_the_vocabulary_are_welcome(tmp_path):
    Trace({"my.own": torch.ones(2)}, {"dims": {"my.own": ["K"]}}).save(tmp_path / "t.safetensors")
    back = Trace.load(tmp_path / "t.safetensors")
    assert back.dims("my.own") == ("K",)
    Trace({"other": torch.ones(2)}).save(tmp_path / "t.safetensors")
    assert list(Trace.load(tmp_path / "t.safetensors")) == ["other"]


def test_any_safetensors_file_loads(tmp_path):
    save_file({"b": torch.ones(2), "a": torch.zeros(1)}, tmp_path / "t.safetensors")
    back = Trace.load(tmp_path / "t.safetensors")
    assert list(back) == ["a", "b"]
    assert back.meta == {}


def test_a_failed_save_leaves_the_old_file_and_no_crumbs(seen, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    seen.save(path)
    before = path.read_bytes()

    def full(tensors, where, metadata):
        where.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        seen.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_none_is_an_os_error(seen, tmp_path):
    with pytest.raises(OSError):
        seen.save(tmp_path / "no" / "such" / "folder" / "t.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64])
def test_a_file_that_is_none_is_a_clear_error(content, tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.safetensors: not a readable trace file"):
        Trace.load(path)


def test_a_truncated_file_is_a_clear_error(seen, tmp_path):
    path = tmp_path / "t.safetensors"
    seen.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable trace file"):
        Trace.load(path)


def test_a_missing_file_and_a_folder_are_os_errors(tmp_path):
    with pytest.raises(OSError):
        Trace.load(tmp_path / "none.safetensors")
    with pytest.raises(OSError):
        Trace.load(tmp_path)
