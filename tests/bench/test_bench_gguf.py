"""GGUF files: read back by our header reader, by the `gguf` package, and run by llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import GPT, LLAMA, random_model, random_tokens

from pellucid.checkpoints.formats import gguf_file as gguf
from pellucid.checkpoints.formats.gguf_writing import write_model
from pellucid.checkpoints.formats.meta import interleaved
from pellucid.generate import Sampling, generate_tokens
from pellucid.models import RopeConfig

SCALED = replace(
    LLAMA, rope=RopeConfig(theta=10000.0, type="llama3", factor=8.0, original_context=32)
)
CONFIGS = {"llama": LLAMA, "llama-scaled": SCALED, "gpt2": GPT}


def written(path: Path, config, dtype: str) -> dict[str, torch.Tensor]:
    """A random model's file at `path`; its weights."""
    weights = dict(random_model(config, torch.float32).named_parameters())
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    write_model(path, config, weights, dtype)
    return weights


@pytest.mark.parametrize("name", CONFIGS)
def test_the_header_says_what_was_written(tmp_path, name):
    config, path = CONFIGS[name], tmp_path / "model.gguf"
    weights = written(path, config, "bfloat16")
    header = gguf.read_header(path)
    family = config.family
    assert header.keys["general.architecture"] == family
    assert header.keys[f"{family}.vocab_size"] == config.vocab_size
    assert header.keys[f"{family}.attention.head_count"] == config.n_heads
    assert header.shapes["token_embd.weight"] == (config.vocab_size, config.width)
    assert header.types["token_embd.weight"] == 30  # bfloat16
    assert header.types["blk.0.attn_norm.weight"] == 0  # vectors stay float32
    assert header.nbytes["token_embd.weight"] >= 2 * config.vocab_size * config.width
    numbers = sum(np.prod(shape) for shape in header.shapes.values())
    extra = config.head_dim // 2 if name == "llama-scaled" else 0
    assert numbers == sum(tensor.numel() for tensor in weights.values()) + extra
    assert path.stat().st_size > sum(header.nbytes.values())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_reader_finds_the_same_values(tmp_path, name, dtype):
    reader_of = pytest.importorskip("gguf", reason="the gguf package").GGUFReader
    config, path = CONFIGS[name], tmp_path / "model.gguf"
    weights = written(path, config, dtype)
    found = {tensor.name: tensor for tensor in reader_of(path).tensors}
    assert {n: tuple(t.shape[::-1]) for n, t in found.items()} == gguf.read_header(path).shapes

    def equal(theirs: str, ours: torch.Tensor) -> None:
        stored = ours if ours.ndim == 1 else ours.to(getattr(torch, dtype))
        values = np.asarray(found[theirs].data).reshape(tuple(ours.shape))
        np.testing.assert_array_equal(values, stored.numpy())

    equal("token_embd.weight", weights["embed.weight"])
    equal("blk.1.ffn_down.weight", weights["layers.1.mlp.down_proj.weight"])
    equal("output_norm.weight", weights["norm.weight"])
    queries, keys, values = (weights[f"layers.1.attn.{n}_proj.weight"] for n in "qkv")
    if config.family == "gpt2":
        equal("blk.1.attn_qkv.weight", torch.cat([queries, keys, values]))
        equal("blk.1.ffn_up.bias", weights["layers.1.mlp.up_proj.bias"])
    else:
        equal("blk.1.attn_q.weight", interleaved(queries, config.n_heads))
        equal("blk.1.attn_v.weight", values)


@pytest.mark.peers
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_writes_the_same_tokens(tmp_path, name, tied):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python")
    from pellucid.bench.engines import make

    even = {"width": 64, "hidden_width": 128, "n_heads": 4}  # it wants rows of 32
    even |= {"head_dim": 16, "n_kv_heads": 2} if name != "gpt2" else {}
    config, path = replace(CONFIGS[name], tied=tied, **even), tmp_path / "model.gguf"
    model = random_model(config, torch.float32)
    write_model(path, config, dict(model.state_dict()), "float32")
    rows = random_tokens(config, 3, 12).tolist()
    engine = make("llama.cpp/f32", path, 1)
    engine.prepare()
    got = [engine.prefill(rows, 6), *engine.decode(5)]
    engine.close()
    ours = generate_tokens(model, rows, sampling=Sampling(temperature=0.0), max_new_tokens=6)
    agree = np.mean(np.array(got) == np.array(list(ours)))
    assert agree > 0.8  # its cache and its GELU table are float16: a close call may go otherwise


def test_what_is_not_gguf_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ValueError, match="not a GGUF file"):
        gguf.read_header(path)


def test_a_wrong_size_leaves_no_file(tmp_path):
    short = gguf.Announced(name="x", shape=(4,), dtype="float32", data=lambda: b"\0" * 12)
    with pytest.raises(ValueError, match="x has 12 bytes, expected 16"):
        gguf.write(tmp_path / "model.gguf", {}, [short])
    assert list(tmp_path.iterdir()) == []


def test_scalings_that_the_format_states_otherwise_are_refused(tmp_path):
    config = replace(
        LLAMA, rope=RopeConfig(theta=10000.0, type="dynamic", factor=2.0, original_context=32)
    )
    with pytest.raises(ValueError, match="'dynamic' is not written"):
        write_model(tmp_path / "model.gguf", config, {}, "float32")
