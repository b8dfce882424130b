"""``pellucid train --tokenise-only``: what a later run maps, and does not tokenise again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pellucid.cli import main

SHAPE = ["--width", "16", "--heads", "2", "--layers", "1", "--context", "16", "--batch", "2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(50):
        (folder / f"{number:02}.txt").write_text(f"This is text number {number}.\n" * 9)
    return folder


def test_a_run_maps_the_tokens_that_are_there(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    command = ["train", "--data", str(text), "--out", str(out), "--vocab", "300"]
    assert main([*command, "--tokenise-only", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)
    assert tokens["folder"] == str(out / "tokens")
    assert tokens["vocab_size"] == 300
    written = {path: path.stat().st_mtime_ns for path in (out / "tokens").iterdir()}
    training = ["--steps", "2", "--warmup", "1", "--json", *SHAPE]
    assert main([*command, *training]) == 0
    run = json.loads(capsys.readouterr().out)
    for count in ("training_tokens", "held_out_tokens"):
        assert run[count] == tokens[count] > 0
    assert {path: path.stat().st_mtime_ns for path in (out / "tokens").iterdir()} == written


def test_two_runs_share_a_folder_and_a_third_with_another_vocabulary_may_not(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def tokenise(out: str, vocab: str) -> int:
        command = ["train", "--data", str(text), "--out", str(tmp_path / out), "--vocab", vocab]
        return main([*command, "--tokens", str(tmp_path / "shared"), "--tokenise-only"])

    assert tokenise("one", "300") == tokenise("two", "300") == 0
    assert f"for validation, of 300 kinds, in {tmp_path / 'shared'}" in capsys.readouterr().out
    assert tokenise("three", "301") == 2
    said = capsys.readouterr().err
    assert "shared was written with another tokenizer: give another folder" in said
    assert said.count("\n") == 1


def test_text_that_is_not_tokenised_into_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: Path
):
    assert main(["train", "--stdlib", "--out", str(tmp_path / "run"), "--tokenise-only"]) == 2
    assert "--tokenise-only is for --data" in capsys.readouterr().err
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    command = ["train", "--data", str(text), "--out", str(tmp_path / "run"), "--tokenise-only"]
    assert main(command) == 2
    assert "leave out torchrun" in capsys.readouterr().err
