"""Runs that an earlier version left half way go on, step for step, to the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import frozen_files
import frozen_traces
import pytest
import torch
from frozen_training import FINETUNED, HERE, RUNS, STEPS, begin, restored, sources
from safetensors.torch import load_file

import pellucid
from pellucid.cli import main

CLOSE = 1e-5  # of losses and weights, where the machine's arithmetic is another


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def the_end(name: str) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
    """Log and last weights of the run that nobody stopped."""
    ends = HERE / "runs" / "ends"
    return json.loads((ends / f"{name}.json").read_text()), load_file(ends / f"{name}.safetensors")


def assert_ended_alike(run: Path, name: str, *, bits: bool) -> None:
    """Every row of the log, and every weight."""
    rows, weights = the_end(name)
    found = frozen_files.log(run)
    assert len(found) == STEPS
    if bits:
        assert found == rows
    for now, then in zip(found, rows, strict=True):
        assert [bool(value) for value in now] == [bool(value) for value in then]
        assert now[:2] == then[:2]
        numbers = [[float(value or 0) for value in row[2:]] for row in (now, then)]
        assert numbers[0] == pytest.approx(numbers[1], rel=CLOSE, abs=CLOSE)
    files = sorted((run / "last").glob("*.safetensors"))
    now = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert now.keys() == weights.keys()
    for key, tensor in weights.items():
        assert (now[key].shape, now[key].dtype) == (tensor.shape, tensor.dtype), key
        if bits:
            assert torch.equal(now[key], tensor), key
        torch.testing.assert_close(now[key], tensor, rtol=CLOSE, atol=10 * CLOSE)


@pytest.mark.parametrize("name", [*RUNS, *FINETUNED])
def test_a_run_of_an_earlier_version_goes_on_bit_for_bit(name, tmp_path, capsys):
    run = restored(tmp_path, name)
    assert len(frozen_files.log(run)) == STEPS // 2
    verb = "train" if name in RUNS else "finetune"
    torch.manual_seed(123456)  # another process would stand elsewhere
    more = [f"--stop={STEPS}"] if name in RUNS else []
    assert main([verb, "--out", str(run), "--resume", *more, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["steps"], summary["interrupted"]) == (STEPS, False)
    assert_ended_alike(run, name, bits=frozen_traces.same_machine())


@pytest.mark.parametrize("name", [*RUNS, *FINETUNED])
def test_a_run_from_the_start_is_what_it_was(name, tmp_path):
    here = sources(tmp_path.resolve(), name)
    begin([*{**RUNS, **FINETUNED}[name][0], "--out", str(here / "run")], here)
    assert_ended_alike(here / "run", name, bits=frozen_traces.same_machine())


@pytest.mark.parametrize("name", [*RUNS, *FINETUNED])
def test_a_run_leaves_the_files_it_did(name, tmp_path):
    """The same names in its folder, so that what reads a run finds what it looks for."""
    argv, half = {**RUNS, **FINETUNED}[name]
    here = sources(tmp_path.resolve(), name)
    # Samples began with "def"; now they begin as the text does, and a config says so by no line.
    sampled = ["--prompt", "def"] if name in RUNS else []
    begin([*argv, "--out", str(here / "run"), *half, *sampled], here)
    frozen_files.keep(here / "run", here / "kept", here)
    kept, now = HERE / "runs" / name, here / "kept"
    files = {str(path.relative_to(kept)) for path in kept.rglob("*")}
    assert files <= {str(path.relative_to(now)) for path in now.rglob("*")}
    lines = iter((now / "config.toml").read_text().splitlines())
    for line in (kept / "config.toml").read_text().splitlines():
        assert line in lines, f"config.toml has no more: {line}"  # newer settings may stand between


def test_a_run_that_stopped_can_be_loaded(tmp_path):
    run = restored(tmp_path, "llama")
    for name in ("last", "best"):
        assert pellucid.load(run / name).trace("def x")["logits"].isfinite().all()


def test_one_process_goes_on_with_a_run_of_two_ranks(tmp_path, capsys):
    """DCP's files of an earlier version, read without ranks: other sums, the same run."""
    run = restored(tmp_path, "sharded")
    assert (run / "last" / "sharded" / ".metadata").is_file()
    assert main(["train", "--out", str(run), "--resume", f"--stop={STEPS}", "--json"]) == 0
    capsys.readouterr()
    assert not (run / "last" / "sharded").exists()
    assert_ended_alike(run, "sharded", bits=False)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_go_on_with_a_run_of_two_ranks(tmp_path):
    run = restored(tmp_path, "sharded")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node=2", "-m", "pellucid"]
    go_on = ["train", "--out", str(run), "--resume", f"--stop={STEPS}", "--json"]
    done = subprocess.run(
        [*launcher, *go_on],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == STEPS
    # Written anew as slices in safetensors: nothing pickled is left of the older checkpoint.
    assert not (run / "last" / "sharded").exists()
    assert_ended_alike(run, "sharded", bits=frozen_traces.same_machine())
