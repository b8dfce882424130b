"""Quantised checkpoints: written, read by every door, measured, and damaged."""

from __future__ import annotations

import inspect
import json
import math
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

import pellucid
from pellucid import checkpoints
from pellucid.cli import main
from pellucid.evaluate.quantise import Format, quantisation_cost, quantise, quantise_checkpoint


@pytest.fixture(scope="module", params=[("stdlib", 4), ("stdlib-gpt2", 8), ("stdlib", 6)])
def made(request, tmp_path_factory):
    source, bits = request.param
    folder = tmp_path_factory.mktemp("quantised") / f"int{bits}"
    text = folder.with_suffix(".txt")
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    return source, folder, quantise_checkpoint(source, folder, Format(bits=bits), text=[text])


def test_what_was_written_is_what_was_made(made):
    source, folder, done = made
    lm, original = pellucid.load(folder), pellucid.load(source)
    expected = quantise(original.model, bits=done.format.bits)
    tokens = torch.tensor([lm.encode("import os")])
    with torch.no_grad():
        assert torch.equal(lm.model(tokens), expected(tokens))
    assert done.bytes_after < done.bytes_before * (0.4 if done.format.bits == 4 else 0.6)
    assert lm.dtype == original.dtype
    greedy = {"max_new_tokens": 20, "temperature": 0.0}
    assert lm.generate("import", fast=True, **greedy) == lm.generate("import", fast=False, **greedy)


def test_the_cost_is_honest(made):
    source, folder, done = made
    assert done.cost.tokens > 100
    assert 0 < done.cost.kl_mean <= done.cost.kl_max
    assert math.isfinite(done.cost.perplexity_after)
    # Against a loop over one token after the other, in float64.
    before, after = pellucid.load(source), pellucid.load(folder)
    tokens = before.encode("for name, value in sorted(found.items()):\n    print(name)\n")
    cost = quantisation_cost(before.model, after.model, tokens)
    with torch.no_grad():
        p, q = (
            lm.model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)
            for lm in (before, after)
        )
    wanted = torch.tensor(tokens[1:])[:, None]
    assert cost.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert math.log(cost.perplexity_after) == pytest.approx(-float(q.gather(1, wanted).mean()))
    assert math.log(cost.perplexity_before) == pytest.approx(-float(p.gather(1, wanted).mean()))
    assert cost.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_a_diff_calls_it_explained_and_the_c_decoder_within_rounding(made):
    source, folder, _ = made
    report = pellucid.diff(source, folder, "def f(x):")
    assert report.verdict == "explained"
    assert {finding.cause for finding in report.static} == {"quantised weights"}
    fast = pellucid.diff(folder, folder, "def f(x):", steps=3, fast=True)
    assert fast.verdict == "within-rounding"


def test_a_diff_tells_a_damaged_scale_from_quantisation(made, tmp_path):
    source, folder, done = made
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    scales = state["layers.1.attn.v_proj.scales"][0, 0].view(-1)  # of codes, the scales first
    scales[3] = scales[3] * 2 if scales.is_floating_point() else scales[3] // 2
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    report = pellucid.diff(source, broken, "def f(x):")
    assert report.verdict == "diverged"
    found = [finding for finding in report.static if finding.kind == "fault"]
    assert [finding.name for finding in found] == ["layers.1.attn.v_proj.weight"]
    where = f"the first at [3, 0:{done.format.group}]"
    assert f"1 group(s) are not A's numbers rounded; {where}" in found[0].finding
    assert report.first.name == "layers.1.attn.v"


def test_a_long_text_is_fitted_to_and_a_diff_explains_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pellucid.evaluate.quantise._LEAST_INPUTS", 800)
    text, how = tmp_path / "text.py", Format(bits=4)
    text.write_text(inspect.getsource(textwrap))
    nearest = quantise_checkpoint("stdlib", tmp_path / "nearest", how)
    done = quantise_checkpoint("stdlib", tmp_path / "fitted", how, text=[text])
    assert not nearest.fitted_to and done.fitted_to > 800 and done.format.fitted
    report = pellucid.diff("stdlib", tmp_path / "fitted", "def f(x):")
    assert report.verdict == "explained"
    assert any("fitted to a text's inputs" in finding.finding for finding in report.static)
    lm = pellucid.load("stdlib")
    rest = lm.encode(inspect.getsource(textwrap))[-done.cost.tokens :]
    before = quantisation_cost(lm.model, pellucid.load(tmp_path / "nearest").model, rest)
    assert done.cost.kl_mean < 0.85 * before.kl_mean


def test_walk_info_and_evaluation_read_it(made, capsys):
    _, folder, _ = made
    lm = pellucid.load(folder)
    steps = list(lm.walk("import os"))
    with torch.no_grad():
        logits = lm.model(torch.tensor([lm.encode("import os")]))
    assert int(steps[-1].value) == int(logits[0, -1].argmax())
    assert main(["info", str(folder)]) in (0, None)
    assert "quant" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "5 bits: expected 8, 6 or 4"),
        ({"group_size": 128}, "tensors do not fit config.json"),
        ({"offsets": 3}, "offsets 3 with"),
        ({"fitted": "so"}, "fitted is so: expected true or false"),
        ({"zero_point": True}, "quantization_config has"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(made, tmp_path, change, message):
    _, folder, _ = made
    stated = json.loads((folder / "config.json").read_text())
    stated["quantization_config"] |= change
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=message):
        checkpoints.open_checkpoint(tmp_path)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "int8"
    assert main(["convert", "stdlib", str(out), "--to", "int8", "--json"]) in (0, None)
    done = json.loads(capsys.readouterr().out)
    plain = {"bits": 8, "group": 64, "head_bits": 8, "offsets": False, "fitted": False}
    assert done["format"] == plain and done["cost"] is None
    assert main(["convert", "stdlib", str(tmp_path / "x"), "--to", "hf", "--group", "32"]) == 2
    assert "--group is for --to int8" in capsys.readouterr().err
    assert main(["convert", str(out), str(tmp_path / "y"), "--to", "int4"]) == 2
    assert "quantised already" in capsys.readouterr().err
    assert main(["convert", "stdlib", str(out), "--to", "int4"]) == 2
    assert "holds a model already" in capsys.readouterr().err
