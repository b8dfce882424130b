"""``pellucid train`` as a user runs it: text in, a model that loads out, and what goes wrong."""

from __future__ import annotations

import csv
import io
import json
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pellucid import checkpoints, tokenizers
from pellucid.cli import main
from pellucid.train.pretraining import Pretraining
from pellucid.train.step_log import COLUMNS

MODEL = ["--vocab=300", "--width=16", "--layers=1", "--heads=2", "--context=16"]
STEPS = ["--steps=8", "--batch=4", "--warmup=2", "--precision=float32"]
EVERY = ["--eval-every=4", "--sample-every=4", "--save-every=4", "--no-tensorboard", "--no-plot"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of text, a few hundred tokens long."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("one", "two"):
        lines = [f"def {name}_{number}(x):\n    return x + {number}\n" for number in range(60)]
        (folder / f"{name}.py").write_text("\n".join(lines), encoding="utf-8")
    return folder


def train(text: Path, out: Path, *more: str) -> int:
    return main(["train", "--data", str(text), "--out", str(out), *MODEL, *STEPS, *EVERY, *more])


def file(run: Path, name: str) -> bytes:
    """A file of a run's newest model."""
    return (run / "last" / name).read_bytes()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of an error a user caused."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_a_llama_from_a_folder_of_text(text: Path, tmp_path: Path, capsys):
    out = tmp_path / "model"
    assert train(text, out, "--kv-heads", "1", "--micro-batch", "2") == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said  # a pipe gets plain lines
    assert "step 8/8" in said
    assert "tokens/s" in said
    assert "\nsample at step " in said
    assert said.rstrip().endswith(f"the model is in {out / 'best'}")

    opened = checkpoints.open_checkpoint(out / "last")
    assert opened.config.family == "llama"
    assert (opened.config.n_kv_heads, opened.config.context_length) == (1, 16)
    tokenizer = tokenizers.load(out / "last")
    assert tokenizer.vocab_size == opened.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("def ü():")) == "def ü():"
    logits = checkpoints.load_model(opened)(torch.tensor([tokenizer.encode("def one")]))
    assert torch.isfinite(logits).all()

    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert [bool(row["held_out_loss"]) for row in rows] == [False, False, False, True] * 2


def test_a_gpt2_with_a_given_tokenizer_and_json_alone_on_stdout(text: Path, tmp_path: Path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(text, first, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 8
    assert summary["tokens"] == 8 * 4 * 16
    assert summary["interrupted"] is False
    assert 0 < summary["bits_per_byte"] < 8
    more = ("--family", "gpt2", "--tokenizer", str(first / "last"), "--dtype=bfloat16", "--json")
    assert train(text, second, *more) == 0
    opened = checkpoints.open_checkpoint(second / "best")
    assert opened.config.family == "gpt2"
    assert opened.dtype == torch.bfloat16
    assert checkpoints.open_checkpoint(second / "last").dtype == torch.float32
    assert file(second, "tokenizer.json") == file(first, "tokenizer.json")


def test_the_same_seed_trains_the_same_model(text: Path, tmp_path: Path):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert train(text, tmp_path / name, "--seed", seed, "--json") == 0
    files = {name: file(tmp_path / name, "model.safetensors") for name in "abc"}
    assert files["a"] == files["b"]
    assert files["a"] != files["c"]


def test_stop_ends_early_on_the_schedule_of_all_steps(text: Path, tmp_path: Path, capsys):
    assert train(text, tmp_path / "whole", "--json") == 0
    capsys.readouterr()
    assert train(text, tmp_path / "part", "--stop", "5", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["steps"], summary["interrupted"]) == (5, False)
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "part")]
    columns = [[line.split(",")[3:5] for line in log[:6]] for log in logs]  # rate and loss
    assert columns[0] == columns[1]
    assert len(logs[1]) == 6
    assert train(text, tmp_path / "never", "--stop", "9") == 2
    assert "--stop 9 is not one of the 8 steps" in one_line(capsys)


def test_init_goes_on_from_the_weights_of_a_model(text: Path, tmp_path: Path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(text, first, "--family", "gpt2", "--json") == 0
    before = json.loads(capsys.readouterr().out)
    original = file(first, "model.safetensors")
    options = [
        "train",
        "--data",
        str(text),
        "--out",
        str(second),
        "--init",
        str(first / "last"),
        *STEPS,
    ]
    assert main([*options, "--lr", "0", "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["family"] == "gpt2"
    assert after["held_out_loss"] == before["held_out_loss"]  # at rate 0 it is the same model
    assert file(second, "model.safetensors") == original
    assert file(second, "tokenizer.json") == file(first, "tokenizer.json")
    assert main([*options, "--overwrite", "--json"]) == 0
    assert file(second, "model.safetensors") != original
    assert file(first, "model.safetensors") == original
    capsys.readouterr()
    assert main([*options, "--overwrite", "--width", "32"]) == 2
    assert "leave out --width" in one_line(capsys)


def test_an_output_folder_with_something_in_it_is_kept(text: Path, tmp_path: Path, capsys):
    out = tmp_path / "model"
    assert train(text, out, "--json") == 0
    before = file(out, "model.safetensors")
    capsys.readouterr()
    assert train(text, out, "--seed", "9") == 2
    assert "is not empty" in one_line(capsys)
    assert file(out, "model.safetensors") == before
    assert train(text, out, "--seed", "9", "--json", "--overwrite") == 0
    assert file(out, "model.safetensors") != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "5000"], "needs at least 5,001"),
        (["--family", "gpt2", "--kv-heads", "1"], "--kv-heads is for llama"),
        (["--heads", "3"], "--width 16 does not divide into --heads 3"),
        (["--warmup", "8"], "8 steps of warmup"),
        (["--lr", "-1"], "learning rate from -1"),
        (["--micro-batch", "3"], "does not divide into passes of 3"),
        (["--vocab", "100"], "vocab_size 100 is too small"),
        (["--vocab", "2147483648"], "vocab_size 2,147,483,648: expected 4,194,304 or fewer"),
        (["--layers", "2147483648"], "weights or more would hold"),
        (["--hidden", "2147483648"], "weights or more would hold"),
        (["--batch", "2147483648"], "a batch of 2,147,483,648 rows"),
        (["--tokenizer", "/nowhere"], "/nowhere does not exist"),
        (["--hold-out", "1"], "2 or more"),
        (["--dropout", "0.1"], "is for gpt2"),
        (["--stdlib"], "give either data, files and folders of text, or stdlib"),
        (["--epochs", "2"], "8 steps and 2 epochs: give one of them"),
        (["--preset", "book"], "no preset is called 'book'"),
        (["--config", "/nowhere.toml"], "/nowhere.toml: no such config file"),
        (["--no-begin", "--copies", "1", "--order", "random"], "need order seeded"),
    ],
)
def test_wrong_options_are_one_line(
    text: Path, tmp_path: Path, capsys, options: list[str], message: str
):
    assert train(text, tmp_path / "model", *options) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "model" / "last").exists()


def test_no_text_is_one_line(tmp_path: Path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert train(empty, tmp_path / "model") == 2
    assert "no text to train on" in one_line(capsys)


def test_a_diverging_run_keeps_the_last_checkpoint(text: Path, tmp_path: Path, capsys):
    out = tmp_path / "model"
    assert train(text, out, "--lr", "1e30", "--clip", "0", "--json") == 2
    line = one_line(capsys)
    assert "step 2 has loss" in line
    assert "norm nan" in line
    assert f"{out / 'last'} holds step 0" in line
    weights = checkpoints.open_checkpoint(out / "last").weights
    assert all(torch.isfinite(weights[name]).all() for name in weights)


def test_ctrl_c_finishes_the_step_and_saves(text: Path, tmp_path: Path, capsys, monkeypatch):
    between_steps = Pretraining.between_steps

    def interrupted(run: Pretraining, progress, log) -> None:
        between_steps(run, progress, log)
        if progress.step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Pretraining, "between_steps", interrupted)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "model"
    assert train(text, out, "--json") == 130
    assert signal.getsignal(signal.SIGINT) is before
    summary = json.loads(capsys.readouterr().out)
    assert (summary["steps"], summary["interrupted"]) == (3, True)
    monkeypatch.undo()
    # Three steps of a longer run: what was saved is not the model the run began with.
    untrained = tmp_path / "untrained"
    assert train(text, untrained, "--json", "--lr", "0") == 0
    saved, begun = (checkpoints.open_checkpoint(each / "last").weights for each in (out, untrained))
    assert not torch.equal(saved["embed.weight"], begun["embed.weight"])


def test_a_terminal_gets_a_bar_and_the_samples_above_it(text: Path, tmp_path: Path, monkeypatch):
    screen = io.StringIO()

    def terminal(*, stderr: bool = False) -> Console:
        return Console(file=screen, force_terminal=True, width=80, highlight=False)

    monkeypatch.setattr("pellucid.cli.train.console", terminal)
    assert train(text, tmp_path / "model") == 0
    shown = screen.getvalue()
    assert "8/8" in shown
    assert "\x1b[2K" in shown  # the bar's line is drawn over
    assert "step 8/8" not in shown
    assert "0:00 left  loss" in shown
    assert "sample at step" in shown  # the sample
