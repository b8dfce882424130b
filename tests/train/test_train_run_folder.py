"""A checkpoint that could not be written leaves nothing behind, and the one before it in place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pellucid
from pellucid.train import run_folder


def test_a_checkpoint_that_fails_leaves_nothing(tmp_path: Path):
    def good(folder: Path) -> None:
        folder.mkdir()

    def bad(folder: Path) -> None:
        folder.mkdir()
        folder.with_name(f"{folder.name}.sharded").mkdir()  # what several ranks write beside it
        raise OSError("No space left on device")

    run_folder.publish(tmp_path, run_folder.LAST, 3, good)
    with pytest.raises(OSError, match="step 6 could not be saved: No space .*/last holds step 3"):
        run_folder.publish(tmp_path, run_folder.LAST, 6, bad)
    left = [path.name for path in (tmp_path / run_folder.CHECKPOINTS).iterdir()]
    assert left == ["last-00000003"]


def test_the_checkpoint_before_the_last_stays_and_none_before_it(tmp_path: Path):
    for step in (1, 2, 3, 3):
        run_folder.publish(tmp_path, run_folder.LAST, step, Path.mkdir)
        run_folder.publish(tmp_path, run_folder.BEST, step, Path.mkdir)
    left = sorted(path.name for path in (tmp_path / run_folder.CHECKPOINTS).iterdir())
    assert left == ["best-00000003-2", "last-00000003", "last-00000003-2"]
    assert (tmp_path / run_folder.LAST).resolve().name == "last-00000003-2"


def test_a_folder_is_locked_for_other_processes_and_free_afterwards(tmp_path: Path):
    run = tmp_path / "run"
    code = "import sys; from pathlib import Path; from pellucid.train import run_folder as f\n"
    code += "with f.locked(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(pellucid.__file__).parents[1],
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(OSError, match="run is in use: another run writes into it"):
        run_folder.locked(run).__enter__()
    other.kill()
    other.communicate()
    with run_folder.locked(run):
        assert run.is_dir()
    assert run.is_dir()
    run.rmdir()
    with run_folder.locked(run):
        pass
    assert not run.exists()  # what was never written into leaves no folder
    run.write_text("")
    with pytest.raises(NotADirectoryError, match="run is a file: expected a folder"):
        run_folder.locked(run).__enter__()
