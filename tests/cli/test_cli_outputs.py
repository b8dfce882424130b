"""Files that verbs write: whole or absent, replaced only when told, and never a model's own."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from pellucid.cli import main
from pellucid.files import check_output, file_beside, is_model_file, write_whole
from pellucid.trace import Trace

PROMPT = "import os"


@pytest.fixture(autouse=True)
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def writers(path):
    return (
        ["info", "demo", "--no-diagram", "--svg", str(path)],
        ["walk", PROMPT, "--html", str(path)],
        ["diff", "demo", "demo", "-p", PROMPT, "--html", str(path)],
        ["trace", PROMPT, "--only", "logits", "-o", str(path)],
    )


@pytest.mark.parametrize("number", range(4))
def test_what_is_there_stays_unless_forced_and_a_models_file_always(tmp_path, capsys, number):
    there, model = tmp_path / "out.page", tmp_path / "config.json"
    for path in (there, model):
        path.write_text("mine")
    words = writers(there)[number]
    assert main(words) == 2
    assert "--force replaces it" in capsys.readouterr().err and there.read_text() == "mine"
    assert main([*writers(model)[number], "--force"]) == 2
    assert "part of a model" in capsys.readouterr().err and model.read_text() == "mine"
    link = tmp_path / "link"
    link.symlink_to(there)
    assert main([*writers(link)[number], "--force"]) == 0
    assert link.is_symlink() and there.stat().st_size > 100
    assert stat.S_IMODE(there.stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "link", "out.page"]


def test_a_new_file_has_the_mode_that_the_umask_leaves_and_an_old_one_its_own(tmp_path):
    path = tmp_path / "t.safetensors"
    Trace({"logits": torch.ones(2)}).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o600)
    Trace({"logits": torch.zeros(2)}).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert torch.equal(Trace.load(path)["logits"], torch.zeros(2))


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "whole")
    reader.join(10)
    assert read == ["whole"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    write_whole(type(pipe)(os.devnull), "gone")
    assert not type(pipe)(os.devnull).is_file()


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(RuntimeError), file_beside(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["page.html"]


def test_which_files_belong_to_a_model(tmp_path):
    names = ("model.safetensors", "model-00001-of-00002.safetensors", "params.json", "merges.txt")
    for name in (*names, "tokenizer.json", "consolidated.00.pth", "x.gguf"):
        assert is_model_file(tmp_path / name)
    for name in ("page.html", "trace.safetensors", "report.json", "notes.txt"):
        assert not is_model_file(tmp_path / name)
        check_output(tmp_path / name, False, "-o")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "w.safetensors"}}')
    assert is_model_file(tmp_path / "w.safetensors")


def test_a_folder_is_no_output_and_neither_is_a_file_in_none(tmp_path):
    with pytest.raises(ValueError, match="-o .*: it is a folder; give a file"):
        check_output(tmp_path, True, "-o")
    with pytest.raises(ValueError, match="-o .*: there is no folder .*none; give a file"):
        check_output(tmp_path / "none" / "page.html", True, "-o")


def test_plots_are_replaced_only_when_told(tmp_path, capsys):
    (tmp_path / "logits.png").write_text("mine")
    assert main(["walk", PROMPT, "--plots", str(tmp_path)]) == 2
    assert "--force replaces them" in capsys.readouterr().err


def test_no_model_takes_the_place_of_the_folder_one_stands_in(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--to", "meta"], ["--to", "int8"]):
        assert main(["convert", "demo", ".", *words]) == 2
        assert "you are in this folder" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/{}"])
def test_standard_output_is_written_into_even_where_it_is_a_file(tmp_path, name):
    """As in ``pellucid info MODEL --svg /dev/stdout >> FILE``: what is there already stays."""
    target = tmp_path / "redirected"
    target.write_text("before\n")
    kept = os.dup(1)
    opened = os.open(target, os.O_WRONLY | os.O_APPEND)
    try:
        os.dup2(opened, 1)
        path = Path(name.format(opened))
        check_output(path, force=False, flag="--svg")
        write_whole(path, "<svg/>")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(opened)
    assert target.read_text() == "before\n<svg/>"
    assert [each.name for each in tmp_path.iterdir()] == ["redirected"]
