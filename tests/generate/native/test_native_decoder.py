"""The C decoder against the model's own code: logits, tokens, batches, threads, recordings."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, random_model, random_tokens

import pellucid
from pellucid.generate import Sampling, fast, generate_tokens, native
from pellucid.generate.native import (
    NativeDecoder,
    instruction_sets,
    library,
    pages,
    settle,
    unsupported,
)
from pellucid.models import Cache
from pellucid.models.quantised import Format, quantise
from pellucid.trace import trace

# Largest difference of a logit, as a share of the largest logit.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 0.03, torch.float16: 0.004}
DECODABLE = [
    kind for kind in CONFIGS if not unsupported(random_model(CONFIGS[kind], torch.float32))
]


def logits_of_steps(made, model, tokens, first: int, threads: int) -> torch.Tensor:
    """Logits after each token from `first` on, (B, T - first, V)."""
    cache = Cache(model.config.n_layers)
    with torch.no_grad():
        model(tokens[:, :first], cache=cache)
    cache.reserve(tokens.shape[1])
    decoder = NativeDecoder(made, model, length=tokens.shape[1], threads=threads)
    steps = [decoder.step(column[:, None].tolist(), cache) for column in tokens[:, first:].T]
    decoder.close()
    return torch.stack(steps, dim=1)


def test_most_shapes_are_decoded():
    assert {"gpt2", "gpt2-book", "llama-mha", "llama-gqa", "llama-mqa"} <= set(DECODABLE)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dialect", ["hf", "meta"])
@pytest.mark.parametrize("kind", DECODABLE)
def test_logits_equal_the_models_own(kind, dialect, dtype):
    model = random_model(CONFIGS[kind], dtype, dialect)
    tokens = random_tokens(model.config, 3, 12)
    with torch.no_grad():
        expected = model(tokens)[:, 8:].float()
    for instructions in instruction_sets():
        for threads in (1, 2, 3):
            seen = logits_of_steps(library(instructions), model, tokens, 8, threads)
            off = (seen - expected).abs().max() / expected.abs().max()
            assert off <= TOLERANCE[dtype], (instructions, threads)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("kind", DECODABLE)
def test_a_quantised_model_equals_its_own_matrices(kind, bits):
    model = quantise(random_model(CONFIGS[kind], torch.float32), Format(bits=bits, group=32))
    tokens = random_tokens(model.config, 2, 10)
    with torch.no_grad():
        expected = model(tokens)[:, 7:]
    for instructions in instruction_sets():
        seen = logits_of_steps(library(instructions), model, tokens, 7, 2)
        off = (seen - expected).abs().max() / expected.abs().max()
        assert off <= TOLERANCE[torch.float32], instructions


@pytest.mark.parametrize("parts", [[11], [1, 10], [4, 4, 3], [1] * 11])
@pytest.mark.parametrize("kind", DECODABLE)
def test_a_prompt_in_pieces(kind, parts):
    """Also of a quantised model's prompt, rows of different length among them."""
    model = quantise(random_model(CONFIGS[kind], torch.float32), Format(bits=8, group=32))
    tokens, starts = random_tokens(model.config, 3, 11), [0, 6, 2]
    with torch.no_grad():
        expected = model(tokens, starts=torch.tensor(starts))[:, -1]
    cache = Cache(model.config.n_layers)
    steps = fast.FastSteps(model, 11, wanted=True)
    for piece in tokens.split(parts, dim=1):
        logits = steps.step(piece.tolist(), cache, starts)
    assert cache.length == 11
    off = (logits - expected).abs().max() / expected.abs().max()
    assert off <= TOLERANCE[torch.float32]


def parts_at_a_tie(lm, plain: str, fast_text: str) -> bool:
    """Whether two texts part where the model itself rates both tokens alike, within rounding.

    Which bfloat16 sums round the same way depends on the instructions that a processor has.
    """
    ids, others = (lm.tokenizer.encode(text, bos=True) for text in (plain, fast_text))
    same = next(i for i, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1])
    with torch.no_grad():
        row = lm.model(torch.tensor([ids[:same]]), last=True)[0, -1].float()
    gap = (row[ids[same]] - row[others[same]]).abs() / row.abs().max()
    return bool(gap <= TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("source", ["demo", "demo-gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demos_write_the_same(source, dtype):
    lm = pellucid.load(source, dtype=dtype)
    prompts = ["def parse(text):", "The module provides", "import"]
    for prompt in prompts:
        options = {"max_new_tokens": 60, "temperature": 0.0}
        fast_text = lm.generate(prompt, fast=True, **options)
        plain = lm.generate(prompt, fast=False, **options)
        assert fast_text == plain or (
            dtype == "bfloat16" and parts_at_a_tie(lm, prompt + plain, prompt + fast_text)
        )
    batch = {"max_new_tokens": 30, "seed": 3, "temperature": 0.7}
    together = lm.generate_batch(prompts, fast=True, **batch)
    if dtype == "float32":
        assert together == lm.generate_batch(prompts, fast=False, **batch)


@pytest.mark.assets
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_trained_llama_tells_the_same_story(assets, layout):
    lm = pellucid.load(assets / "stories260K" / layout)
    for prompt in ("Once upon a time", "Lily and Tom", ""):
        story = lm.generate(prompt, fast=True, max_new_tokens=200, temperature=0.0)
        assert story == lm.generate(prompt, fast=False, max_new_tokens=200, temperature=0.0)


def test_past_the_context_both_crop():
    model = random_model(CONFIGS["gpt2"], torch.float32)
    prompt = random_tokens(model.config, 1, 5)[0].tolist()
    count = model.config.context_length + 7
    greedy = {"sampling": Sampling(temperature=0.0), "max_new_tokens": count}
    runs = [list(generate_tokens(model, [prompt], fast=how, **greedy)) for how in (True, False)]
    assert runs[0] == runs[1]


def test_an_open_trace_sees_every_step():
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    prompt = random_tokens(model.config, 1, 5)[0].tolist()
    with trace(model) as seen:
        list(generate_tokens(model, [prompt], sampling=Sampling(temperature=0.0), max_new_tokens=3))
    assert "step.2.layers.0.attn.pattern" in seen


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_the_recording_holds_what_a_trace_holds(kind):
    model = random_model(CONFIGS[kind], torch.float32)
    rows = random_tokens(model.config, 2, 6).tolist()
    seen = fast.trace_fast(model, rows, 2)
    cache = Cache(model.config.n_layers)
    with trace(model, fused=True) as expected:
        model(torch.tensor(rows), cache=cache)
    for step in (1, 2):
        with trace(model, fused=True) as expected:
            model(seen[f"step.{step}.tokens"], cache=cache)
        unseen = {"mask", "rope.cos", "rope.sin", "pos_embed"}
        assert {f"step.{step}.{name}" for name in expected if name not in unseen} == {
            name for name in seen if name.startswith(f"step.{step}.")
        }
        for name in expected:
            if name not in unseen:
                torch.testing.assert_close(
                    seen[f"step.{step}.{name}"], expected[name], rtol=1e-4, atol=1e-5
                )


def test_a_diff_of_fast_against_plain_finds_rounding_only():
    for source in ("demo", "demo-gpt2"):
        assert pellucid.diff(source, source, steps=4, fast=True).verdict == "within-rounding"
    with pytest.raises(ValueError, match="ask for steps"):
        pellucid.diff("demo", "demo", fast=True)


def test_what_cannot_be_decoded_says_why():
    double = random_model(CONFIGS["llama-gqa"], torch.float64)
    assert "float64" in (unsupported(double) or "")
    prompt = [1, 2, 3]
    with pytest.raises(ValueError, match="the fast engine cannot run this model: .*float64"):
        generate_tokens(double, [prompt], sampling=Sampling(), max_new_tokens=2, fast=True)
    notebook = random_model(CONFIGS["llama-gqa"], torch.bfloat16, "notebook")
    assert "notebook dialect" in (unsupported(notebook) or "")
    hooked = random_model(CONFIGS["llama-gqa"], torch.float32)
    hooked.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert unsupported(hooked) == "layers.0.mlp has forward hooks"
    wrapped = random_model(CONFIGS["llama-gqa"], torch.float32)
    wrapped.layers[1].attn.q_proj = torch.nn.Sequential(wrapped.layers[1].attn.q_proj)
    assert unsupported(wrapped) == "layers.1.attn.q_proj is a Sequential"


def test_without_a_compiler_the_plain_path_writes_the_same(monkeypatch, tmp_path):
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    greedy = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 8}
    expected = list(generate_tokens(model, [[1, 2, 3]], fast=True, **greedy))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    native.library.cache_clear()
    native.building.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="not in C: .*no-such-compiler"):
            assert list(generate_tokens(model, [[1, 2, 3]], **greedy)) == expected
        with pytest.raises(
            ValueError, match="the fast engine is not available: .*no-such-compiler"
        ):
            generate_tokens(model, [[1, 2, 3]], fast=True, **greedy)
        monkeypatch.setenv("CC", "false")
        native.library.cache_clear()
        with pytest.raises(native.NotBuilt, match="could not compile"):
            library()
        assert not list(tmp_path.rglob("*.so"))
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
        native.building.cache_clear()


def test_threads_end_with_the_decoder():
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    made, before = library(), _threads_of_process()
    decoder = NativeDecoder(made, model, length=8, threads=3)
    assert _threads_of_process() == before + 2
    decoder.close()
    assert _threads_of_process() == before
    decoder = NativeDecoder(made, model, length=8, threads=3)
    del decoder
    gc.collect()
    assert _threads_of_process() == before


def _threads_of_process() -> int:
    """Threads of this process as the system counts them; Python's own do not come and go here."""
    try:
        with open("/proc/self/status") as status:
            return int(next(line.split()[1] for line in status if line.startswith("Threads")))
    except OSError:
        pytest.skip("not Linux")
    finally:
        assert threading.active_count() >= 1


def test_matrices_move_to_large_pages_without_a_difference(tmp_path):
    """The matrices of a mapped file move while it is decoded; the file's pages are let go."""
    config = replace(CONFIGS["llama-gqa"], width=1024, n_heads=16, hidden_width=4096, n_layers=1)
    config = replace(config, n_kv_heads=8, head_dim=64, vocab_size=3000)
    pellucid.checkpoints.save(
        tmp_path / "wide", config, random_model(config, torch.float32).state_dict()
    )
    checkpoint = pellucid.checkpoints.open_checkpoint(tmp_path / "wide")
    moved, still = (pellucid.checkpoints.load_model(checkpoint) for _ in range(2))
    tokens = random_tokens(config, 1, 40)
    before = {name: tensor.data_ptr() for name, tensor in moved.named_parameters()}
    logits, unsettled = [], []
    for model in (moved, still):
        cache = Cache(config.n_layers)
        with torch.no_grad():
            model(tokens[:, :4], cache=cache)
        cache.reserve(40)
        decoder = NativeDecoder(library(), model, length=40, threads=2)
        for column in tokens[0, 4:].tolist():
            logits.append(decoder.step([[column]], cache))
            if model is moved:
                unsettled.append(decoder.unsettled)
                assert decoder.settle() == decoder.unsettled
    half = len(logits) // 2
    assert torch.equal(torch.cat(logits[:half]), torch.cat(logits[half:]))
    changed = {
        name for name, tensor in moved.named_parameters() if tensor.data_ptr() != before[name]
    }
    assert {"embed.weight", "layers.0.mlp.down_proj.weight"} <= changed
    assert unsettled[0] > 40 << 20 > 0 == unsettled[-1]
    assert unsettled == sorted(unsettled, reverse=True)
    assert not any("norm" in name for name in changed)
    for name, tensor in moved.state_dict().items():
        assert torch.equal(tensor, still.state_dict()[name])


def test_all_matrices_of_a_model_move_at_once_when_asked():
    config = replace(CONFIGS["llama-gqa"], width=1024, n_heads=16, hidden_width=4096, n_layers=1)
    config = replace(config, n_kv_heads=8, head_dim=64)
    model = random_model(config, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settle(model)
    assert model.layers[0].mlp.down_proj.weight.data_ptr() % pages.PAGE == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_moving_pays_once_decoding_took_as_long_as_it_would_have_saved():
    account = pages.Account()
    assert not account.pays(400_000_000)
    account.decoded(0.9)
    assert not account.pays(400_000_000)  # 0.1 s at the rate that is assumed at first
    account.decoded(0.2)
    assert account.pays(400_000_000)
    account.moved(100_000_000, 1.0)  # slower than that: the rest would take 3 s more
    assert not account.pays(300_000_000)
    account.decoded(38.8)
    assert not account.pays(300_000_000)
    account.decoded(0.2)
    assert account.pays(300_000_000)
