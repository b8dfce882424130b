"""The benchmark of seeded faults: each is found at its tensor with its cause; no control fires."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid import graph, names, tokenizers
from pellucid.diff import from_model
from pellucid.diff.selftest.catalogue import CONTROLS, FAULTS, TOKENS
from pellucid.diff.selftest.engine import Engine, Port, inverse_frequencies
from pellucid.diff.selftest.fault import Fault
from pellucid.diff.selftest.in_features import FEATURES
from pellucid.diff.selftest.run import applies, run_benchmark, run_healthy
from pellucid.diff.selftest.subjects import (
    TEXT,
    Subject,
    from_language_model,
    random_features,
    random_gpt2,
    random_llama,
)
from pellucid.models import LlamaConfig, RopeConfig, build
from pellucid.models.rope import frequencies

SUBJECTS = {"llama": random_llama(), "gpt2": random_gpt2()}
FEATURED = {subject.name: subject for subject in random_features()}


def _cases(faults):
    """Every fault on every random model it applies to: `test_frozen_faults` runs them at once."""
    return [
        pytest.param(fault, subject, id=f"{fault.name}-{kind}", marks=pytest.mark.long)
        for fault in faults
        for kind, subject in SUBJECTS.items()
        if applies(fault, subject)
    ]


def _one_each(faults):
    """Every fault of a feature on one model that has it; the others are the slow test's."""
    found = []
    for fault in faults:
        fitting = [subject for subject in FEATURED.values() if applies(fault, subject)]
        assert fitting, f"{fault.name} applies to no model"
        subject = fitting[len(found) % len(fitting)]
        found.append(pytest.param(fault, subject, id=f"{fault.name}-{subject.name}"))
    return found


@pytest.mark.parametrize(
    ("fault", "subject"),
    [*_cases(fault for fault in FAULTS if fault not in FEATURES), *_one_each(FEATURES)],
)
def test_a_fault_in_float32_is_found_and_named(fault, subject):
    table = run_benchmark([subject], ["float32"], [fault], [])
    assert table.rows
    for row in table.rows:
        assert row.detected and row.located and row.named and row.static_right, row


@pytest.mark.parametrize(("control", "subject"), _cases(CONTROLS))
def test_a_control_does_not_fire(control, subject):
    table = run_benchmark([subject], ["float32"], [], [control])
    assert table.rows
    for row in table.rows:
        assert row.right, row


@pytest.mark.parametrize("subject", FEATURED.values(), ids=FEATURED)
def test_a_healthy_port_with_features_does_not_fire(subject):
    """In another order of summation, padded and decoding, whatever the features."""
    permuted = Fault(name="permuted", port=Port(summation="permuted"), rows="padded", steps=1)
    table = run_benchmark([subject], ["float32"], [], [permuted])
    assert table.rows
    for row in table.rows:
        assert row.right, row


@pytest.mark.long
@pytest.mark.parametrize("subject", FEATURED.values(), ids=FEATURED)
def test_every_fault_and_control_on_models_with_features(subject):
    table = run_benchmark([subject], ["float32"])
    assert [row for row in table.rows if not row.right] == []


def test_some_faults_in_bfloat16():
    """A sample that takes no minute; the whole matrix is the slow test below."""
    sample = ("RoPE theta, tables not seen", "one exponent bit flipped", "two layers swapped")
    faults = [fault for fault in FAULTS if fault.name in (*sample, "GELU by sigmoid")]
    table = run_benchmark(list(SUBJECTS.values()), ["bfloat16"], faults, CONTROLS[:3])
    assert len(table.rows) > 15
    for row in table.rows:
        assert row.right, row


@pytest.mark.long
def test_the_whole_matrix_reaches_its_goals():
    summary = run_benchmark(list(SUBJECTS.values())).summary()
    assert summary["float32 located"] == 1
    assert summary["bfloat16 detected"] >= 0.9 and summary["bfloat16 misplaced"] == 0
    assert min(summary["float32 cause right"], summary["bfloat16 cause right"]) >= 0.9
    assert summary["controls fired"] == 0


@pytest.mark.long
@pytest.mark.assets
def test_the_whole_matrix_on_a_trained_model(assets):
    import pellucid

    trained = from_language_model(pellucid.load(assets / "stories260K" / "hf"))
    summary = run_benchmark([trained]).summary()
    assert summary["float32 located"] == 1
    assert summary["bfloat16 detected"] >= 0.9 and summary["bfloat16 misplaced"] == 0
    assert min(summary["float32 cause right"], summary["bfloat16 cause right"]) >= 0.9
    assert summary["controls fired"] == 0


def test_healthy_ports_on_random_prompts_never_fire():
    table = run_healthy(list(SUBJECTS.values()), runs=4)
    assert len(table.rows) == 16
    assert [row for row in table.rows if not row.right] == []


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenizers.train_bpe([TEXT], 330, folder, ("<|begin|>", "<|end|>", "<|turn|>"))


@pytest.mark.parametrize("fault", TOKENS, ids=lambda fault: fault.name)
def test_a_fault_of_the_encoding_is_named(fault, tokenizer):
    config = replace(SUBJECTS["llama"].config, vocab_size=tokenizer.vocab_size)
    weights = dict(SUBJECTS["llama"].weights)
    for name in ("embed.weight", "unembed.weight"):
        weights[name] = weights[name].repeat(3, 1)[: config.vocab_size]
    subject = replace(SUBJECTS["llama"], config=config, weights=weights, tokenizer=tokenizer)
    (row,) = run_benchmark([subject], ["float32"], [fault], []).rows
    assert row.right and row.found_static == (fault.cause,), row


@pytest.mark.assets
def test_the_special_tokens_of_two_releases_of_llama_3(assets):
    """The names of 3.0 and 3.1 share ids only in part."""
    from pellucid.diff.sides.side import Side
    from pellucid.diff.static import token_findings
    from pellucid.tokenizers import llama3

    ranks = llama3.read_ranks(assets / "llama3" / "tokenizer.model")
    old, new = (llama3.from_ranks(ranks, version) for version in ("3.0", "3.1"))
    text = "a<|eom_id|>b"
    sides = [
        Side(label=name, dtype=torch.float32, bos_id=tok.bos_id, specials=tok.specials)
        for name, tok in (("old", old), ("new", new))
    ]
    found = token_findings(old.encode(text, specials=True), new.encode(text, specials=True), *sides)
    assert len(found) == 1 and "token 1" in found[0].finding


# ── The catalogue and the port ───────────────────────────────────────────────────────────────────


def test_the_catalogue_is_whole():
    assert len({fault.name for fault in FAULTS}) >= 110
    for subject in (*SUBJECTS.values(), *FEATURED.values()):
        order = {"tokens", *graph.expand(subject.config)}
        mine = [fault for fault in FAULTS if applies(fault, subject) or fault.encode]
        for fault in mine:
            assert names.without_step(fault.first_of(subject.config)) in order, fault.name
            assert fault.cause, fault.name
        assert len(mine) == len({fault.name for fault in mine}) >= 40
    assert all(not control.first for control in CONTROLS)


# Mistakes of ports that were missing once -> the faults that seed them. What shows between the
# projections alone is seeded a second time, as hooks on modules see it.
BETWEEN = (
    "GQA heads tiled",
    "q and k exchanged",
    "heads joined without moving them",
    "values rotated too",
    "rotate_half with tables for neighbours",
    "neighbours turned with tables for halves",
    "RoPE theta and scaling wrong together",
    "linear scaling in B alone",
    "yarn in B alone",
    "another original context",
    "another high_freq_factor",
    "sliding window in B alone",
    "cached keys rotated again",
    "last cached token lost",
    "values of layer 0 in the cache of all",
    "positions restart in decoding",
    "scores divided by the layer's number",
    "mask after the softmax",
    "hidden scores set to 0",
    "positions from 1",
    "GELU for SiLU",
    "SiLU for GELU",
)
OUTSIDE = (
    "k permuted with the query heads' count",
    "fused qkv cut head by head",
    "every third row of the joined q, k and v",
    "rows of gate and up taking turns",
    "columns of the output projection reordered",
    "embedding rows shifted by one",
    "left padding without positions, positions not seen",
    "logit cap before the head",
    "logit cap before the head, its product not seen",
)


def test_every_mistake_that_was_missing_is_seeded_also_as_hooks_see_it():
    """Those of training are in test_diff_training.py."""
    seeded = {fault.name: fault for fault in FAULTS}
    for name in (*BETWEEN, *OUTSIDE):
        assert name in seeded
    for name in BETWEEN:
        assert seeded[f"{name}, hooks only"].port.hooked


def test_a_narrow_model_of_one_layer_can_be_tested_too():
    """Faults that need a second layer, or a second group of columns, are left out."""
    config = LlamaConfig(
        vocab_size=60,
        context_length=64,
        width=20,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        head_dim=10,
        hidden_width=24,
    )
    random = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape, generator=random) / (4 if tensor.ndim > 1 else 1)
        for name, tensor in build(config).state_dict().items()
    }
    subject = Subject(name="narrow", config=config, weights=weights)
    fitting = [fault for fault in FAULTS if applies(fault, subject)]
    assert 40 < len(fitting) < len(FAULTS)
    assert not any("layers.1." in fault.first_of(config) for fault in fitting)
    for fault in fitting:
        if fault.weights or fault.with_weights:
            run_benchmark([subject], ["float32"], [fault], [])


@pytest.mark.parametrize("rows", ["short", "padded"])
@pytest.mark.parametrize("subject", [*SUBJECTS.values(), *FEATURED.values()], ids=lambda s: s.name)
def test_the_healthy_port_is_the_model(subject, rows):
    """Two programs written apart, every named tensor, with a cache and with padding."""
    model = build(subject.config)
    model.load_state_dict(subject.weights)
    prompt = subject.rows(rows)
    ours = from_model(model.eval(), "ours").observe(prompt, 2)
    port = Engine(subject.config, subject.weights, torch.float32, Port()).run(prompt, 2)
    assert set(port) == set(ours)
    padding = max(map(len, prompt)) - min(map(len, prompt))
    for name in ours:
        mine, theirs = ours[name], port[name]
        if leaf_is_low(name):
            mine, theirs = mine.clamp(min=-1e4), theirs.clamp(min=-1e4)
        if not padding:
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4, msg=name)
        elif name.endswith("logits"):
            torch.testing.assert_close(theirs[:, -1], mine[:, -1], rtol=1e-4, atol=1e-4, msg=name)


def leaf_is_low(name: str) -> bool:
    """Whether a tensor holds switched-off scores, for which every program has its own number."""
    return name.endswith("masked_scores")


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["default", "linear", "llama3", "yarn"]),
    factor=st.sampled_from([1.0, 2.0, 8.0, 32.0]),
    original=st.sampled_from([32, 2048, 8192]),
    theta=st.sampled_from([1e4, 5e5]),
)
def test_the_ports_frequencies_are_the_papers(kind, factor, original, theta):
    rope = RopeConfig(theta=theta, type=kind, factor=factor, original_context=original)
    torch.testing.assert_close(
        inverse_frequencies(rope, 16), frequencies(rope, 16), rtol=1e-5, atol=0
    )
