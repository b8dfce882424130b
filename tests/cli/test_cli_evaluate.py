"""``pellucid eval``: the numbers of the package, printed; errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pellucid
from pellucid.cli import main
from pellucid.evaluate import encode_texts, evaluate_texts


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "some.py"
    file.write_text("import os\n\n\ndef main(argv):\n    return os.path.join(*argv)\n" * 8)
    return file


def test_the_numbers_are_those_of_the_package(text: Path, capsys: pytest.CaptureFixture[str]):
    command = ["eval", "demo", "--text", str(text), "--context", "64", "--stride", "32", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    lm = pellucid.load("demo")
    score = evaluate_texts(
        lm.model, encode_texts(lm.tokenizer, [text.read_text()]), context=64, stride=32
    )
    assert found["loss"] == pytest.approx(score.loss, rel=1e-3)  # other batches round otherwise
    assert found["perplexity"] == pytest.approx(score.perplexity, rel=1e-2)
    assert found["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-3)
    assert found["tokens"] == score.tokens
    assert found["bytes"] == text.stat().st_size
    assert (found["model"], found["texts"], found["stride"]) == ("demo", 1, 32)


def test_what_is_printed_and_another_model_to_compare_with(
    text: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", "--text", str(text), "--against", "demo-gpt2"]) == 0
    printed = capsys.readouterr().out
    assert "demo on 1 text, context 256, stride 128" in printed
    names = [line[:16].strip() for line in printed.splitlines()[1:]]
    assert names[:6] == ["tokens", "bytes", "loss", "perplexity", "bits per byte", "time"]
    assert names[6:] == ["against", "KL mean", "KL max", "same likeliest", "perplexities"]
    assert main(["eval", "--text", str(text), "--against", "demo", "--json"]) == 0
    against = json.loads(capsys.readouterr().out)["against"]
    assert (against["kl_max"], against["top1"]) == (0.0, 1.0)


def test_lines_of_json_under_a_key_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "import os"}\n{"body": "import sys"}\n{"body": "import re"}\n')
    command = ["eval", "--text", str(file), "--text-key", "body", "--limit", "2", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["texts"], found["bytes"]) == (2, 19)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context", "300"], "a context of 300 tokens: expected 1 to the model's 256"),
        (["--stride", "0"], "a stride of 0 tokens: expected 1 to the context of 256"),
        (["--batch", "0"], "--batch and --limit: expected 1 or more"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(
    text: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
):
    status = main(["eval", "--text", str(text), *options])
    printed = capsys.readouterr()
    assert status == 2
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_no_text_and_no_harness_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "empty.txt").write_text(" \n")
    assert main(["eval", "--text", str(tmp_path)]) == 2
    assert "no text in" in capsys.readouterr().err
    import sys

    for module in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "--tasks", "hellaswag"]) == 2
    assert "pip install 'pellucid[lm-eval]'" in capsys.readouterr().err
