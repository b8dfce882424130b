"""What a killed process leaves behind is cleared away; what a living one writes is not touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import tiny

from pellucid import checkpoints
from pellucid.files import clear_unfinished, folder_beside, move

pytest.importorskip("fcntl", reason="folders are locked with flock")

WRITER = """
import sys, time
from pathlib import Path
from pellucid.files import folder_beside
with folder_beside(Path(sys.argv[1])) as beside:
    (beside / "model.safetensors").write_bytes(b"half of it")
    print(beside.name, flush=True)
    time.sleep(60)
"""


def writer(folder) -> tuple[subprocess.Popen, str]:
    """A process that has begun to write `folder`, and the name of its hidden one."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_killed_writer_leaves_nothing_for_long(tmp_path):
    process, name = writer(tmp_path / "model")
    try:
        with folder_beside(tmp_path / "other") as beside:
            assert (tmp_path / name).is_dir(), "the other process is alive"
            assert beside.is_dir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with folder_beside(tmp_path / "third") as beside:
        assert [path.name for path in tmp_path.iterdir()] == [beside.name]
    assert list(tmp_path.iterdir()) == []


def test_only_unfinished_folders_are_cleared(tmp_path):
    target = tmp_path / "elsewhere"
    kept = [".model.0123abcd.old", "model.0123abcd.part", ".model.part", ".x.0123ABCD.part", "a"]
    for name in kept:
        (tmp_path / name).mkdir()
    target.mkdir()
    (tmp_path / ".link.0123abcd.part").symlink_to(target)
    (tmp_path / ".file.0123abcd.part").write_text("a file")
    (tmp_path / ".model.0123abcd.part").mkdir()
    (tmp_path / ".model.0123abcd.part" / "config.json").write_text("{}")
    before = set(os.listdir(tmp_path))
    clear_unfinished(tmp_path)
    assert before - set(os.listdir(tmp_path)) == {".model.0123abcd.part"}
    clear_unfinished(tmp_path / "absent")


def test_saving_clears_what_a_killed_save_left(tmp_path):
    (tmp_path / ".model.0123abcd.part").mkdir()
    config = tiny.LLAMA
    checkpoints.save(tmp_path / "model", config, tiny.random_model(config).state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_moved_into_place_stays(tmp_path):
    with folder_beside(tmp_path / "deep" / "model") as beside:
        (beside / "config.json").write_text("{}")
        move(beside, tmp_path / "deep" / "model")
        clear_unfinished(tmp_path / "deep")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    clear_unfinished(tmp_path / "deep")
    assert (tmp_path / "deep" / "model" / "config.json").read_text() == "{}"


def test_without_locks_nothing_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (tmp_path / ".model.0123abcd.part").mkdir()
    with folder_beside(tmp_path / "model") as beside:
        clear_unfinished(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        assert beside.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [".model.0123abcd.part"]
