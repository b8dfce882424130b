"""Meta's and Hugging Face's layout of the same weights are one model, bit for bit."""

from __future__ import annotations

from pathlib import Path

import checkpoint_writers as writers
import pytest
import torch

from pellucid import checkpoints
from pellucid.checkpoints.files import Stored
from pellucid.checkpoints.formats import meta
from pellucid.models import RopeConfig, build


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("shards", "embed_dim"), [(1, 1), (2, 1), (2, 0), (4, 1), (4, 0)])
def test_meta_shards_equal_hugging_face(tmp_path, shards, embed_dim, tied):
    weights = writers.random_llama(tied)
    config = writers.LLAMA_JSON | {"tie_word_embeddings": tied}
    hf = checkpoints.open_checkpoint(writers.write_hf(tmp_path / "hf", config, weights))
    meta_folder = tmp_path / "meta"
    writers.write_meta(meta_folder, writers.PARAMS_JSON, weights, shards, embed_dim)
    merged = checkpoints.open_checkpoint(meta_folder)
    assert (hf.layout, merged.layout) == ("hf", "meta")
    assert (hf.dialect, merged.dialect) == ("hf", "meta")
    assert merged.config == hf.config
    ours, theirs = (checkpoints.load_model(one, dialect="hf").state_dict() for one in (merged, hf))
    assert list(ours) == list(theirs) == list(merged.weights)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert torch.equal(merged.weights[name], theirs[name]), name


@pytest.mark.parametrize(("shards", "embed_dim"), [(1, 0), (2, 0), (2, 1)])
def test_a_written_out_head_that_equals_the_embedding_is_tied(tmp_path, shards, embed_dim):
    weights = writers.random_llama()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    folder = writers.write_meta(tmp_path, writers.PARAMS_JSON, weights, shards, embed_dim)
    tied = checkpoints.open_checkpoint(folder)
    assert tied.config.tied
    assert "unembed.weight" not in tied.weights
    assert checkpoints.load_model(tied).unembed is None
    weights["lm_head.weight"][-1, -1] += 1
    writers.write_meta(folder, writers.PARAMS_JSON, weights, shards, embed_dim)
    assert not checkpoints.open_checkpoint(folder).config.tied


@pytest.mark.parametrize(("shards", "embed_dim"), [(1, 1), (2, 0), (2, 1)])
@pytest.mark.parametrize("row", [0, 19, 20, 39])
def test_a_head_that_differs_in_one_row_is_not_tied(tmp_path, shards, embed_dim, row):
    weights = writers.random_llama()
    head = weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    head[row, 5] += 1
    folder = writers.write_meta(tmp_path, writers.PARAMS_JSON, weights, shards, embed_dim)
    opened = checkpoints.open_checkpoint(folder)
    assert not opened.config.tied
    assert torch.equal(opened.weights["unembed.weight"], head)


def test_sharded_safetensors_equal_one_file(tmp_path):
    weights = writers.random_llama()
    one, three = (
        checkpoints.open_checkpoint(
            writers.write_hf(tmp_path / str(files), writers.LLAMA_JSON, weights, files)
        )
        for files in (1, 3)
    )
    assert len(three.weights.paths) == 3
    assert all(torch.equal(one.weights[name], three.weights[name]) for name in one.weights)


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gpt2_parameters_are_views_of_what_is_stored(tmp_path, prefixed, tied):
    stored = writers.random_gpt2(tied)
    written = {
        name if prefixed else name.removeprefix("transformer."): tensor
        for name, tensor in stored.items()
    }
    for layer in range(2):  # buffers that old files hold
        name = f"{'transformer.' if prefixed else ''}h.{layer}.attn."
        written[name + "bias"] = torch.ones(1, 1, 16, 16).tril().bool()
        written[name + "masked_bias"] = torch.tensor(-1e4)
    config = writers.GPT2_JSON | {"tie_word_embeddings": tied}
    checkpoint = checkpoints.open_checkpoint(writers.write_hf(tmp_path, config, written))
    state = checkpoints.load_model(checkpoint).state_dict()
    assert state.keys() == checkpoint.weights.keys()
    joined = stored["transformer.h.1.attn.c_attn.weight"]
    for i, leaf in enumerate("qkv"):
        weight = state[f"layers.1.attn.{leaf}_proj.weight"]
        assert torch.equal(weight, joined[:, 24 * i : 24 * (i + 1)].T)
        bias = stored["transformer.h.1.attn.c_attn.bias"][24 * i : 24 * (i + 1)]
        assert torch.equal(state[f"layers.1.attn.{leaf}_proj.bias"], bias)
    assert state["layers.0.attn.q_proj.weight"].stride() == (1, 72)
    up = state["layers.0.mlp.up_proj.weight"]
    assert torch.equal(up, stored["transformer.h.0.mlp.c_fc.weight"].T)
    assert ("unembed.weight" in state) != tied


def greedy(model, count: int) -> list[int]:
    """The plain loop: one full pass per token, from token 1."""
    tokens = [1]
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), last=True)[0, -1].argmax()))
    return tokens


@pytest.mark.assets
def test_stories_tell_the_same_story_in_both_layouts(assets, monkeypatch):
    opened = {
        layout: checkpoints.open_checkpoint(assets / "stories260K" / layout)
        for layout in ("meta", "hf")
    }
    assert opened["meta"].config == opened["hf"].config
    models = {name: checkpoints.load_model(one, dialect="hf") for name, one in opened.items()}
    story = greedy(models["meta"], 200)
    assert story == greedy(models["hf"], 200)
    tokens = torch.tensor([story])
    with torch.no_grad():
        assert torch.equal(models["meta"](tokens), models["hf"](tokens))

    import sentencepiece

    words = sentencepiece.SentencePieceProcessor(
        model_file=str(assets / "stories260K" / "meta" / "tokenizer.model")
    )
    assert words.decode(story).startswith("Once upon a time, there was a little girl named Lily.")

    # The same test without un-permuting q and k must fail.
    monkeypatch.setattr(meta, "half_split", lambda weight, heads: weight)
    wrong = checkpoints.load_model(opened["meta"], dialect="hf")
    assert greedy(wrong, 200) != story
    with torch.no_grad():
        assert not torch.allclose(wrong(tokens), models["hf"](tokens), atol=0.1)


# As published in the params.json of each release; counts as the papers and model cards state them.
RELEASES = {
    "llama 1 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06,
         "vocab_size": -1},
        32000, False, 6_738_415_616, 11008, RopeConfig(), 2048,
    ),
    "llama 2 70B": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64,
         "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
        32000, False, 68_976_648_192, 28672, RopeConfig(), 4096,
    ),
    "llama 3 8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
         "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05,
         "rope_theta": 500000.0},
        128256, False, 8_030_261_248, 14336, RopeConfig(theta=500000.0), 8192,
    ),
    "llama 3.1 8B": (
        {"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 32,
         "n_kv_heads": 8, "n_layers": 32, "norm_eps": 1e-05, "rope_theta": 500000.0,
         "use_scaled_rope": True, "vocab_size": 128256},
        128256, False, 8_030_261_248, 14336,
        RopeConfig(theta=500000.0, type="llama3", factor=8.0, original_context=8192), 131072,
    ),
    "llama 3.2 1B": (
        {"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32,
         "n_kv_heads": 8, "n_layers": 16, "norm_eps": 1e-05, "rope_theta": 500000.0,
         "use_scaled_rope": True, "vocab_size": 128256},
        128256, True, 1_235_814_400, 8192,
        RopeConfig(theta=500000.0, type="llama3", factor=32.0, original_context=8192), 131072,
    ),
    "llama 3.2 3B": (
        {"dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256, "n_heads": 24,
         "n_kv_heads": 8, "n_layers": 28, "norm_eps": 1e-05, "rope_theta": 500000.0,
         "use_scaled_rope": True, "vocab_size": 128256},
        128256, True, 3_212_749_824, 8192,
        RopeConfig(theta=500000.0, type="llama3", factor=32.0, original_context=8192), 131072,
    ),
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_params_of_the_releases(release):
    params, vocabulary, tied, count, hidden, rope, context = RELEASES[release]
    shard = {"tok_embeddings.weight": Stored((vocabulary, params["dim"]), torch.bfloat16)}
    config = meta.read_params(params, "params.json", [shard], tied)
    assert config.family == "llama"
    assert (config.hidden_width, config.rope, config.context_length) == (hidden, rope, context)
    with torch.device("meta"):
        assert sum(each.numel() for each in build(config).parameters()) == count


def test_rows_of_heads_go_to_halves_and_back():
    stored = torch.arange(16.0)[:, None] * torch.ones(3)  # two heads of eight rows
    split = meta.half_split(stored, 2)
    rows = [0, 2, 4, 6, 1, 3, 5, 7]
    assert split[:, 1].tolist() == [*rows, *(8 + row for row in rows)]
    assert torch.equal(meta.interleaved(split, 2), stored)


def test_both_roundings_of_the_hidden_width_matter():
    # by hand: int(8 · 100 / 3) = 266, int(1.3 · 266) = 345 = 5 · 69. Without the inner int() 346
    # comes out, without the outer one 345.8, and both would go up to 350.
    assert meta.hidden_width(100, 5, 1.3) == 345
    assert meta.hidden_width(64, 4, None) == 172
    assert meta.hidden_width(100, 1, None) == 266
    params, vocabulary, *_ = RELEASES["llama 3 8B"]
    shard = {"tok_embeddings.weight": Stored((vocabulary, 4096), torch.bfloat16)}
    exact = params | {"multiple_of": 1, "ffn_dim_multiplier": None}
    assert meta.read_params(exact, "params.json", [shard], False).hidden_width == 10922


def test_detects_the_layout(tmp_path):
    weights = writers.random_llama()
    both = writers.write_meta(tmp_path / "both", writers.PARAMS_JSON, weights)
    writers.write_hf(both, writers.LLAMA_JSON, weights)
    assert checkpoints.open_checkpoint(both).layout == "hf"
    for file in ("config.json", "model.safetensors"):
        (both / file).unlink()
    assert checkpoints.open_checkpoint(Path(both)).layout == "meta"
    (both / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"params\.json is missing"):
        checkpoints.open_checkpoint(both)
