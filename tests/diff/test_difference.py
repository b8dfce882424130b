"""`pellucid.diff` with whatever a user has in hand, and one clear line for what it cannot take."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from peers import CONFIGS, rows
from tiny import GPT, LLAMA, random_model

from pellucid.diff import from_model
from pellucid.diff.two_models import Options, as_side, assert_same_model, diff
from pellucid.trace import Trace

PROMPT = rows(LLAMA, 9)


@pytest.fixture
def model():
    return random_model(LLAMA, torch.float32)


def trace_of(model, prompt=PROMPT, steps=0):
    return from_model(model, "m").observe(prompt, steps)


def numpy_file(path, seen):
    np.savez(path, **{name: tensor.numpy() for name, tensor in seen.items()})
    return path


# ── Sides ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_a_model_against_its_own_traces(config, tmp_path):
    model = random_model(config, torch.float32)
    prompt = rows(config, 9)
    seen = trace_of(model, prompt, steps=2)
    seen.save(tmp_path / "t.safetensors")
    numpy_file(tmp_path / "t.npz", seen)
    for other in (seen, tmp_path / "t.safetensors", str(tmp_path / "t.npz")):
        for pair in ((model, other), (other, model)):
            report = diff(*pair)
            assert report.verdict == "identical"
            assert "step.2.logits" in {row.name for row in report.tensors}
    assert diff(seen, tmp_path / "t.npz").verdict == "identical"


def test_a_trace_of_padded_rows(model):
    prompt = rows(LLAMA, 9, 4)
    assert diff(model, trace_of(model, prompt, steps=1), prompt).verdict == "identical"
    with pytest.raises(ValueError, match="is a trace of other tokens"):
        diff(model, trace_of(model, prompt), rows(LLAMA, 9, 5))


def test_our_own_model_run_otherwise(model):
    prompt = rows(LLAMA, 9, 4)
    assert diff(model, model, prompt, steps=1).verdict == "identical"
    assert diff(model, model, prompt, copies=4).verdict in ("identical", "within-rounding")
    fused = diff(model, model, prompt, fused=True, steps=1)
    assert fused.verdict == "within-rounding"
    assert "layers.0.attn.scores" in fused.not_observed
    narrow = diff(model, model, prompt, dtype_b="bfloat16")
    assert narrow.verdict == "explained"
    assert narrow.dtypes == (torch.float32, torch.bfloat16)
    spoken = diff(model, model, prompt, dtype_a="bfloat16", dtype_b="bfloat16", dialect_b="meta")
    assert spoken.verdict in ("within-rounding", "explained")
    assert not spoken.static


def test_labels_say_how_a_side_was_run(model):
    side = as_side(model, "B", Options(dtype="bfloat16", dialect="meta", fused=True, copies=2))
    assert side.label == "B (llama) (bfloat16, meta, fused, 2 copies)"
    assert side.dtype == torch.bfloat16 and side.dialect.name == "meta"


def test_a_broken_recording_is_found(model, tmp_path):
    seen = trace_of(model)
    seen["layers.1.attn.z"] = seen["layers.1.attn.z"].flip(1)
    report = diff(model, numpy_file(tmp_path / "t.npz", seen))
    assert report.verdict == "diverged"
    assert report.first.name == "layers.1.attn.z"


def test_a_foreign_recording_with_a_map_of_ones_own(model, tmp_path):
    seen = trace_of(model)
    foreign = {f"q_{n}": seen[f"layers.{n}.attn.q"][0].transpose(0, 1) for n in (0, 1)}
    foreign |= {f"x_{n}": seen[f"layers.{n}.attn_norm"][0] for n in (0, 1)} | {
        "extra": torch.ones(3)
    }
    path = numpy_file(tmp_path / "t.npz", foreign)
    (tmp_path / "mine.yaml").write_text(
        "q_{N}: layers.{N}.attn.q (T H D)\nx_{N}: layers.{N}.attn_norm (T C)\n"
    )
    report = diff(model, path, PROMPT, name_map=tmp_path / "mine.yaml")
    assert report.verdict == "identical"
    assert [row.name for row in report.tensors] == [
        f"layers.{n}.{leaf}" for n in (0, 1) for leaf in ("attn_norm", "attn.q")
    ]
    assert "1 tensors of" in report.note and "'extra'" in report.note.replace("extra", "'extra'")


def test_unknown_names_come_back_with_a_proposal(model, tmp_path):
    seen = trace_of(model)
    path = numpy_file(
        tmp_path / "t.npz",
        {f"nn{n}_q": seen[f"layers.{n}.attn.q"].transpose(1, 2).flatten(2) for n in (0, 1)},
    )
    with pytest.raises(ValueError) as error:
        diff(model, path, PROMPT)
    first, *lines = str(error.value).splitlines()
    assert "name_map='names.yaml'" in first
    assert error.value.proposal.splitlines() == lines
    assert lines == ["nn{N}_q: layers.{N}.attn.q (B T H*D)  # 100%"]
    (tmp_path / "names.yaml").write_text("\n".join(lines))
    assert diff(model, path, PROMPT, name_map=tmp_path / "names.yaml").verdict == "identical"
    with pytest.raises(ValueError, match="give the prompt it was made of, and a map is proposed"):
        diff(model, path)


def test_a_few_known_names_do_not_hide_that_most_are_not(model):
    seen = trace_of(model)
    few = Trace({f"nn_{name}": tensor for name, tensor in seen.items()} | {"embed": seen["embed"]})
    with pytest.raises(ValueError, match=f"of its {len(few)} names {len(seen)} are unknown"):
        diff(model, few, PROMPT)


@pytest.mark.assets
def test_text_through_the_tokenizers_of_two_folders(assets):
    hf, meta = (str(assets / "stories260K" / layout) for layout in ("hf", "meta"))
    report = diff(hf, meta, "Once upon a time", dialect_b="hf")
    assert report.verdict == "identical"
    assert_same_model(hf, meta, "Once upon a time")


@pytest.mark.assets
@pytest.mark.peers
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_folder_in_transformers(assets, dtype):
    pytest.importorskip("transformers")
    folder = str(assets / "stories260K" / "hf")
    report = diff(folder, f"hf:{folder}", "Once upon a time", dtype_a=dtype, dtype_b=dtype, steps=1)
    assert report.verdict == "identical", report.summary()
    assert report.not_observed == [
        f"{step}layers.{n}.attn.{leaf}"
        for step in ("", "step.1.")
        for n in range(5)
        for leaf in ("scores", "masked_scores")
    ]


# ── Trouble: one clear line, never a silent pass ─────────────────────────────────────────────────


def trouble(message, *arguments, **options):
    with pytest.raises(ValueError) as error:
        diff(*arguments, **options)
    assert message in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_two_models_of_different_shape(model):
    wide = random_model(CONFIGS["gqa"], torch.float32)
    trouble("width 36", model, wide, PROMPT)
    trouble("a diff needs two implementations", model, random_model(GPT, torch.float32), PROMPT)


def test_a_trace_of_a_model_of_another_shape(model):
    wide = trace_of(random_model(CONFIGS["gqa"], torch.float32))
    trouble("expected (B, T, C) = (1, 9, 36)", model, wide)
    deep = trace_of(model)
    deep["layers.2.attn_norm"] = deep["layers.1.attn_norm"]
    trouble("layers.2.attn_norm, which a llama of 2 layers does not have", model, deep)
    trouble("which a llama of 2 layers", model, trace_of(random_model(GPT, torch.float32)))


def test_a_trace_of_another_prompt(model):
    trouble("is a trace of other tokens", model, trace_of(model), rows(LLAMA, 8))
    trouble("is a trace of other tokens", trace_of(model), trace_of(model, rows(LLAMA, 8)))
    seen = trace_of(model)
    del seen["tokens"]
    trouble("is a recording of 9 tokens, the run is of 8", model, seen, rows(LLAMA, 8))
    trouble("give token ids", model, seen)


def test_missing_names_are_listed_and_nothing_at_all_is_trouble(model):
    seen = trace_of(model)
    for name in [name for name in seen if name != "tokens" and not name.endswith("attn_norm")]:
        del seen[name]
    report = diff(model, seen)
    assert report.verdict == "identical"
    assert "layers.0.attn.q" in report.not_observed and "logits" in report.not_observed
    trouble("gave no tensor with a known name", model, Trace({"tokens": seen["tokens"]}))
    trouble("the trace is empty", model, Trace())
    trouble("share no named tensor", trace_of(model, PROMPT), Trace(
        {"tokens": seen["tokens"], "step.1.logits": torch.ones(1, 1, 97)}))  # fmt: skip


def test_not_a_number_on_both_sides(model):
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
    trouble("both have NaN or infinity from layers.0.mlp_out on", model, model, PROMPT)
    with torch.no_grad():
        model.embed.weight.fill_(float("nan"))
    trouble("both have NaN or infinity from embed on", model, model, PROMPT)


def test_not_a_number_on_one_side_is_a_divergence(model):
    seen = trace_of(model)
    seen["layers.0.mlp.up"][0, 2, 3] = float("nan")
    report = diff(model, seen)
    assert report.verdict == "diverged"
    assert report.first.name == "layers.0.mlp.up"
    assert "not finite" in report.first.measure.note
    assert diff(trace_of(model), seen).verdict == "diverged"


def test_unequal_vocabularies(model):
    from dataclasses import replace

    small = random_model(replace(LLAMA, vocab_size=90), torch.float32)
    trouble("token 96 is outside the vocabulary 0 … 89", model, small, [[5, 96, 3]])
    report = diff(model, small, [[5, 6, 3]])
    assert report.verdict == "diverged"
    assert report.static[0].name == "embed.weight"
    assert "(97, 36)" in report.static[0].finding and "(90, 36)" in report.static[0].finding


def test_tokens_that_do_not_fit(model):
    trouble("token 97 is outside the vocabulary", model, model, [[1, 97]])
    trouble("has no tokens", model, model, [[]])
    gpt = random_model(GPT, torch.float32)
    trouble("positions for 64 tokens, the run has 66", gpt, gpt, rows(GPT, 63), steps=3)


def test_files_that_are_no_traces(model, tmp_path):
    for name in ("t.safetensors", "t.npz"):
        trouble("there is no file", model, tmp_path / name, PROMPT)
        (tmp_path / name).write_bytes(b"")
        trouble("not a readable", model, tmp_path / name, PROMPT)
        (tmp_path / name).write_bytes(b"PK\3\4 this is no archive")
        trouble("not a readable", model, tmp_path / name, PROMPT)
    np.savez(tmp_path / "e.npz")
    trouble("the trace is empty", model, tmp_path / "e.npz", PROMPT)
    np.savez(tmp_path / "o.npz", logits=np.array([object()], dtype=object))
    trouble("not a readable", model, tmp_path / "o.npz", PROMPT)
    np.savez(tmp_path / "b.npz", logits=np.zeros((1, 9, 97), dtype=np.uint16))
    trouble("logits is uint16: numpy has no bfloat16", model, tmp_path / "b.npz", PROMPT)


def test_weights_are_no_trace(model, tmp_path):
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="of its 21 names 21 are unknown, such as .embed.weight."):
        diff(model, tmp_path / "model.safetensors", PROMPT)


def test_options_that_do_not_apply(model):
    seen = trace_of(model)
    trouble("is a recording: dtype", model, seen, dtype_b="bfloat16")
    trouble("name_map says what", model, model, PROMPT, name_map="meta")
    trouble("copies is 0", model, model, PROMPT, copies=0)
    trouble("unknown dtype 'int3'", model, model, PROMPT, dtype_b="int3")
    trouble("unknown dialect", model, model, PROMPT, dialect_a="french")
    trouble("is a float: expected a model", model, 1.5, PROMPT)
    side = from_model(model, "by hand")
    trouble("by hand is taken as it is", model, side, PROMPT, fused=True)
    trouble("neither side has a tokenizer", model, model, "text")


def test_transformers_is_asked_for_by_name_where_it_is_absent(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    trouble("hf:here needs transformers, which is not installed", model, "hf:here", PROMPT)


@pytest.mark.peers
def test_what_transformers_cannot_load(model, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "params.json").write_text("{}")
    trouble("transformers reads Hugging Face's layout only", model, f"hf:{tmp_path}", PROMPT)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    trouble("transformers cannot load it", model, f"hf:{tmp_path}", PROMPT)


def test_assert_same_model(model):
    assert_same_model(model, model, PROMPT)
    other = random_model(LLAMA, torch.float32)
    with torch.no_grad():
        other.layers[1].attn.o_proj.weight[0] *= 2
    with pytest.raises(AssertionError, match="diverge first at layers.1.attn_out"):
        assert_same_model(model, other, PROMPT)
