"""A model whose weights come from the disk as they are needed is the loaded model, bit for bit."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import checkpoint_writers as writers
import pytest
import torch

import pellucid
from pellucid import checkpoints
from pellucid.checkpoints import streaming
from pellucid.checkpoints.weights import Weights
from pellucid.generate import Sampling, generate_tokens
from pellucid.models import LlamaConfig, build, initialise
from pellucid.models.quantised import Format, quantise
from pellucid.trace import trace

VOCABULARY = 700  # three parts of the head, the last of them short
KINDS = ("hf", "hf-tied", "gpt2", "gpt2-head", "meta", "meta-2-wide", "meta-2", "meta-2-tied")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """The head in parts of 256 rows, and a vocabulary that needs several."""
    monkeypatch.setattr(streaming, "PART_BYTES", 1)
    monkeypatch.setattr(writers, "VOCABULARY", VOCABULARY)


@pytest.fixture
def folder(request, tmp_path) -> Path:
    """A tiny model: both families, both layouts, one file and several, head tied and not."""
    kind, tied = request.param, request.param.endswith("tied")
    if kind.startswith("gpt2"):
        config = writers.GPT2_JSON | {"tie_word_embeddings": kind == "gpt2"}
        return writers.write_hf(tmp_path, config, writers.random_gpt2(tied=kind == "gpt2"))
    weights = writers.random_llama(tied)
    if kind.startswith("hf"):
        config = writers.LLAMA_JSON | {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
        return writers.write_hf(tmp_path, config, weights, files=1 if tied else 3)
    params = writers.PARAMS_JSON | {"vocab_size": VOCABULARY}
    embed_dim = 1 if kind.endswith("wide") else 0
    return writers.write_meta(tmp_path, params, weights, 2 if "2" in kind else 1, embed_dim)


of_each_kind = pytest.mark.parametrize("folder", KINDS, indirect=True)
of_one_kind = pytest.mark.parametrize("folder", ["hf"], indirect=True)


def both(folder: Path, **options):
    """The loaded model and the streamed one."""
    checkpoint = checkpoints.open_checkpoint(folder)
    return checkpoints.load_model(checkpoint, **options), checkpoints.stream_model(
        checkpoint, **options
    )


def some_tokens(model, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, 7), generator=generator)


@of_each_kind
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "converted"])
def test_logits_are_those_of_the_loaded_model(folder, dtype):
    loaded, streamed = both(folder, dtype=dtype)
    tokens = some_tokens(loaded)
    with torch.no_grad():
        expected = loaded(tokens)
        for _ in range(2):  # the second pass finds its first block read ahead
            assert torch.equal(streamed(tokens), expected)
    assert streamed(tokens).requires_grad is False


@of_one_kind
def test_logits_in_float64_agree_to_rounding(folder):
    loaded, streamed = both(folder, dtype=torch.float64)
    tokens = some_tokens(loaded)
    torch.testing.assert_close(streamed(tokens), loaded(tokens).detach(), rtol=1e-12, atol=1e-12)


@of_each_kind
def test_text_with_the_cache_is_the_same(folder):
    loaded, streamed = both(folder)
    prompts = [some_tokens(loaded)[0].tolist(), [3, 1]]
    texts = [
        list(generate_tokens(model, prompts, sampling=Sampling(), max_new_tokens=6, seed=1))
        for model in (loaded, streamed)
    ]
    assert texts[0] == texts[1]


@of_each_kind
def test_a_trace_sees_the_same_under_the_same_names(folder):
    loaded, streamed = both(folder)
    tokens = some_tokens(loaded)
    traces = []
    for model in (loaded, streamed):
        with trace(model, edit={"layers.0.attn.z": lambda z: z.flip(1)}) as seen:
            model(tokens)
        traces.append(seen)
    assert list(traces[0]) == list(traces[1])
    assert all(torch.equal(traces[0][name], traces[1][name]) for name in traces[0])


def filled(model) -> set[str]:
    """Parameters that have values now, of those that are matrices in a block."""
    return {
        name
        for name, parameter in model.named_parameters()
        if name.startswith("layers.") and parameter.ndim > 1 and not parameter.is_meta
    }


@of_each_kind
def test_one_block_is_there_at_a_time(folder):
    loaded, streamed = both(folder)
    there = []
    names = ("embed", "layers.0.attn.z", "layers.0.resid_post", "layers.1.mlp_out", "final_norm")
    looks = dict.fromkeys(names, lambda value: there.append(filled(streamed)) or value)
    with trace(streamed, only=(), edit=looks):
        streamed(some_tokens(streamed))
    before, inside, still, second, after = there
    assert before == after == set()
    assert inside == still != set()
    assert {name.split(".")[1] for name in inside} == {"0"}
    assert {name.split(".")[1] for name in second} == {"1"}
    assert [checkpoints.is_streamed(model) for model in (loaded, streamed)] == [False, True]
    assert streamed.norm.weight.device.type == "cpu"


@of_each_kind
def test_neither_embedding_nor_head_is_ever_read_whole(folder, monkeypatch):
    _, streamed = both(folder)
    whole, parts = [], []
    plain_whole, plain_rows = Weights.__getitem__, Weights.rows
    monkeypatch.setattr(
        Weights, "__getitem__", lambda self, name: whole.append(name) or plain_whole(self, name)
    )
    monkeypatch.setattr(
        Weights, "rows", lambda self, name, rows: parts.append(rows) or plain_rows(self, name, rows)
    )
    streamed(some_tokens(streamed))
    assert not {"embed.weight", "unembed.weight"} & set(whole)
    assert len(whole) == len(set(whole)), "each matrix is read once in a pass"
    vocabulary = range(streamed.config.vocab_size)
    assert [row for rows in parts for row in vocabulary[rows]] == list(vocabulary)
    assert all(len(vocabulary[rows]) <= 256 for rows in parts)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_matrix_of_another_dtype_does_not_reach_its_neighbours(layer, tmp_path):
    weights = writers.random_llama()
    name = f"model.layers.{layer}.self_attn.q_proj.weight"
    weights[name] = weights[name].bfloat16()
    config = writers.LLAMA_JSON | {"vocab_size": VOCABULARY}
    loaded, streamed = both(writers.write_hf(tmp_path, config, weights))
    tokens = some_tokens(loaded)
    for _ in range(3):
        assert torch.equal(streamed(tokens), loaded(tokens))


@of_one_kind
def test_what_comes_next_is_read_ahead(folder, monkeypatch):
    _, streamed = both(folder)
    read, forgotten = [], []
    plain_read, plain_forget = Weights.read_pages, Weights.forget
    monkeypatch.setattr(
        Weights,
        "read_pages",
        lambda self, name, rows=None: read.append(name) or plain_read(self, name, rows),
    )
    monkeypatch.setattr(
        Weights,
        "forget",
        lambda self, name, rows=None: forgotten.append(name) or plain_forget(self, name, rows),
    )
    seen = {}

    def look(value):
        streamed.unembed.ahead._ahead[1].result()  # the reader has done what it was asked to
        seen["read"], seen["forgotten"] = set(read), set(forgotten)
        return value

    with trace(streamed, only=(), edit={"layers.0.mlp_out": look}):
        streamed(some_tokens(streamed))
    assert any(name.startswith("layers.1.") for name in seen["read"])
    assert seen["forgotten"] == set()
    blocks = {name for name in read if name.startswith("layers.")}
    assert set(forgotten) == blocks | {"unembed.weight"}


@of_one_kind
def test_kept_blocks_stay(folder):
    checkpoint = checkpoints.open_checkpoint(folder)
    loaded = checkpoints.load_model(checkpoint)
    tokens = some_tokens(loaded)
    for keep in (1, 2):
        streamed = checkpoints.stream_model(checkpoint, keep=keep)
        assert {name.split(".")[1] for name in filled(streamed)} == set("01"[:keep])
        assert checkpoints.is_streamed(streamed)
        assert torch.equal(streamed(tokens), loaded(tokens))
        assert torch.equal(streamed(tokens), loaded(tokens))
    with pytest.raises(ValueError, match="keep 3: expected 0 to 2, the number of blocks"):
        checkpoints.stream_model(checkpoint, keep=3)


@of_one_kind
def test_a_pass_that_fails_leaves_nothing_behind(folder):
    loaded, streamed = both(folder)
    tokens = some_tokens(loaded)

    def fail(value):
        raise ZeroDivisionError

    for place in ("layers.0.attn.z", "layers.1.mlp_out"):
        with pytest.raises(ZeroDivisionError), trace(streamed, edit={place: fail}):
            streamed(tokens)
        assert filled(streamed) == set()
        assert torch.equal(streamed(tokens), loaded(tokens))


@of_one_kind
def test_several_threads_may_use_it_at_once(folder):
    loaded, streamed = both(folder, dtype=torch.bfloat16)
    inputs = [some_tokens(loaded, rows) for rows in (1, 2, 3, 4)] * 3
    expected = [loaded(tokens) for tokens in inputs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(streamed, inputs))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@of_each_kind
def test_rows_are_those_of_the_whole(folder):
    weights = checkpoints.open_checkpoint(folder).weights
    index = torch.tensor([[0, 29, 3], [3, 3, 17]])
    for name in {"embed.weight", "unembed.weight"} & set(weights):
        whole = weights[name]
        assert torch.equal(weights.look_up(name, index), whole[index])
        for rows in (slice(0, 5), slice(3, len(whole)), slice(len(whole) - 7, None), slice(None)):
            weights.read_pages(name, rows)
            assert torch.equal(weights.rows(name, rows), whole[rows])
            weights.forget(name, rows)
        last = torch.arange(len(whole))
        assert torch.equal(weights.look_up(name, last), whole)


@of_each_kind
def test_weights_in_order_are_the_weights(folder):
    weights = checkpoints.open_checkpoint(folder).weights
    ahead = checkpoints.WeightsInOrder(weights)
    assert list(ahead) == list(weights)
    assert len(ahead) == len(weights)
    assert "embed.weight" in ahead
    assert "nothing" not in ahead
    for name in [*weights, "layers.0.mlp.down_proj.weight", "embed.weight"]:  # and back again
        assert torch.equal(ahead[name], weights[name])
        assert ahead.dtype(name) == weights.dtype(name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_memory_holds_two_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PART_BYTES", 1 << 20)
    config = LlamaConfig(
        vocab_size=4096, width=256, n_layers=12, n_heads=4, n_kv_heads=4, head_dim=64,
        hidden_width=512, context_length=64,
    )  # fmt: skip
    model = build(config)
    initialise(model, torch.Generator().manual_seed(0))
    checkpoints.save(tmp_path / "model", config, model.state_dict())
    checkpoint = checkpoints.open_checkpoint(tmp_path / "model")
    streamed = checkpoints.stream_model(checkpoint)
    block = 4 * (4 * 256 * 256 + 3 * 256 * 512)  # 2.6 MB of 32 MB in blocks, beside 8 MB of ends
    resident = []

    def look(value):
        resident.append(mapped_bytes(tmp_path))
        return value

    places = [f"layers.{layer}.mlp_out" for layer in range(12)] + ["logits"]
    with trace(streamed, only=(), edit=dict.fromkeys(places, look)):
        streamed(torch.tensor([[5, 9, 4000]]))
    assert max(resident) < 2.6 * block, [round(each / block, 2) for each in resident]
    assert max(resident) > 1.5 * block, "the next block was read ahead"


def mapped_bytes(folder: Path) -> int:
    """Bytes in memory of the files below `folder` that this process has mapped."""
    kilobytes, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            kilobytes += int(line.split()[1])
    return 1024 * kilobytes


@pytest.mark.parametrize("source", ["demo", "demo-gpt2"])
def test_the_shipped_models_speak_and_walk_the_same(source):
    loaded, streamed = (pellucid.load(source, stream=stream) for stream in (False, True))
    assert (streamed.dtype, streamed.device) == (loaded.dtype, loaded.device)
    only = ["layers.1.attn.pattern", "logits"]
    one, other = (lm.trace("import os", only, generate=2) for lm in (loaded, streamed))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for step, expected in zip(streamed.walk("if a"), loaded.walk("if a"), strict=True):
        assert step.address == expected.address
        if isinstance(expected.value, torch.Tensor):
            assert torch.equal(step.value, expected.value)
        else:
            assert step.value == expected.value
    greedy = {"max_new_tokens": 8, "temperature": 0.0}  # last: C lays GPT-2's matrices out anew
    assert streamed.generate("import", **greedy) == loaded.generate("import", **greedy)


def test_what_streamed_weights_cannot_do():
    lm = pellucid.load("demo", stream=True)
    with pytest.raises(ValueError, match="gradients need the weights in memory"):
        lm.trace("a", gradients=lambda logits: logits.sum())
    with pytest.raises(ValueError, match="has none to copy"):
        deepcopy(lm)
    with pytest.raises(ValueError, match="a diff needs the weights in memory"):
        pellucid.diff(lm, pellucid.load("demo"), prompt="a")


def test_quantised_weights_walk_in_order_and_are_not_streamed(tmp_path):
    config = LlamaConfig(
        vocab_size=64, width=64, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=32,
        hidden_width=96, context_length=16,
    )  # fmt: skip
    model = build(config)
    initialise(model, torch.Generator().manual_seed(0))
    how = Format(bits=8)
    checkpoints.save_quantised(tmp_path / "small", quantise(model, how), how)
    checkpoint = checkpoints.open_checkpoint(tmp_path / "small")
    ahead = checkpoints.WeightsInOrder(checkpoint.weights)
    assert all(torch.equal(ahead[name], checkpoint.weights[name]) for name in ahead)
    with pytest.raises(ValueError, match="quantised weights are not streamed"):
        checkpoints.stream_model(checkpoint)
