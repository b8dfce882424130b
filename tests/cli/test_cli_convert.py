"""`pellucid convert` as a user runs it."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import LLAMA, random_model

from pellucid import checkpoints, cli


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = random_model(replace(LLAMA, vocab_size=96, width=32, head_dim=8))
    checkpoints.save(tmp_path / "a", model.config, model.state_dict(), dtype=torch.float32)
    return tmp_path / "a"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = cli.main([str(each) for each in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_report(source, tmp_path, capsys):
    there = tmp_path / "b"
    status, out, err = run(capsys, "convert", source, there, "--to", "meta", "--shards", 2)
    assert (status, err) == (0, "")
    count = len(checkpoints.open_checkpoint(source).weights)
    assert f"converted back {count} of {count} tensors bit-equal" in out
    assert "equal in every bit on 16 tokens" in out
    for path in there.iterdir():
        assert f"{path.name:<19}  {path.stat().st_size:>15,} bytes" in out
    written = sum(path.stat().st_size for path in there.iterdir())
    assert f"{written:,} bytes in 3 files" in out
    assert all(len(line) < 200 for line in out.splitlines())


def test_the_source_stands_first_or_behind_m(source, tmp_path, capsys):
    for number, argv in enumerate((("-m", source), (source,), ("--to", "hf", source))):
        status, _, err = run(capsys, "convert", *argv, tmp_path / f"to{number}", "--to", "hf")
        assert (status, err) == (0, "")
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "convert", source, "-m", source, tmp_path / "x", "--to", "hf")
    assert "two models are given" in capsys.readouterr().err
    status, _, err = run(capsys, "convert", tmp_path / "x", "--to", "hf")
    assert status == 2 and "pellucid convert SRC DST" in err and err.count("\n") == 1
    status, _, err = run(capsys, "diff", "-m", source, source)
    assert status == 2 and "pellucid diff A B" in err and err.count("\n") == 1


def test_json_and_its_digests(source, tmp_path, capsys):
    status, out, err = run(capsys, "convert", source, tmp_path / "b", "--to", "hf", "--json")
    found = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    weights = checkpoints.open_checkpoint(tmp_path / "b").weights
    assert found["tensors"] == len(found["digests"]) == len(weights)
    for name, digest in found["digests"].items():
        tensor = weights[name].contiguous()
        header = f"{name} torch.float32 {tuple(tensor.shape)}\n".encode()
        assert hashlib.sha256(header + tensor.numpy().tobytes()).hexdigest() == digest
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(found["digests"].items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == found["digest"]
    assert found["files"].keys() == {"config.json", "model.safetensors"}
    assert found["bytes"] == sum(found["files"].values())
    assert (found["layout"], found["dtype"], found["tokens"]) == ("hf", "float32", 16)


def test_sizes(source, tmp_path, capsys):
    arguments = ("--to", "hf", "--max-shard-size", "20K", "--dtype", "bfloat16")
    status, _, _ = run(capsys, "convert", source, tmp_path / "b", *arguments)
    assert status == 0
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert checkpoints.open_checkpoint(tmp_path / "b").dtype == torch.bfloat16
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", "x", "y", "--to", "hf", "--max-shard-size", "large"])
    assert "'large': expected a size such as 500M or 5G" in capsys.readouterr().err


def test_errors_are_one_line(source, tmp_path, capsys):
    for arguments, message in (
        ((source, source, "--to", "meta"), "not empty; convert into a new folder"),
        ((source, tmp_path / "b", "--to", "meta", "--shards", 5), "does not divide by 5"),
        ((tmp_path / "none", tmp_path / "b", "--to", "hf"), "no such folder"),
        ((source, tmp_path / "b", "--to", "hf", "--context-length", 9), "context length 9"),
    ):
        status, out, err = run(capsys, "convert", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("pellucid convert: ") and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_bar_on_a_terminal_only(source, tmp_path, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(["convert", str(source), str(tmp_path / "b"), "--to", "hf"]) == 0
    for stage in ("writing", "checking", "computing logits"):
        assert stage in terminal.getvalue()
