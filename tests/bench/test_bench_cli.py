"""`pellucid bench` as a user runs it, over a tiny shape: real workers, real turns."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch
from tiny import LLAMA

from pellucid.bench import rounds
from pellucid.checkpoints.formats.hf_config import write_config
from pellucid.cli import main
from pellucid.cli.bench import bench_arguments

FIELDS = {"at", "round", "engine", "measure", "seconds", "peak_bytes", "idle_share"}


@pytest.fixture
def shape(tmp_path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(write_config(LLAMA, torch.float32)))
    return str(path)


@pytest.mark.slow
def test_a_run_from_end_to_end(shape, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rounds, "QUICK", replace(rounds.QUICK, new=4, repeats=1, gemm=(64,)))
    engines = "pellucid/eager/float32,pellucid/eager/int8"
    options = ["--quick", "--threads", "1", "--engines", engines, "--work", str(tmp_path / "work")]
    saved = ["--save", "tiny", "--plot", "tiny.png"]
    assert main(["bench", "--shape", shape, *options, *saved, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "benchmarks/results/tiny.json").read_text()) == result
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert list(result["summary"]["engines"]) == engines.split(",")
    assert result["skipped"] == {}
    for turn in result["turns"]:
        assert turn.keys() >= FIELDS
        assert turn["seconds"] > 0
    measures = [(turn["measure"], turn["engine"]) for turn in result["turns"]]
    assert measures == [(m, e) for m in ("load", *rounds.MEASURES) for e in engines.split(",")]
    tokens = result["engines"]["pellucid/eager/float32"]["tokens"]["decode"]
    assert len(tokens) == result["settings"]["new"]
    # printed again from the file, without measuring
    assert main(["bench", "--show", "benchmarks/results/tiny.json"]) == 0
    assert "pellucid/eager/int8" in capsys.readouterr().out


def test_the_names_can_be_listed(capsys):
    assert main(["bench", "--list"]) == 0
    assert "llama.cpp/q8_0" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--engines", "nothing*"], "no engine is called 'nothing*'"),
        (["--shape", "no-such-shape"], "no-such-shape"),
        (["--rounds", "0"], "rounds is 0"),
        (["--threads", "-1"], "threads is -1"),
        (["--measures", "decode,speed"], "unknown measure 'speed': expected decode, prefill"),
        (["--baseline", "x"], "baseline 'x' is not among"),
    ],
)
def test_mistakes_are_one_line(options, complaint, capsys):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_file_that_is_no_bench_is_refused(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert main(["bench", "--show", str(tmp_path / "x.json")]) == 2
    assert "no turns in it" in capsys.readouterr().err


def test_a_work_folder_that_others_may_write_is_refused(shape, tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o777)
    options = ["--quick", "--prepare", "--engines", "pellucid/eager/float32"]
    assert main(["bench", "--shape", shape, *options, "--work", str(work)]) == 2
    assert "others may write in" in capsys.readouterr().err
    assert not list(work.iterdir())


def test_each_user_has_a_work_folder_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders = []
    for user in (1, 2):
        monkeypatch.setattr("os.getuid", lambda user=user: user)
        parser = argparse.ArgumentParser()
        bench_arguments(parser)
        folders.append(parser.parse_args([]).work)
    assert folders[0].parent == tmp_path and folders[0] != folders[1]
