"""`pellucid diff` as a user runs it: the report, the exit status, JSON, the page, trouble."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console
from tiny import LLAMA, random_model

from pellucid import cli
from pellucid import language_model as language_models
from pellucid.diff import two_models
from pellucid.diff.selftest import run as benchmark
from pellucid.language_model import LanguageModel
from pellucid.show.diff_terminal import show
from pellucid.tokenizers.llama3 import from_ranks
from pellucid.trace import Trace

CONFIG = replace(LLAMA, vocab_size=512)
KEYS = "layers.1.attn.k"


def language_model(dtype=torch.float32, broken=False, config=CONFIG):
    model = random_model(config, dtype)
    if broken:
        with torch.no_grad():
            weight = model.layers[1].attn.k_proj.weight
            weight.copy_(weight.view(2, 10, -1).flip(0).reshape(weight.shape))
    return LanguageModel(model, from_ranks({bytes([byte]): byte for byte in range(256)}))


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """Models by name, in the place of folders."""
    held = {
        "good": language_model(),
        "same": language_model(),
        "broken": language_model(broken=True),
        "deeper": language_model(config=replace(CONFIG, n_layers=3)),
    }
    for module in (two_models, language_models):
        monkeypatch.setattr(module, "load", lambda name, **how: held[name])
    return held


def run(capsys, *argv):
    status = cli.main(["diff", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def story(text):
    """Label -> what the report says after it, continuation lines joined."""
    told, label = {}, ""
    for line in text.splitlines():
        label = line[:14].strip() or label
        told[label] = f"{told.get(label, '')}{line[14:]}\n"
    return told


def test_the_same_model_is_identical(capsys):
    status, out, err = run(capsys, "good", "same", "-p", "hello")
    assert (status, err) == (0, "")
    told = story(out)
    assert "6 tokens, the same from both tokenizers" in told["tokens"]
    assert "21 tensors, equal in every bit" in told["weights"]
    assert "48 tensors of B: 48 identical" in told["forward"]
    assert "the same likeliest next token everywhere" in told["effect"]
    assert "FIRST" not in told
    assert out.splitlines()[-1].startswith("IDENTICAL")
    assert "\x1b" not in out


def test_a_fault_is_told_in_order(capsys):
    status, out, _ = run(capsys, "good", "broken", "-p", "hello")
    assert status == 1
    labels = [line[:14].strip() for line in out.splitlines() if line[:14].strip()]
    order = ["tokens", "weights", "constants", "forward", "FIRST", "cause", "effect"]
    assert [label for label in labels if label in order] == order
    told = story(out)
    assert KEYS in told["FIRST"]
    assert re.search(r"error \S+ against \S+ of A's own: [\d,.e]+ × what rounding", told["FIRST"])
    assert "heads reordered" in told["cause"] and "replayed" in told["cause"]
    assert f"{KEYS}_proj.weight: heads reordered" in told["weights"]
    assert "47 identical, 1 diverged" in told["forward"]
    assert out.splitlines()[-1].startswith("DIVERGED")


def test_json_is_the_report_and_nothing_else(capsys):
    status, out, err = run(capsys, "good", "broken", "--tokens", "1,2,3;4,5", "--json")
    assert (status, err) == (1, "")
    report = json.loads(out)
    assert report["verdict"] == "diverged"
    assert report["tokens"] == [[1, 2, 3], [4, 5]]
    assert report["first"]["name"] == KEYS
    assert report["cause"]["name"] == "heads reordered"
    assert {row["verdict"] for row in report["tensors"]} == {"identical", "diverged"}
    assert [side["family"] for side in report["sides"]] == ["llama", "llama"]
    assert report["first"]["tried"][0]["fits"]


def test_options_reach_the_diff(capsys):
    argv = ("good", "same", "--tokens", "1 2 3", "--dtype-b", "bfloat16", "--dialect-b", "meta")
    status, out, _ = run(capsys, *argv, "--steps", "1", "--json")
    report = json.loads(out)
    assert (status, report["verdict"]) == (0, "explained")
    assert report["dtypes"] == ["float32", "bfloat16"]
    assert report["sides"][1]["dialect"] == "meta"
    assert any(row["name"].startswith("step.1.") for row in report["tensors"])
    status, out, _ = run(capsys, "good", "same", "--tokens", "1,2,3", "--fused", "--copies", "2")
    assert status == 0
    assert "layers.*.attn.{scores,masked_scores,pattern}" in story(out)["not observed"]


def test_all_lists_every_tensor(capsys):
    _, out, _ = run(capsys, "good", "broken", "--tokens", "1,2,3", "--all")
    rows = [line.split() for line in out.splitlines() if line.startswith(("layers.", "logits"))]
    assert len(rows) == 2 * 20 + 1
    assert next(row for row in rows if row[0] == KEYS)[1] == "diverged"


def test_a_trace_file_is_a_side(capsys, tmp_path, models):
    path = tmp_path / "run.safetensors"
    seen = models["broken"].trace([1, 2, 3])
    for name in [name for name in seen if name.endswith("scores")]:
        del seen[name]
    seen.save(path)
    status, out, _ = run(capsys, "good", str(path))
    told = story(out)
    assert status == 1
    assert KEYS in told["FIRST"]
    assert "not compared: no weights in B" in told["weights"]
    assert "encodings not compared" in told["tokens"]
    assert "layers.*.attn.{scores,masked_scores}" in told["not observed"]


def test_the_page_is_written_besides(capsys, tmp_path):
    path = tmp_path / "diff.html"
    status, out, _ = run(capsys, "good", "broken", "-p", "hello", "--html", str(path))
    assert status == 1
    assert out.splitlines()[-1].split() == ["page", str(path)]
    assert f'<tr id="{KEYS}" class="diverged">' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["good"], "give two models"),
        (["good", "deeper"], "n_layers"),
        (["good", "nowhere.safetensors"], "no file"),
        (["good", "same", "--tokens", "1,9999"], "9999"),
        (["good", "same", "--html", "/nowhere/x.html"], "no folder"),
        (["good", "same", "--map", "transformers"], "neither side"),
    ],
)
def test_trouble_is_one_line_and_2(capsys, argv, words):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("pellucid diff: ") and err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("argv", [["--tokens", "1,x"], ["--tokens", "1;"], ["--steps", "-1"]])
def test_arguments_that_say_nothing(capsys, argv):
    with pytest.raises(SystemExit) as ended:
        cli.main(["diff", "good", "same", *argv])
    assert ended.value.code == 2


def test_unknown_names_are_answered_with_a_map_that_works(capsys, tmp_path, models):
    seen = models["good"].trace([1, 2, 3])
    Trace({f"x.{place}": tensor for place, tensor in enumerate(seen.values())}).save(
        tmp_path / "t.safetensors"
    )
    argv = ["good", str(tmp_path / "t.safetensors"), "--tokens", "1,2,3"]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert "--map" in err and err.count("\n") > 5
    proposal = "\n".join(err.splitlines()[1:])
    (tmp_path / "names.yaml").write_text(proposal)
    status, out, _ = run(capsys, *argv, "--map", str(tmp_path / "names.yaml"))
    assert status == 0


def test_names_that_no_map_knows_are_answered_with_the_flag(capsys, tmp_path):
    Trace({"one": torch.zeros(3, 4), "two": torch.ones(3)}).save(tmp_path / "t.safetensors")
    status, _, err = run(capsys, "good", str(tmp_path / "t.safetensors"))
    assert status == 2 and "--map" in err and "name_map" not in err


def test_on_a_terminal_lines_wrap_and_have_colours():
    report = two_models.diff("good", "broken", "hello").to_json()
    terminal = Console(file=io.StringIO(), force_terminal=True, width=72, color_system="truecolor")
    show(report, terminal, every=False)
    written = terminal.file.getvalue()
    assert "\x1b[" in written
    plain = re.sub(r"\x1b\[[\d;]*m", "", written)
    told = plain.split("\n\n", 1)[1]
    assert max(map(len, told.splitlines())) <= 72
    wide = Console(file=io.StringIO(), width=72)
    show(report, wide, every=False)
    assert plain.split() == wide.file.getvalue().split()  # the same words, none broken


SEEDED = [fault for fault in benchmark.FAULTS if fault.encode is None]


def small_benchmark(monkeypatch, faults, controls):
    small = partial(benchmark.run_benchmark, dtypes=("float32",), faults=faults, controls=controls)
    monkeypatch.setattr(benchmark, "run_benchmark", small)


def test_self_test_runs_the_seeded_faults(capsys, monkeypatch):
    small_benchmark(monkeypatch, SEEDED[:2], benchmark.CONTROLS[:1])
    status, out, _ = run(capsys, "--self-test", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["summary"]["float32 detected"] == 1
    assert all(row["right"] for row in told["rows"])
    assert {row["control"] for row in told["rows"]} == {True, False}
    status, out, _ = run(capsys, "--self-test", "good")
    assert status == 0
    assert "100.0 %" in out and "controls fired" in out


def test_self_test_fails_where_a_control_fires(capsys, monkeypatch):
    small_benchmark(monkeypatch, SEEDED[:1], SEEDED[1:2])  # a fault, which is not harmless
    status, out, _ = run(capsys, "--self-test")
    assert status == 1
    assert "reported wrongly" in out and "expected" in out


def test_a_self_test_without_a_fault_proves_nothing(capsys, monkeypatch):
    small_benchmark(monkeypatch, [], benchmark.CONTROLS[:1])
    status, out, err = run(capsys, "--self-test")
    assert (status, out) == (2, "")
    assert "no fault" in err
