"""The lines of `pellucid code` that stand with each step of the walk, family by family."""

from __future__ import annotations

import re

import pytest
from family_samples import SAMPLES
from tiny import random_model

from pellucid import graph
from pellucid.cli import main
from pellucid.families import read_config
from pellucid.numerics import dialect
from pellucid.source import file_text
from pellucid.source.step_lines import StepLines
from pellucid.walk import Step, walk

PROMPT = ["specials", "tokens", "token_strings"]  # given, not computed
TOKENS = [5, 1, 7, 9, 2, 3, 11]
KINDS = [  # what differs from Llama in more than numbers
    "llama", "llama llama3", "qwen3", "gemma2", "gemma3_text", "phi", "phi3 longrope", "smollm3",
    "olmo2", "cohere2", "glm4", "nanochat", "stablelm parallel", "gpt2",
]  # fmt: skip
CASES = [(sample, "hf") for sample in KINDS]
CASES += [("llama", "meta"), ("gpt2", "notebook")]


def walked(sample: str, rounding: str) -> tuple[list[Step], StepLines, str]:
    config = read_config(SAMPLES[sample], "sample")
    steps = walk(
        config, random_model(config).state_dict(), TOKENS, token_strings=list("abcdefg"),
        dialect=dialect(rounding, config.rounding), layer=1, head=1,
    )  # fmt: skip
    return list(steps), StepLines(config, rounding), file_text(config, rounding)


@pytest.mark.parametrize(("sample", "rounding"), CASES)
def test_every_step_has_lines_of_the_file_that_compute_it(sample, rounding):
    steps, code, text = walked(sample, rounding)
    there = {line.strip() for line in text.splitlines()}
    for step in steps:
        lines = code.lines(step.name)
        if step.name in PROMPT:
            assert not lines
            continue
        assert {line.strip() for line in lines} <= there, step.name
        code_alone = "\n".join(line.partition("  # ")[0] for line in lines)
        assert not re.search(r"\b(dialect|config|if|else)\b", code_alone), step.name
        assert 1 <= len(code.lines(step.name, most=3)) <= 3, step.name
        leaf = step.name.rpartition(".")[2]
        if graph.known(step.name) and re.search(rf"\b{leaf}\b( =|,)|# .*\b{leaf}\b", text):
            assert re.search(rf"\b{leaf}\b", "\n".join(lines)), step.name


@pytest.mark.parametrize(
    ("sample", "rounding", "name", "expected"),
    [
        ("llama", "hf", "layers.1.attn.masked_scores", [
            "masked_scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)"]),
        ("llama", "meta", "layers.1.attn.masked_scores", [
            'masked_scores = scores.masked_fill(~mask, float("-inf"))']),
        ("gpt2", "hf", "layers.3.attn.pattern", [
            "pattern = torch.softmax(masked_scores, dim=-1)"]),
        ("gpt2", "hf", "layers.0.resid_pre", ["x = embed + pos_embed  # (B, T, 48)"]),
        ("gpt2", "hf", "layers.1.attn_norm.mean", [
            "attn_norm = self.attn_norm(resid_pre)  # (B, T, 48)",
            "return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-05)"]),
        ("cohere", "hf", "layers.1.resid_post", [
            "x = resid_pre + attn_out", "return x + mlp_out  # resid_post"]),
        ("gemma3_text", "hf", "second_rope.frequencies", [
            "exponents = torch.arange(0, 8, 2, dtype=torch.float32, device=positions.device) / 8",
            "angles = positions[..., None].float() * (1.0 / 10000.0**exponents)"]),
        ("olmo2", "hf", "rope.cis", ["return angles.cos(), angles.sin()"]),
        ("llama", "hf", "next_token", ["token = int(model(new, cache)[0, -1].argmax())"]),
    ],
)  # fmt: skip
def test_lines_of_a_step(sample, rounding, name, expected):
    config = read_config(SAMPLES[sample], "sample")
    assert StepLines(config, rounding).lines(name) == expected


def test_scores_say_that_heads_are_repeated_and_a_limit_keeps_the_statement():
    code = StepLines(read_config(SAMPLES["llama llama3"], "sample"), "hf")
    repeated, scores = code.lines("layers.0.attn.scores")
    assert repeated == "k, v = repeat_heads(k), repeat_heads(v)"
    assert scores.startswith("scores = q_rotated @ k.transpose(-1, -2)")
    assert code.lines("layers.0.attn.scores", most=1) == [scores]
    assert len(code.lines("rope.angles")) == 8  # llama3 slows in six steps
    assert code.lines("rope.angles", most=3) == code.lines("rope.angles")[-3:]


def test_the_terminal_and_the_page_show_them(capsys, tmp_path):
    page = tmp_path / "page.html"
    assert main(["walk", "import os", "--source", "--html", str(page)]) == 0
    out, line = capsys.readouterr().out, "pattern = torch.softmax(masked_scores, dim=-1,"
    assert f"\n    {line} dtype=torch.float32).to(v.dtype)\n" in out
    assert f"<summary>source</summary><pre>{line}" in page.read_text("utf-8")
    assert "dialect" not in page.read_text("utf-8")
    assert main(["walk", "import os"]) == 0
    assert "torch" not in capsys.readouterr().out
    assert main(["walk", "import os", "--source", "--json"]) == 2
    assert "--source" in capsys.readouterr().err
