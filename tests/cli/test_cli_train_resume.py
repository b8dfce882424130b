"""Runs that are interrupted, killed or out of disk space, and what is left of them."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pellucid import checkpoints
from pellucid.cli import main
from pellucid.train import run_folder
from pellucid.train.pretraining import Pretraining

MODEL = ["--family=gpt2", "--vocab=300", "--width=16", "--layers=2", "--heads=2", "--context=16"]
# 12 steps of 4 rows are several epochs of this text; dropout draws random numbers at every step.
STEPS = ["--steps=12", "--batch=4", "--micro-batch=2", "--warmup=2", "--precision=float32"]
EVERY = ["--eval-every=4", "--sample-every=0", "--save-every=3", "--no-tensorboard", "--no-plot"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = [f"def one_{number}(x):\n    return x + {number}\n" for number in range(40)]
    path = tmp_path / "text.py"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def command(text: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(text), "--out", str(out), "--dropout=0.2"]
    return ["train", *data, *MODEL, *STEPS, *EVERY, "--json", *more]


def log(out: Path) -> list[list[str]]:
    """Step, loss, gradient norm and held-out loss of every step."""
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        [row[key] for key in ("step", "loss", "gradient_norm", "held_out_loss")] for row in rows
    ]


def weights(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return dict(checkpoints.open_checkpoint(out / name).weights)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("order", ["seeded", "random", "dataloader"])
def test_a_stopped_run_goes_on_bit_for_bit(text: Path, tmp_path: Path, order: str):
    more = [f"--order={order}"]
    if order == "dataloader":
        more += ["--eval-first", "--loss=plain"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(text, whole, *more)) == 0
    assert main(command(text, parts, *more, "--stop=5")) == 0  # in the middle of an epoch
    assert main(["train", "--out", str(parts), "--resume", "--stop=7", "--json"]) == 0
    torch.manual_seed(123456)  # another process would stand elsewhere
    assert main(["train", "--out", str(parts), "--resume", "--stop=12", "--json"]) == 0
    assert log(parts) == log(whole)
    assert len(log(whole)) == 12
    assert same(weights(parts), weights(whole))
    assert same(weights(parts, "best"), weights(whole, "best"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
def test_a_compiled_run_goes_on_bit_for_bit(text: Path, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(text, whole, "--compile", "--steps=6")) == 0
    assert main(command(text, parts, "--compile", "--steps=6", "--stop=3")) == 0
    torch._dynamo.reset()  # another process would compile anew
    torch.manual_seed(123456)
    assert main(["train", "--out", str(parts), "--resume", "--stop=6", "--json"]) == 0
    assert log(parts) == log(whole)
    assert same(weights(parts), weights(whole))
    torch._dynamo.reset()


def test_ctrl_c_and_going_on(text: Path, tmp_path: Path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(text, whole)) == 0
    between_steps = Pretraining.between_steps

    def interrupted(run: Pretraining, progress, log) -> None:
        between_steps(run, progress, log)
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Pretraining, "between_steps", interrupted)
    assert main(command(text, parts)) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert main(["train", "--out", str(parts), "--resume", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["steps"], summary["interrupted"]) == (12, False)
    assert log(parts) == log(whole)
    assert same(weights(parts), weights(whole))


@pytest.mark.slow
def test_kill_9_leaves_a_whole_checkpoint_to_go_on_from(text: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    slow = ["--steps=400", "--save-every=1"]  # the later flag wins; nearly all its time is saving
    assert main(command(text, whole, *slow, "--stop=12")) == 0
    running = subprocess.Popen(
        [sys.executable, "-m", "pellucid", *command(text, killed, *slow)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log_file = killed / "log.csv"
    while not log_file.exists() or log_file.read_text().count("\n") < 5:
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.wait()
    reached = len(log(killed))
    assert main(["train", "--out", str(killed), "--resume", f"--stop={reached + 3}", "--json"]) == 0
    both = min(12, reached + 3)
    assert log(killed)[:both] == log(whole)[:both]
    assert len(log(killed)) == reached + 3
    leftovers = [path.name for path in (killed / "checkpoints").iterdir()]
    kinds = sorted(name.split("-")[0] for name in leftovers)
    assert kinds in (["last", "last"], ["best", "last", "last"])


@pytest.mark.parametrize("place", ["weights", "state", "fsync", "rename", "link"])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    text: Path, tmp_path: Path, monkeypatch, capsys, place: str
):
    out = tmp_path / "run"
    assert main(command(text, out, "--stop=3")) == 0
    before = weights(out)
    capsys.readouterr()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {
        "weights": (sys.modules["pellucid.checkpoints.save"], "write_weights"),
        "state": (sys.modules["pellucid.train.slices"], "save_file"),
        "fsync": (os, "fsync"),
        "rename": (Path, "rename"),
        "link": (os, "replace"),
    }[place]
    monkeypatch.setattr(*target, full)
    assert main(["train", "--out", str(out), "--resume", "--stop=12", "--json"]) == 2
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error
    assert f"{out / 'last'} holds step 3" in error
    assert same(weights(out), before)
    assert main(["train", "--out", str(out), "--resume", "--stop=12", "--json"]) == 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda last: flip(last / "model.safetensors"), "model.safetensors is damaged"),
        (lambda last: flip(last / "training/state.safetensors"), "state.safetensors is damaged"),
        (lambda last: (last / "training/state.safetensors").unlink(), "is missing"),
        (lambda last: (last / "training/state.json").write_text("{"), "state.json is damaged"),
        (lambda last: (last / "training/state.json").unlink(), "no training state"),
        (lambda last: last.unlink(), "holds no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(text: Path, tmp_path: Path, capsys, damage, message: str):
    out = tmp_path / "run"
    assert main(command(text, out, "--stop=3")) == 0
    capsys.readouterr()
    damage(out / "last")
    assert main(["train", "--out", str(out), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("damaged", ["model.safetensors", "training/state.json", "link"])
def test_a_damaged_checkpoint_names_the_one_before_it(
    text: Path, tmp_path: Path, capsys, damaged: str
):
    whole, out = tmp_path / "whole", tmp_path / "a run"
    assert main(command(text, whole)) == 0
    assert main(command(text, out, "--stop=7")) == 0  # saved after steps 3, 6 and 7
    capsys.readouterr()
    before = out / "checkpoints" / "last-00000006"
    if damaged == "link":
        (out / "last").unlink()
        before = out / "checkpoints" / "last-00000007"
    else:
        flip(out / "last" / damaged)
    resume = ["train", "--out", str(out), "--resume", "--stop=12", "--json"]
    assert main(resume) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    advice = re.search(r"of step (\d+) is whole: to go on from there, (ln .*) and", error)
    assert advice is not None
    assert int(advice[1]) == int(before.name[-8:])
    subprocess.run(advice[2], shell=True, check=True)
    assert (out / "last").resolve() == before
    assert main(resume) == 0
    assert log(out) == log(whole)
    assert same(weights(out), weights(whole))


def test_where_both_are_damaged_none_is_named(text: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    assert main(command(text, out, "--stop=6")) == 0
    for folder in (out / "checkpoints").glob("last-*"):
        flip(folder / "model.safetensors")
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--json"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.safetensors is damaged" in error
    assert "is whole" not in error


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"], ["--tokenise-only"]])
def test_a_second_run_in_a_folder_is_refused(text: Path, tmp_path: Path, capsys, more: list[str]):
    out = tmp_path / "run"
    assert main(command(text, out, "--stop=3")) == 0
    before = weights(out)
    capsys.readouterr()
    begin = ["train", "--out", str(out), "--json"]
    again = begin if "--resume" in more else command(text, out)
    with run_folder.locked(out):  # a lock is of an opened file: another one in here is refused too
        assert main([*again, *more]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"pellucid train: --out {out} is in use: another run writes into it; wait for its end, or "
        "give another folder\n"
    )
    assert same(weights(out), before)
    assert main([*begin, "--resume", "--stop=4"]) == 0


def test_going_on_with_other_settings_or_another_text_is_refused(
    text: Path, tmp_path: Path, capsys
):
    out = tmp_path / "run"
    assert main(command(text, out, "--stop=3")) == 0
    capsys.readouterr()
    resume = ["train", "--out", str(out), "--resume"]
    assert main([*resume, "--lr=1"]) == 2
    assert "where lr is 0.003, not 1.0: leave out --lr" in capsys.readouterr().err
    assert main([*resume, "--lr=0.003", "--stop=4", "--json"]) == 0  # said again is fine
    capsys.readouterr()
    text.write_text(text.read_text() + "# more\n" * 50)
    assert main(resume) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["train", "--out", str(tmp_path / "none"), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_training_ends_early_when_nothing_gets_better(text: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    more = ["--lr=0", "--eval-every=1", "--patience=3", "--save-every=0"]
    assert main(command(text, out, *more)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 4  # the first is the best; three more are not better
    assert summary["stopped_early"]
    assert not summary["interrupted"]
    assert summary["best_step"] == 1
