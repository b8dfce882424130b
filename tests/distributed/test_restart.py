"""One run that passes through one process, two ranks of which one is killed, and one again."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pellucid import checkpoints
from pellucid.cli import main

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("killed_rank.py")
SIZES = ["--vocab=300", "--width=16", "--layers=2", "--heads=2", "--context=16", "--batch=8"]
STEPS = ["--steps=10", "--warmup=2", "--precision=float32", "--eval-every=5"]
QUIET = ["--sample-every=0", "--save-every=2", "--no-tensorboard", "--no-plot", "--json"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.py"
    lines = [f"def number_{n}(x):\n    return x + {n * n}\n" for n in range(150)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def torchrun(*command: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node=2", f"--max-restarts={restarts}", str(SCRIPT)]
    return subprocess.run(
        [*launcher, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def losses(run: Path) -> list[float]:
    with (run / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


def test_a_killed_rank_and_a_changing_number_of_ranks_change_no_loss(text, tmp_path, capsys):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    begin = ["train", "--data", str(text), *SIZES, *STEPS, *QUIET]
    go_on = ["train", "--out", str(moved), "--resume", "--json"]
    assert main([*begin, "--out", str(whole)]) == 0
    assert main([*begin, "--out", str(moved), "--stop", "3"]) == 0
    spread = [*go_on, "--parallel", "fsdp", "--stop", "8"]
    done = torchrun("1", "7", *spread, restarts=1)  # step 6 is saved, step 7 is lost with rank 1
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 8
    assert (moved / "last" / "training" / "state-00002-of-00002.safetensors").is_file()
    assert len(losses(moved)) == 8
    assert main([*go_on, "--stop", "10"]) == 0
    assert losses(moved) == pytest.approx(losses(whole), abs=2e-6)  # the log has six decimals
    assert (moved / "last" / "training" / "state.safetensors").is_file()
    read = checkpoints.load_model(checkpoints.open_checkpoint(moved / "last"))
    wanted = checkpoints.load_model(checkpoints.open_checkpoint(whole / "last"))
    for name, parameter in wanted.named_parameters():
        assert read.get_parameter(name).allclose(parameter, atol=1e-5), name
    said = capsys.readouterr()
    assert said.err == ""


def test_without_restarts_a_lost_rank_ends_the_job_and_another_job_leaves_its_run_alone(
    text, tmp_path
):
    run = tmp_path / "run"
    begin = ["train", "--data", str(text), *SIZES, *STEPS, *QUIET, "--out", str(run)]
    done = torchrun("0", "5", *begin)
    assert done.returncode == 1
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert (run / "last").resolve().name == "last-00000004"
    assert checkpoints.open_checkpoint(run / "last").config.width == 16
    assert not list((run / "checkpoints").glob(".*best*"))
    refused = torchrun("0", "5", *begin, restarts=1)  # which is tried twice
    assert refused.returncode == 1
    assert [line for line in refused.stderr.splitlines() if line.startswith("pellucid train")] == [
        f"pellucid train: --out {run} is not empty: give a new folder, --resume to go on, or "
        "--overwrite"
    ] * 2
    assert (run / "last").resolve().name == "last-00000004"
