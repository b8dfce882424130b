"""What leads to a prediction, and what changes it: against formulas and loops written out here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from exploring import language_model, repeated, tiny_run
from tiny import CONFIGS, FEATURES, GPT, LLAMA

import pellucid
from pellucid.explore import Edit, Runs, attribution
from pellucid.explore.against import against, difference
from pellucid.explore.cards import card
from pellucid.explore.generation import generation
from pellucid.explore.recording import encoded, record
from pellucid.explore.reduce import reduce_tiles, statistics
from pellucid.explore.sweeps import Sweep, sweep
from pellucid.generate import Sampling

IDS = [5, 17, 3, 80, 41, 17, 3]
ALL = {**CONFIGS, **FEATURES}


def last(steps):
    """The last thing that an iterator gives."""
    *_, answer = steps
    return answer


@pytest.mark.parametrize("key", ALL)
def test_the_parts_of_a_logit_add_up(key):
    config = ALL[key]
    run = tiny_run(config, torch.float64)
    found = last(attribution.contributions(run, 4, 7))
    assert found["sum"] == pytest.approx(found["logit"], rel=1e-9)
    names = [part["name"] for part in found["parts"]]
    assert len(names) == len(set(names))
    assert sum(".head." in name for name in names) == config.n_layers * config.n_heads
    logits = run.loaded.lm.trace(run.ids)["logits[4]"]
    expected = float(logits[7])
    if config.logit_cap:
        assert found["before"]
        expected = config.logit_cap * math.atanh(expected / config.logit_cap)
    assert found["logit"] == pytest.approx(expected, rel=1e-9)


def test_the_parts_of_an_edited_run_add_up():
    runs = Runs({"tiny": language_model(LLAMA, torch.float64)})
    edits = [
        Edit(at="layers.0.resid_mid[4]", do="scale", value=2.0),
        Edit(at="layers.1.attn_out[4]", do="zero"),
    ]
    found = last(attribution.contributions(runs.run("tiny", IDS, edits), 4, 7))
    assert found["sum"] == pytest.approx(found["logit"], rel=1e-9)
    assert {"layers.0.edits", "layers.1.edits"} <= {part["name"] for part in found["parts"]}


def test_a_heads_part_is_its_product_alone():
    run = tiny_run(GPT, torch.float64)
    lm, model = run.loaded.lm, run.loaded.model
    seen = lm.trace(run.ids)
    found = {p["name"]: p["value"] for p in last(attribution.contributions(run, 3, 11))["parts"]}
    x = seen["layers.1.resid_post"][0, 3]
    z = torch.zeros_like(seen["layers.1.attn.z"][0, :, 3])
    z[2] = seen["layers.1.attn.z"][0, 2, 3]
    model.requires_grad_(False)
    added = model.layers[1].attn.o_proj.weight @ z.flatten()
    added = (added - added.mean()) / (x.var(correction=0) + model.config.norm_eps).sqrt()
    expected = float((added * model.norm.weight) @ model.embed.weight[11])
    assert found["layers.1.attn.head.2"] == pytest.approx(expected, rel=1e-9)


def test_the_lens_ends_with_the_models_own_output():
    run = tiny_run(LLAMA)
    seen, model = run.loaded.lm.trace(run.ids), run.loaded.model
    found = last(attribution.lens(run, 3))
    assert found["layers"] == ["layers.0.resid_pre", "layers.1.resid_pre", "layers.1.resid_post"]
    for row, cell in enumerate(found["cells"][-1]):
        logits = seen[f"logits[{row}]"]
        assert [entry["id"] for entry in cell["top"]] == logits.topk(3).indices.tolist()
        assert cell["top"][0]["probability"] == float(logits.softmax(-1).max())
    with torch.no_grad():
        middle = model.logits(model.norm(seen["layers.1.resid_pre"]))[0, 5]
    assert found["cells"][1][5]["top"][0]["id"] == int(middle.argmax())
    part = last(attribution.lens(run, 1, 2, 4))
    assert (part["first"], len(part["cells"][0])) == (2, 2)
    with pytest.raises(IndexError, match="this run has 9"):
        last(attribution.lens(run, 1, 4, 40))


@pytest.mark.parametrize("cells", [1, 9 * 300 * 2, 1 << 24])
def test_the_lens_comes_in_stretches_from_the_top_with_the_same_guesses(monkeypatch, cells):
    monkeypatch.setattr(attribution, "LENS_CELLS", cells)
    run = tiny_run(LLAMA)
    whole, below, found = last(attribution.lens(run, 2)), len(run.stream), []
    tops = []
    while below:
        part = last(attribution.lens(run, 2, at=attribution.lens_below(run, below)))
        tops.append(len(part["cells"]))
        found, below = part["cells"] + found, part["from"]
    assert tops[0] == 1, "the model's own output first"
    assert len(tops) <= 3 and (cells == 1) == (len(tops) == 3)
    for rows in zip(whole["cells"], found, strict=True):
        for one, other in zip(*rows, strict=True):
            assert [e["id"] for e in one["top"]] == [e["id"] for e in other["top"]]
            assert one["top"][0]["probability"] == pytest.approx(other["top"][0]["probability"])
    with pytest.raises(IndexError, match="0 to 3"):
        last(attribution.lens(run, 2, at=range(2, 5)))


def test_norms_and_heads_by_their_formulas():
    runs = Runs({"tiny": language_model(GPT)})
    run = runs.run("tiny", IDS)
    seen = run.loaded.lm.trace(IDS)
    norms = attribution.norms(run)
    assert norms["values"][1] == pytest.approx(seen["layers.1.resid_pre"][0].norm(dim=1).tolist())
    found = attribution.heads(run, 1)["heads"][2]
    pattern = seen["layers.1.attn.pattern"][0, 2].double().numpy()
    assert found["previous"] == pytest.approx(np.mean([pattern[t, t - 1] for t in range(1, 7)]))
    assert found["first"] == pytest.approx(pattern[:, 0].mean())
    entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in pattern]
    assert found["entropy"] == pytest.approx(np.mean(entropy))
    # 17 stands at 1 and 5, 3 at 2 and 6: query 5 looks at key 2, query 6 at key 3.
    assert found["induction"] == pytest.approx((pattern[5, 2] + pattern[6, 3]) / 2)
    z = seen["layers.1.attn.z"][0, 2]
    added = z @ run.loaded.model.layers[1].attn.o_proj.weight[:, 18:27].T
    assert found["output_norm"] == pytest.approx(float(added.norm(dim=1).mean().detach()), rel=1e-5)
    assert attribution.heads(runs.run("tiny", [1, 2, 3]), 0)["heads"][0]["induction"] is None


@pytest.mark.parametrize("key", ["llama-gqa", "partial yarn", "second RoPE", "NoPE layers"])
def test_pairs_of_rope_turn_by_their_angle(key):
    run = tiny_run(ALL[key], torch.float64)
    found = attribution.rope(run, 0, 1, "k", 7)
    rope = getattr(ALL[key], found["rope"])
    for pair in found["pairs"]:
        x, y = (rope.magnitude * value for value in pair["before"])
        c, s = math.cos(pair["angle"]), math.sin(pair["angle"])
        assert pair["after"] == pytest.approx([x * c - y * s, y * c + x * s])
        assert pair["angle"] == pytest.approx(7 * 2 * math.pi / pair["wavelength"])
    if key == "NoPE layers":
        with pytest.raises(KeyError, match="has no RoPE"):
            attribution.rope(run, 1, 0, "q", 0)


def test_a_run_against_an_edited_one():
    runs = Runs({"tiny": language_model(LLAMA)})
    clean = runs.run("tiny", IDS)
    edited = runs.run("tiny", IDS, [Edit(at="layers.1.attn.z[2]", do="zero")])
    found = last(against(clean, edited))
    assert [row["name"] for row in found["rows"]] == list(clean)
    assert found["first"] == found["first_diverged"] == "layers.1.attn.z"
    verdicts = {row["name"]: row["verdict"] for row in found["rows"]}
    assert {name for name, verdict in verdicts.items() if verdict == "diverged"} == {
        "layers.1.attn.z"
    }
    by_name = {row["name"]: row for row in found["rows"]}
    apart = (clean["logits"] - edited["logits"]).abs().max()
    assert by_name["logits"]["largest"] == pytest.approx(float(apart))
    assert by_name["layers.1.attn.pattern"]["identical"]
    shares = clean.logits(-1).softmax(-1), edited.logits(-1).softmax(-1)
    for row in found["probabilities"]:
        assert row["before"] == pytest.approx(float(shares[0][row["id"]]))
        assert row["after"] == pytest.approx(float(shares[1][row["id"]]))
    shorter = last(against(clean, runs.run("tiny", IDS[:4])))
    assert shorter["rows"][0]["largest"] is None


SWEEPS = {
    "heads": {"what": "ablate", "over": "layer,head", "of": "z"},
    "positions of heads": {"what": "ablate", "over": "layer,position", "of": "attn.v"},
    "positions": {"what": "ablate", "over": "layer,position", "of": "mlp_out"},
    "patched heads": {"what": "patch", "over": "layer,head", "of": "z"},
    "patched stream": {"what": "patch", "over": "layer,position", "of": "resid_pre"},
}


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_sweep_is_the_loop_by_hand(config, name):
    lm = language_model(config)
    runs = Runs({"tiny": lm})
    run, other = runs.run("tiny", IDS), runs.run("tiny", IDS[::-1])
    patched = SWEEPS[name]["what"] == "patch"
    wanted = Sweep(**SWEEPS[name], token=9, row=5, source=other if patched else None)
    found = last(sweep(run, wanted))
    theirs = lm.trace(IDS[::-1])
    leaf = "attn.z" if wanted.of == "z" else wanted.of
    heads = wanted.over == "layer,head"
    assert len(found["columns"]) == (4 if heads else 7)
    for layer, row in enumerate(found["values"]):
        for place, value in enumerate(row):
            taken = theirs[f"layers.{layer}.{leaf}"] if patched else None

            def change(x, place=place, taken=taken):
                here = (0, place) if heads or x.ndim == 3 else (0, slice(None), place)
                x[here] = 0 if taken is None else taken[here]
                return x

            seen = lm.trace(IDS, edit={f"layers.{layer}.{leaf}": change})
            assert value == pytest.approx(float(seen["logits"][0, 5, 9]), rel=1e-5, abs=1e-5)
    assert found["clean"] == pytest.approx(float(lm.trace(IDS)["logits"][0, 5, 9]), rel=1e-5)
    again = repeated(found["python"], lm)["values"]
    assert np.allclose(again, found["values"], rtol=1e-5, atol=1e-5)


def test_sweeps_that_cannot_be():
    runs = Runs({"tiny": language_model(LLAMA)})
    run = runs.run("tiny", IDS)
    for more, words in (
        ({"of": "mlp_out"}, "has no heads"),
        ({"of": "attn.pattern"}, "not swept"),
        ({"of": "attn.nothing"}, "expected a tensor of a layer"),
        ({"what": "patch"}, "patch needs the run"),
        ({"what": "patch", "source": runs.run("tiny", IDS[:2])}, "the same model and 7 tokens"),
        ({"token": 97}, "the vocabulary is 0 to 96"),
    ):
        stated = {"what": "ablate", "over": "layer,head", "of": "z", "token": 1, "row": 2, **more}
        with pytest.raises(ValueError, match=words):
            last(sweep(run, Sweep(**stated)))


CARDS = [("gpt2", torch.float32), ("llama-gqa", torch.bfloat16), ("like gemma3", torch.float32),
         ("like phi", torch.bfloat16), ("sinks", torch.float32)]  # fmt: skip


@pytest.mark.parametrize("key, dtype", CARDS)
def test_every_card_has_its_code_and_its_checks_hold(key, dtype):
    run = tiny_run(ALL[key], dtype)
    for name in run:
        if name.startswith(("layers.0", "layers.2")):
            continue
        found = card(run, name, 3)
        assert found["title"], name
        assert found["source"]["file"].startswith("pellucid/models/"), name
        assert found["code"] or name in ("tokens", "positions") or "resid_pre" in name, name
        assert all(check["holds"] for check in found["checks"]), (name, found["checks"])
        whats = [check["what"] for check in found["checks"]]
        assert any(what.startswith("the walk") for what in whats), name


def test_a_card_tells_a_wrong_number_from_a_right_one():
    runs = Runs({"tiny": language_model(LLAMA)})
    run = runs.run("tiny", IDS)
    run["layers.1.attn.scores"][0, 1, 4, 2] += 0.01  # the held tensor, in place
    failed = [c["what"] for c in card(run, "layers.1.attn.scores", 1)["checks"] if not c["holds"]]
    assert len(failed) == 2
    edited = runs.run("tiny", IDS, [Edit(at="layers.1.attn.z", do="zero")])
    assert card(edited, "layers.1.attn.z")["checks"][0]["what"] == "this run changes it here"
    with pytest.raises(IndexError, match="head 4"):
        card(edited, "layers.1.attn.z", 4)


def test_tokens_with_alternatives_are_the_models():
    lm = language_model(LLAMA)
    *events, done = generation(lm, IDS, Sampling(temperature=0.0), length=5, fast=False)
    chosen = [event["id"] for event in events]
    assert done["done"]
    for i, event in enumerate(events):
        logits = lm.trace([*IDS, *chosen[:i]])["logits[-1]"]
        assert event["id"] == int(logits[: lm.tokenizer.vocab_size].argmax())
        assert event["cached"] == (0 if i == 0 else len(IDS) + i - 1)
        assert event["probability"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)
        assert [a["id"] for a in event["alternatives"]] == logits.topk(8).indices.tolist()


def two_models() -> Runs:
    """Two models of one shape, one weight apart, and one of another shape."""
    models = [language_model(config, torch.float64) for config in (LLAMA, LLAMA, GPT)]
    with torch.no_grad():
        models[1].model.layers[1].attn.v_proj.weight[3] += 0.25
    return Runs(dict(zip(("a", "b", "gpt"), models, strict=True)))


def test_two_models_side_by_side():
    runs = two_models()
    a, b = runs.run("a", IDS), runs.run("b", IDS)
    found = last(against(a, b))
    verdicts = {entry["name"]: entry for entry in found["rows"]}
    assert found["first"] == found["first_diverged"] == "layers.1.attn.v"
    assert [n for n, e in verdicts.items() if e["verdict"] == "diverged"] == ["layers.1.attn.v"]
    assert not verdicts["logits"]["identical"] and verdicts["layers.0.resid_post"]["identical"]
    assert found["only"] == [[], []]
    name = "layers.1.attn.v[0]"
    assert torch.equal(difference(a, b, name), b[name] - a[name])
    masked = difference(a, b, "layers.1.attn.masked_scores")
    assert bool((masked[..., 0, 1:] == -torch.inf).all()) and bool(masked[..., 0].isfinite().all())
    moved = {entry["id"]: entry for entry in found["probabilities"]}
    best = int(b.logits(-1).argmax())
    assert moved[best]["after"] == pytest.approx(float(b.logits(-1).softmax(-1)[best]))
    assert moved[best]["before"] == pytest.approx(float(a.logits(-1).softmax(-1)[best]))
    scope: dict = {}
    loads = iter([a.loaded.lm, b.loaded.lm])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pellucid, "load", lambda *words, **more: next(loads))
        exec(found["python"], scope)
    assert torch.equal(scope["apart"](name), b[name] - a[name])


def test_models_of_other_shapes_are_compared_where_they_can_be():
    runs = two_models()
    found = last(against(runs.run("a", IDS), runs.run("gpt", IDS)))
    rows = {entry["name"]: entry for entry in found["rows"]}
    assert {entry["verdict"] for entry in rows.values()} == {"not-judged"}
    assert rows["tokens"]["identical"] and rows["layers.0.attn.q"]["largest"] is None
    assert "layers.0.mlp.gate" in found["only"][0] and "pos_embed" in found["only"][1]
    assert all(entry["text"] for entry in found["probabilities"])
    with pytest.raises(ValueError, match="nothing to subtract"):
        difference(runs.run("a", IDS), runs.run("gpt", IDS), "layers.0.attn.q")


def test_tiles_against_numpy():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 13, 17, generator=generator)
    x[0, 0, 0], x[1, 5, :] = math.nan, -math.inf
    for how, function in (
        ("max", np.max), ("mean", np.mean), ("absmax", lambda t: t.flat[np.abs(t).argmax()])
    ):  # fmt: skip
        found = reduce_tiles(x, how, 4, 5)
        assert (found.shape, found.dtype) == ((2, 4, 5), np.float32)
        for h in range(2):
            for i in range(4):
                for j in range(5):
                    tile = x[h, i * 13 // 4 : (i + 1) * 13 // 4, j * 17 // 5 : (j + 1) * 17 // 5]
                    open_ = tile.numpy()[tile.numpy() != -math.inf]
                    expected = function(open_) if open_.size else -math.inf
                    assert found[h, i, j] == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert (reduce_tiles(x[0], "max", 99, 99) == x[0].numpy())[1:].all()
    lowest = torch.full((4, 4), torch.finfo(torch.float32).min).tril(-1) + 1
    assert (reduce_tiles(lowest, "absmax", 2, 2) == [[1, 1], [lowest.min(), 1]]).all()
    assert reduce_tiles(torch.ones(3, 3, dtype=torch.bool), "mean", 2, 2).tolist() == [[1, 1]] * 2


def test_statistics_leave_masked_cells_out():
    found = statistics(
        torch.tensor([1.0, -3.0, math.nan, -math.inf, torch.finfo(torch.float32).min])
    )
    assert (found["min"], found["max"], found["mean"]) == (-3, 1, -1)
    assert (found["rms"], found["nan"], found["inf"]) == (math.sqrt(5), 1, 2)
    assert sum(found["histogram"]["counts"]) == 2
    assert statistics(torch.full((2,), -math.inf))["min"] is None


def test_a_recording_is_what_the_server_would_answer():
    runs = Runs({"tiny": language_model(LLAMA)})
    run = runs.run("tiny", IDS)
    answers, path = last(record(run)), f"/api/runs/{run.id}"
    seen = run.loaded.lm.trace(IDS)
    for name in run:
        headers, body = answers[f"{path}/tensor?at={name}"]
        whole = seen[name][0] if seen[name].ndim > len(run.shape(name)) else seen[name]
        assert body == whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert headers["X-Shape"] == ",".join(map(str, whole.shape))
        assert json.loads(answers[f"{path}/card?step={name}"][1])["step"] == name
    assert json.loads(answers[path][1])["ids"] == IDS
    best = int(seen["logits[-1]"].argmax())
    assert f"{path}/contributions?row=6&id={best}" in answers
    small = last(record(run, room=2000))
    assert 1 < sum("/tensor?" in key for key in small) < len(run)
    assert encoded("a[1,2:]·b") == "a%5B1%2C2%3A%5D%C2%B7b"
