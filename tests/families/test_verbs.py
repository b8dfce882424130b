"""Every verb on every row: tiny random models with a tokenizer, through the command line.

Every row times a dozen verbs takes minutes, so all of it is `long`; `make test-long` runs it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from family_samples import SAMPLES
from tiny import random_model

import pellucid
from pellucid import checkpoints, graph, tokenizers
from pellucid.checkpoints.formats.peft import module_names
from pellucid.cli import main
from pellucid.diff.selftest.in_features import FEATURES
from pellucid.diff.selftest.run import applies, run_benchmark
from pellucid.diff.selftest.subjects import Subject, _drawn
from pellucid.families import read_config, table

pytestmark = pytest.mark.long
TEXT = "the cat sat on the mat and the dog sat on the log; 1 2 3 (x) = [y] " * 8
PROMPT = "the cat sat on the"
VOCABULARY = 275  # of bytes, and what the text merges


def config_of(sample: str, vocabulary: int = VOCABULARY):
    return read_config({**SAMPLES[sample], "vocab_size": vocabulary}, sample)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Sample -> a folder with its model in float32 and a tokenizer, made once."""
    words = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train_bpe([TEXT], VOCABULARY, words, ("<|begin|>", "<|end|>"))
    made: dict[str, Path] = {}

    def folder(sample: str) -> Path:
        if sample not in made:
            config = config_of(sample)
            path = tmp_path_factory.mktemp("model") / "model"
            weights = random_model(config, torch.float32).state_dict()
            checkpoints.save(path, config, weights, tokenizer_from=words)
            made[sample] = path
        return made[sample]

    return folder


def said(capsys, *arguments: object) -> str:
    """What the command prints; it must end well."""
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_quick_verbs(sample, folder_of, tmp_path, capsys):
    """info, plan, walk in the terminal, trace, an edit, decoding in C, int8 weights."""
    folder = folder_of(sample)
    lm = pellucid.load(folder)
    info = json.loads(said(capsys, "info", folder, "--json"))
    assert info["parameters"]["total"] == sum(p.numel() for p in lm.model.parameters())
    plan = ["--context", 32, "--cards", 1, "--micro-batch", 1, "--batch", 8, "--json"]
    assert json.loads(said(capsys, "plan", folder, *plan))
    walk = said(capsys, "walk", "-m", folder, PROMPT, "--layer", 1, "--head", 1)
    ids = lm.encode(PROMPT)
    with torch.no_grad():
        best = int(lm(PROMPT)[0, -1].argmax())
    assert re.search(rf"\b{best}$", walk.rpartition("── The next token")[2], re.MULTILINE)
    assert not re.search(r"\b(None|nan|Tensor|function|lambda)\b", walk)
    assert said(capsys, "trace", "-m", folder, PROMPT, "-o", tmp_path / "x.safetensors")
    seen = pellucid.Trace.load(tmp_path / "x.safetensors")
    assert [name for name in seen if graph.known(name)] == list(graph.expand(lm.config))
    torch.testing.assert_close(seen["logits"], lm(PROMPT).detach(), rtol=1e-5, atol=1e-5)
    edited = lm.trace(PROMPT, only="logits", edit={"layers.1.attn.z[1]": 0.0})
    assert not torch.equal(edited["logits"], seen["logits"])
    greedy = {"max_new_tokens": 24, "temperature": 0.0, "stop": None}
    in_c, plain = (lm.generate(PROMPT, fast=fast, **greedy) for fast in (True, False))
    assert in_c == plain
    assert len(ids) > 3
    smaller = tmp_path / "int8.safetensors"
    said(capsys, "convert", folder, smaller, "--to", "int8")
    assert json.loads(said(capsys, "info", smaller, "--json"))


def page_and_figures(folder: Path, out: Path, capsys) -> None:
    """The walk's page names every step of the terminal; its figures are pictures."""
    page, plots = out / "page.html", out / "plots"
    said(capsys, "walk", "-m", folder, PROMPT, "--html", page, "--plots", plots)
    names = re.findall(r"layers\.0\.[a-z_.]+", page.read_text("utf-8"))
    config = pellucid.load(folder).config
    leaves = {f"layers.0.{leaf}" for leaf in graph.rows(config, config.layer(0))}
    leaves -= {"layers.0.resid_pre"}  # the embedding, shown under that name
    assert leaves <= {name.rstrip(".") for name in names}
    drawn = [path.read_bytes()[:4] for path in plots.rglob("*.png")]
    assert drawn and set(drawn) == {b"\x89PNG"}


def finetune(folder: Path, out: Path, capsys) -> None:
    """A step of all weights, and one of LoRA, whose names are PEFT's."""
    (out / "text.txt").write_text(TEXT)
    common = [
        "finetune", folder, "--data", out / "text.txt", "--steps=2", "--batch=2", "--context=16",
        "--eval-every=2", "--lr=1e-2", "--precision=float32", "--json",
    ]  # fmt: skip
    whole = json.loads(said(capsys, *common, "--out", out / "whole"))
    assert whole["steps"] == 2
    before, after = (pellucid.load(f).model.state_dict() for f in (folder, out / "whole"))
    assert all(not torch.equal(before[name], after[name]) for name in before if "proj" in name)
    said(capsys, *common, "--out", out / "lora", "--lora", 4)
    from safetensors import safe_open

    file = out / "lora" / "adapter" / "adapter_model.safetensors"
    config = pellucid.load(folder).config
    with safe_open(file, "pt") as stored:
        found = {name.partition(".lora_")[0] for name in stored.keys()}  # noqa: SIM118
    known = module_names(table(config)).keys()
    assert found and {n.removeprefix("base_model.model.") for n in found} <= known


def bench(folder: Path, out: Path, capsys) -> None:
    """One short measurement, in a process of its own."""
    engines = ["--engines", "pellucid/eager/float32,pellucid/fast/float32"]
    measured = ["--measures", "decode", "--quick", "--rounds", 1, "--threads", 1, "--json"]
    shape = ["--shape", folder / "config.json", "--work", out / "work"]
    result = json.loads(said(capsys, "bench", *shape, *engines, *measured))
    assert not result["skipped"]
    assert {turn["measure"] for turn in result["turns"]} >= {"decode"}


LONGER = {verb.__name__: verb for verb in (page_and_figures, finetune, bench)}


@pytest.mark.parametrize("verb", LONGER)
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_longer_verbs(sample, verb, folder_of, tmp_path, capsys):
    LONGER[verb](folder_of(sample), tmp_path, capsys)


# ── Seeded faults ─────────────────────────────────────────────────────────────────────────────────


def subject_of(sample: str) -> Subject:
    config = config_of(sample, 150)
    return Subject(name=sample, config=config, weights=_drawn(config))


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_fault_of_a_feature_is_found_and_named(sample):
    """Of every feature that the row has, in float32: diverged, at the right tensor, by its name."""
    subject = subject_of(sample)
    faults = [fault for fault in FEATURES if applies(fault, subject)]
    found = run_benchmark([subject], ["float32"], faults, [])
    assert len(found.rows) >= len(faults) > 2
    for row in found.rows:
        assert row.detected and row.located and row.named and row.static_right, row
