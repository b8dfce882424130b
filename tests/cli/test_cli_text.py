"""`pellucid generate` and `pellucid chat` as a user runs them."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny import LLAMA, random_model

from pellucid import cli
from pellucid.cli import VERBS, chat, generate
from pellucid.cli.parser import VerbParser
from pellucid.language_model import LanguageModel
from pellucid.models import Model
from pellucid.tokenizers.llama3 import from_ranks


@pytest.fixture(scope="module")
def model() -> Model:
    """Writes small letters only."""
    model = random_model(replace(LLAMA, vocab_size=512, context_length=160))
    only = torch.full((512,), -1e9, dtype=torch.float64)
    only[ord("a") : ord("z") + 1] = 0
    model.register_forward_hook(lambda _module, _inputs, logits: logits + only)
    return model


@pytest.fixture
def lm(model: Model, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A tiny random model in the place of whatever -m names."""
    tokenizer = from_ranks({bytes([byte]): byte for byte in range(256)})
    lm = LanguageModel(model, tokenizer)
    for verb in (generate, chat):
        monkeypatch.setattr(verb, "load_model", lambda _arguments: lm)
    return lm


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What `input` gets, then the end of the input."""
    entered: Iterator[str | type[BaseException]] = iter(lines)

    def read(_prompt: str) -> str:
        line = next(entered, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_writes_the_text_alone(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "generate", "once", "-n", "12", "--seed", "4")
    assert status == 0 and err == ""
    assert len(out) == 13 and out.endswith("\n") and out[:-1].isalpha()
    assert run(capsys, "generate", "once", "-n", "12", "--seed", "4")[1] == out
    assert run(capsys, "generate", "once", "-n", "12", "--seed", "5")[1] != out


def test_generate_json(lm: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    _, plain, _ = run(capsys, "generate", "once", "-n", "12", "--seed", "4")
    _, out, _ = run(capsys, "generate", "once", "-n", "12", "--seed", "4", "--json")
    found = json.loads(out)
    assert found == {
        "model": "llama",
        "seed": 4,
        "prompt": "once",
        "text": plain[:-1],
        "tokens": list(plain[:-1].encode()),
        "finish_reason": "length",
        "prompt_tokens": 5,
        "new_tokens": 12,
    }
    _, out, _ = run(capsys, "generate", "once", "-n", "12", "--json")
    chance = json.loads(out)
    again = json.loads(
        run(capsys, "generate", "once", "-n", "12", "--json", "--seed", str(chance["seed"]))[1]
    )
    assert again == chance, "a seed from chance is told, so that it can be used again"


def test_generate_stops_before_a_string(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("generate", "once", "-n", "12", "--temperature", "0")
    _, whole, _ = run(capsys, *argv)
    stop = whole[4:7]
    _, out, _ = run(capsys, *argv, "--stop", stop, "--stop", "never")
    assert out == whole[: whole.index(stop)] + "\n"


def test_generate_options_reach_the_sampler(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = run(capsys, "generate", "once", "-n", "12", "--temperature", "0")[1]
    for option in (("--top-k", "1"), ("--top-p", "1e-9"), ("--min-p", "1")):
        assert run(capsys, "generate", "once", "-n", "12", *option)[1] == greedy
    penalised = run(
        capsys, "generate", "once", "-n", "12", "--temperature", "0", "--repetition-penalty", "1e6"
    )[1]
    assert len(set(penalised)) == 13, "no letter twice"


def test_generate_a_batch_and_from_a_pipe(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    greedy = ("-n", "5", "--temperature", "0", "--json")
    _, out, _ = run(capsys, "generate", "once", "-", *greedy)
    found = json.loads(out)["completions"]
    assert [one["prompt"] for one in found] == ["once", "from a pipe"]
    for one in found:
        alone = json.loads(run(capsys, "generate", one["prompt"], *greedy)[1])
        assert one["text"] == alone["text"]
    _, out, _ = run(capsys, "generate", "a", "b", "-n", "5", "--temperature", "0")
    first, second, end = out.split("\n\n")
    assert first[0] == "a" and second[0] == "b" and len(first) == len(second) == 6 and end == ""


def test_generate_without_a_prompt_begins_with_bos(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(run(capsys, "generate", "-n", "3", "--json")[1])
    assert found["prompt"] == "" and found["prompt_tokens"] == 1
    status, out, err = run(capsys, "generate", "-n", "3", "--no-bos")
    assert status == 2 and out == "" and "no tokens" in err
    found = json.loads(run(capsys, "generate", "<|eot_id|>", "--specials", "-n", "1", "--json")[1])
    assert found["prompt_tokens"] == 2


def test_generate_by_default_writes_as_much_as_fits(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    for length, new in ((10, 128), (150, 9)):
        assert len(run(capsys, "generate", "x" * length)[1]) == new + 1
    status, _, err = run(capsys, "generate", "x" * 160)
    assert status == 2 and "161 tokens" in err and "--slide" in err and err.count("\n") == 1
    status, _, err = run(capsys, "generate", "x" * 150, "-n", "20")
    assert status == 2 and "make 171, but the context is 160" in err
    assert len(run(capsys, "generate", "x" * 150, "-n", "20", "--slide")[1]) == 21


def test_generate_refuses_wrong_settings_before_it_loads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "load_model", lambda _arguments: pytest.fail("loaded"))
    status, _, err = run(capsys, "generate", "x", "--top-p", "2")
    assert status == 2 and "top_p is 2.0" in err and err.count("\n") == 1


def test_chat(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("chat", "-n", "6", "--seed", "1")
    type_in(monkeypatch, "hi", "", "and?")
    status, out, err = run(capsys, *argv)
    assert status == 0 and err == ""
    first, second = out.splitlines()
    assert len(first) == len(second) == 6 and first != second
    type_in(monkeypatch, "hi", "/reset", "hi", "/system be brief", "/reset", "hi", "/what", "/help")
    _, out, _ = run(capsys, *argv)
    lines = out.splitlines()
    assert lines[:2] == [first, first] and lines[2] not in (first, second)
    assert "/what is no command" in lines[3] and "/reset" in out.split("/what", 1)[1]
    type_in(monkeypatch, "hi")
    assert run(capsys, *argv, "--system", "be brief")[1] == lines[2] + "\n"


def test_chat_goes_on_after_ctrl_c_and_errors(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []

    def interrupt(*_: object) -> None:
        passes.append(0)
        if len(passes) == 3:
            raise KeyboardInterrupt

    hook = lm.model.layers[0].register_forward_pre_hook(interrupt)
    type_in(monkeypatch, "hi", KeyboardInterrupt, "x" * 200, "go on")
    status, out, err = run(capsys, "chat", "-n", "6", "--seed", "1")
    hook.remove()
    broken, thrown_away, answer = out.splitlines()
    assert (status, len(broken), thrown_away, len(answer)) == (0, 2, "", 6)
    assert "question is too long" in err and "context is 160 tokens" in err and err.count("\n") == 1


def test_chat_without_a_format(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.tokenizer.chat = None
    status, _, err = run(capsys, "chat")
    assert status == 2 and "no chat format" in err and "pellucid generate" in err


@pytest.mark.assets
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_trained_model_from_the_command_line(
    assets: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(assets / "stories260K" / layout)
    status, out, _ = run(
        capsys, "generate", "-m", source, "Once upon a time", "-n", "20", "--temperature", "0"
    )
    assert status == 0 and out.startswith(", there was a little girl named Lily.")


def settled(verb: str, *words: str) -> argparse.Namespace:
    parser = VerbParser(prog=verb, description="")
    getattr(import_module(VERBS[verb][0]), f"{verb}_arguments")(parser)
    return parser.parse_words(words)


@pytest.mark.parametrize("verb", ["info", "code", "plan", "chat", "finetune", "generate", "walk"])
def test_model_stands_first_or_behind_m_in_every_verb(verb: str, capsys):
    out = ["--out", "r"] if verb == "finetune" else []
    assert settled(verb, "stdlib", *out).model == "stdlib"
    assert settled(verb, "-m", "stdlib", *out).model == "stdlib"
    if verb not in ("generate", "walk"):
        with pytest.raises(SystemExit):
            settled(verb, "demo", "-m", "stdlib", *out)
        assert "two models are given, demo and -m stdlib" in capsys.readouterr().err


def test_a_path_is_not_taken_for_a_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "best").mkdir(parents=True)

    def told(*words):
        given = settled("generate", *words)
        return given.model, given.prompt

    assert told("run/best", "The license") == ("run/best", ["The license"])
    assert told("run/bset", "The license")[0] == "run/bset"  # mistyped: an error about a model
    assert told("demo", "-n", "3", "hi") == ("demo", ["hi"])
    assert told("openai-community/gpt2", "hi") == ("openai-community/gpt2", ["hi"])
    assert told("and/or") == ("demo", ["and/or"])
    assert told("import os", "class A") == ("demo", ["import os", "class A"])
    assert told("-m", "stdlib", "demo", "run/best") == ("stdlib", ["demo", "run/best"])
    assert told() == ("demo", [])
    assert settled("walk", "stdlib", "hi").prompt == "hi"
    assert settled("walk", "run").prompt is None
    with pytest.raises(SystemExit):
        told("The license", "run/best")
    assert "run/best is a model, and stands where a prompt does" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        settled("walk", "hi", "there")
    assert "one PROMPT is expected, 2 are given" in capsys.readouterr().err
