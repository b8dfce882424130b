"""``pellucid walk`` and ``pellucid trace``: what they print, write and refuse."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

import pellucid
from pellucid.cli import main, output


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("model", ["stdlib", "stdlib-gpt2"])
def test_walk_tells_the_model_s_own_next_token(capsys, model: str):
    status, out, err = run(capsys, "walk", "for i in range", "-m", model, "--json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    lm = pellucid.load(model)
    with torch.no_grad():
        logits = lm.model(torch.tensor([told["tokens"]]))[0, -1].double()
    assert told["next_token"] == int(logits.argmax())
    assert told["top"][0]["probability"] == pytest.approx(float(logits.softmax(-1).max()), rel=0.02)
    assert "".join(told["token_strings"][1:]) == "for i in range"  # after the begin token
    assert set(told) == {
        "model", "prompt", "tokens", "token_strings", "steps", "next_token", "next_text", "top",
    }  # fmt: skip
    step = told["steps"][10]
    assert {"name", "title", "formula", "shape", "dtype", "stats"} <= set(step)
    assert set(step["stats"]) == {"min", "max", "mean", "std"}


def test_walk_in_words(capsys):
    status, out, _ = run(capsys, "walk", "import os", "--layer", "2", "--head", "3")
    assert status == 0
    assert "layers.2.attn.q[3]" in out
    assert "layers.0.attn.q[0]" not in out
    assert "Next token" in out
    assert "\x1b" not in out


def test_walk_writes_page_and_figures(capsys, tmp_path: Path):
    page, plots = tmp_path / "walk.html", tmp_path / "figures"
    arguments = ("walk", "import os", "--html", str(page), "--plots", str(plots))
    assert run(capsys, *arguments)[0] == 0
    assert page.read_text("utf-8").startswith("<!doctype html>")
    names = {path.name for path in plots.iterdir()}
    assert {"rope.cis.png", "layers.0.attn.pattern-0.png", "logits.png"} <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["walk", ""], "empty"),
        (["walk", "a", "--layer", "9"], "layer 9: this model has layers 0 to 3"),
        (["walk", "a", "--head", "-1"], "head -1"),
        (["walk", "a", "-m", "no-such-model"], "no such folder"),
        (["walk", "a", "--dialect", "latin"], "unknown dialect 'latin'"),
        (["walk", "a " * 400, "-m", "stdlib-gpt2"], "256"),
        (["walk", "a", "--html", "/no/such/folder/x.html"], "folder"),
    ],
)
def test_walk_refuses(capsys, arguments: list[str], message: str):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_trace_writes_a_file_anything_can_read(capsys, tmp_path: Path):
    path = tmp_path / "run.safetensors"
    only = ["--only", "*.attn.pattern", "--only", "logits"]
    status, out, _ = run(capsys, "trace", "import os", "-o", str(path), *only, "--generate", "2")
    assert status == 0
    assert "layers.*.attn.pattern" in out
    with safe_open(path, "np") as file:
        names = set(file.keys())
        assert file.metadata()["model"] == "demo"
    assert {"layers.3.attn.pattern", "step.2.layers.0.attn.pattern", "step.1.logits"} <= names
    assert not any("resid" in name for name in names)
    status, _, err = run(capsys, "trace", "import os", "-o", str(path))
    assert status == 2
    assert "--force" in err
    assert run(capsys, "trace", "import os", "-o", str(path), "--force", "--json")[0] == 0


def test_steps_and_status_share_a_console(capsys, monkeypatch):
    from pellucid.show import walk_terminal

    consoles = []

    @contextmanager
    def status(console, layers):
        consoles.append(console)
        yield lambda address: None

    class Printer(walk_terminal.WalkPrinter):
        def __init__(self, console, *rest):
            consoles.append(console)
            super().__init__(console, *rest)

    def terminal(stderr=False):
        return Console(file=io.StringIO(), force_terminal=True)

    monkeypatch.setattr("pellucid.cli.walk.console", terminal)
    monkeypatch.setattr(walk_terminal, "layer_status", status)
    monkeypatch.setattr(walk_terminal, "WalkPrinter", Printer)
    assert run(capsys, "walk", "import os")[0] == 0
    assert len(consoles) == 2 and consoles[0] is consoles[1]  # else each writes over the other


def test_what_goes_away_is_shown_on_a_terminal_but_in_no_cell_of_a_notebook(monkeypatch):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert output.shows_progress(terminal)
    assert not output.shows_progress(Console(file=io.StringIO()))
    monkeypatch.setenv("JPY_PARENT_PID", "7")
    assert not output.shows_progress(terminal)
