"""Runs: what is computed again is what a trace sees; budget, edits, Python that repeats a run."""

from __future__ import annotations

import pytest
import torch
from exploring import language_model, repeated, tiny_run
from tiny import CONFIGS, FEATURES, GPT, LLAMA, random_tokens

from pellucid.explore import Edit, Gone, Runs
from pellucid.explore.manifest import describe_run

IDS = [5, 17, 3, 80, 41, 17, 3]
SAMPLES = ["gpt2", "llama-gqa"]
ALL = {**CONFIGS, **FEATURES}


@pytest.mark.parametrize("key", ALL)
def test_every_tensor_is_the_one_a_trace_sees(key):
    for dtype, dialect in ((torch.float32, "hf"), (torch.bfloat16, "meta")):
        run = tiny_run(ALL[key], dtype, dialect)
        seen = run.loaded.lm.trace(run.ids)
        assert list(run) == list(seen)
        for step in describe_run(run)["steps"]:
            name = step["name"]
            assert torch.equal(run[name], seen[name]), name
            assert list(seen[name].shape)[-len(step["shape"]) :] == step["shape"], name
            assert str(seen[name].dtype) == f"torch.{step['dtype']}", name
            words = step["title"] + step["formula"] + step["sentence"]
            assert step["title"] and "{" not in words and "padding" not in words, name
        assert set(run.reproduced.values()) == {0.0}


def test_a_small_budget_changes_no_value_and_is_kept():
    lm = language_model(GPT)
    for budget in (40_000, 15_000):  # bytes; the stream of a run is 3 × 9 × 36 × 4 = 3,888
        runs = Runs({"gpt": lm}, budget)
        made = [runs.run("gpt", random_tokens(GPT, 9, seed=seed).tolist()) for seed in range(2)]
        for run in made:
            seen = lm.trace(run.ids)
            for name in run:
                assert torch.equal(run[name], seen[name])
                assert runs.bytes <= budget
            head = run["layers.1.attn.pattern[2,1:5,:3]"]
            assert torch.equal(head, seen["layers.1.attn.pattern[2,1:5,:3]"])
    for seed in range(4):
        runs.run("gpt", random_tokens(GPT, 9, seed=seed).tolist())
    with pytest.raises(Gone, match=r"was dropped .* POST /api/runs .*\"ids\""):
        runs.get(made[0].id)
    with pytest.raises(ValueError, match="the budget is 0.00 GB: shorten the prompt"):
        Runs({"gpt": lm}, 1000).run("gpt", IDS)


EDITS = {
    "zero a head": [Edit(at="layers.1.attn.z[2]", do="zero")],
    "scale a token": [Edit(at="layers.0.mlp_out[3]", do="scale", value=-2.5)],
    "two at one": [
        Edit(at="layers.1.attn_out[:,4:9]", do="scale", value=3.0),
        Edit(at="layers.1.attn_out[2]", do="zero"),
    ],
    "stream and end": [
        Edit(at="layers.1.resid_pre[6,2]", do="scale", value=9.0),
        Edit(at="final_norm", do="scale", value=0.5),
        Edit(at="embed[0]", do="zero"),
    ],
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("key", SAMPLES)
def test_an_edited_run_is_the_edited_trace(key, name):
    config = CONFIGS[key]
    runs = Runs({"tiny": language_model(config)})
    run = runs.run("tiny", IDS, EDITS[name])
    clean = runs.run("tiny", IDS)
    seen = repeated(run.python(), run.loaded.lm)["seen"]
    assert {each: torch.equal(run[each], seen[each]) for each in run} == dict.fromkeys(run, True)
    assert not torch.equal(run["logits"], clean["logits"])
    assert run.id != clean.id
    assert clean.python().count("edit") == 0
    assert runs.run("tiny", IDS, EDITS[name]) is run


@pytest.mark.parametrize("key", SAMPLES)
def test_patching_and_steering(key):
    config = CONFIGS[key]
    lm = language_model(config)
    runs = Runs({"tiny": lm})
    other = runs.run("tiny", IDS[::-1], [Edit(at="layers.0.attn_out[1]", do="zero")])
    steered = Edit(
        at="layers.1.resid_mid", do="steer", value=1.5, direction="layers.0.resid_pre[2]"
    )
    patched = Edit(at="layers.1.attn.z[1,3:]", do="patch", source=other.id)
    run = runs.run("tiny", IDS, [steered, patched])
    added = lm.trace(IDS)["layers.0.resid_pre[2]"]

    def silence(x):
        x[:, 1] = 0
        return x

    taken = lm.trace(IDS[::-1], edit={"layers.0.attn_out": silence})["layers.1.attn.z"]

    def patch(x):
        x[:, 1, 3:] = taken[:, 1, 3:]
        return x

    by_hand = {"layers.1.resid_mid": lambda x: x + 1.5 * added, "layers.1.attn.z": patch}
    expected = lm.trace(IDS, edit=by_hand)
    seen = repeated(run.python(), lm)["seen"]
    for name in run:
        assert torch.equal(run[name], expected[name]), name
        assert torch.equal(run[name], seen[name]), name


def test_edits_that_cannot_be():
    runs = Runs({"tiny": language_model(LLAMA)})
    other = runs.run("tiny", IDS[:3])
    for edit, words in (
        (Edit(at="tokens", do="zero"), "no real numbers"),
        (Edit(at="layers.7.attn.z", do="zero"), "no tensor layers.7"),
        (Edit(at="layers.0.attn.z", do="patch", source=other.id), "name a part that both have"),
        (Edit(at="embed", do="steer", value=1.0, direction="layers.0.attn.z[0,0]"), "its shape is"),
    ):
        with pytest.raises(ValueError, match=words):
            runs.run("tiny", IDS, [edit])
    with pytest.raises(ValueError, match="expected one of zero, scale, patch, steer"):
        Edit(at="embed", do="melt")
    with pytest.raises(ValueError, match="patch needs the run"):
        Edit(at="embed", do="patch")
