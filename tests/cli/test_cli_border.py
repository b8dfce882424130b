"""Typing mistakes, devices, closed streams, encodings: one line at most, and no traceback."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
import weakref
from importlib import import_module
from pathlib import Path

import pytest
import torch

from pellucid import cli
from pellucid.cli.parser import VerbParser
from pellucid.devices import as_device
from pellucid.spelling import nearest

# The least that each verb takes, so that only the device can be wrong.
LEAST = {
    "walk": ["walk", "a"],
    "trace": ["trace", "a", "-o", "t.safetensors"],
    "generate": ["generate", "a"],
    "chat": ["chat"],
    "eval": ["eval", "--text", "no-such.txt"],
    "train": ["train", "--data", "no-such.txt", "--out", "run"],
    "finetune": ["finetune", "demo", "--data", "no-such.txt", "--out", "run"],
    "serve": ["serve", "demo"],
}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        status = cli.main(list(words))
    except SystemExit as ended:
        status = int(ended.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """A command line as a shell runs it; `pellucid` is this Python's."""
    command = command.replace("pellucid", f"{sys.executable} -m pellucid", 1)
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)


def options(verb: str) -> list[str]:
    parser = VerbParser("pellucid", "")
    getattr(import_module(cli.VERBS[verb][0]), f"{verb}_arguments")(parser)
    return list(parser._option_string_actions)


# ── Typing mistakes ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["wlak"], "walk"),
        (["Generate"], "generate"),
        (["evaluate"], "eval"),
        (["walk", "a", "--lyaer", "1"], "--layer"),
        (["walk", "a", "--lyaer=1"], "--layer"),
        (["trace", "a", "--onyl", "logits"], "--only"),  # also without the -o that it needs
        (["eval", "--txt", "a.txt"], "--text"),  # also without one of those that it needs
        (["diff", "a", "b", "--dtypea", "float32"], "--dtype-a"),
        (["generate", "a", "--temprature", "0"], "--temperature"),
        (["walk", "a", "-m", "dmeo"], "demo"),
        (["info", "gtp2"], "gpt2"),
        (["info", "llama3-8b"], "llama-3-8b"),
    ],
)
def test_a_mistyped_word_is_one_line_that_names_the_nearest(words, meant, capsys):
    status, out, err = run(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"pellucid {words[0]}: ")
    assert err.endswith(f"; did you mean {meant}?\n")


def test_a_mistyped_folder_names_the_one_beside_it(tmp_path: Path, capsys):
    (tmp_path / "my-llama").mkdir()
    status, _, err = run(capsys, "generate", "a", "-m", str(tmp_path / "my-lama"))
    assert status == 2
    assert err.endswith(f"; did you mean {tmp_path / 'my-llama'}?\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["walk", "a", "--qqqq"], "there is no flag --qqqq; pellucid walk --help lists the flags"),
        (["generate", "a", "--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["trace", "a"], "the following arguments are required: -o/--output"),
        (["info", "demo", "demo"], "unrecognized arguments: demo"),
        (["walk", "--layer", "x"], "argument --layer: invalid int value: 'x'"),
        (["quantum"], "no such verb; expected one of walk"),
    ],
)
def test_other_mistakes_are_one_line_without_usage(words, line, capsys):
    status, out, err = run(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"pellucid {words[0]}: {line}")
    assert "did you mean" not in err


def test_what_stands_behind_a_double_dash_is_no_flag(capsys):
    status, _, err = run(capsys, "generate", "--dtype", "float8", "--", "--lyaer")
    assert (status, err.count("\n")) == (2, 1)
    assert "float8" in err and "--lyaer" not in err


def test_nearest_knows_when_nothing_is_near():
    assert nearest("wlak", ["walk", "trace"]) == "walk"
    assert nearest("WALK", ["walk", "trace"]) == "walk"
    assert nearest("xyz", ["walk", "trace"]) is None


# ── Devices ──────────────────────────────────────────────────────────────────────────────────────


def test_the_verbs_with_a_device_are_those_below():
    assert {verb for verb in cli.VERBS if "--device" in options(verb)} == set(LEAST)


@pytest.mark.parametrize("number", ["9" * 400, str(1 << 63), "-" + "9" * 40])
@pytest.mark.parametrize(
    "words",
    [("trace", "a", "-o", "x", "--generate"), ("walk", "a", "--layer"), ("generate", "a", "-n"),
     ("train", "--data", "x", "--out", "y", "--steps"), ("diff", "demo", "demo", "--copies"),
     ("convert", "demo", "x", "--to", "hf", "--max-shard-size"), ("serve", "demo", "--memory")],
)  # fmt: skip
def test_a_number_that_no_machine_counts_to_is_one_line(words, number, capsys):
    status, _, err = run(capsys, *words, number)
    assert status == 2
    assert err.count("\n") == 1
    assert words[-1].strip("-") in err


@pytest.mark.parametrize("verb", LEAST)
def test_a_device_that_is_not_there_is_one_line(verb, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(capsys, *LEAST[verb], "--device", "cuda")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err == f"pellucid {verb}: device cuda: PyTorch finds no GPU that it can use in this " + (
        "machine; try cpu\n"
    )
    assert not list(tmp_path.iterdir())


def test_devices_by_name(monkeypatch):
    assert as_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="unknown device 'gpu': expected cpu, cuda, cuda:1"):
        as_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert as_device("cuda:1") == torch.device("cuda", 1)
    assert as_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="device cuda:2: PyTorch finds 2 of them"):
        as_device("cuda:2")


# ── Interrupting, closed streams, widths, encodings ──────────────────────────────────────────────


def test_interrupting_an_import_is_status_130(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["walk", "a"]) == 130
    assert capsys.readouterr().err == "\n"


@pytest.mark.parametrize("where", ["destructor", "callback"])
def test_an_interrupt_that_python_loses_ends_the_verb_all_the_same(where, monkeypatch, capsys):
    # Python goes on after an exception in a destructor or in the callback of a weak reference, of
    # which each import has one: a doctor went on for a minute after Ctrl-C.
    def loses_it():
        class Held:
            def __del__(self):
                if where == "destructor":
                    signal.raise_signal(signal.SIGINT)

        held = Held()
        reference = weakref.ref(held, lambda _: where == "callback" and signal.raise_signal(2))
        del held
        assert reference() is None
        end = time.monotonic() + 10
        while time.monotonic() < end:
            time.sleep(0.01)
        return "went on as if no key had been pressed"

    before = sys.unraisablehook, signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(cli, "_dispatch", lambda words: loses_it())
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test's worker has none
    try:
        assert cli.main(["doctor"]) == 130
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert capsys.readouterr().err == "\n"
    assert (sys.unraisablehook, signal.getsignal(signal.SIGALRM)) == before


@pytest.mark.parametrize("error", [RuntimeError("empty mode stack"), ValueError("is there")])
def test_an_error_on_the_way_out_of_an_interrupt_is_the_interrupt(error, monkeypatch, capsys):
    # As from ``with torch.device(...)`` where Ctrl-C falls before it is entered as a whole.
    def interrupted(name):
        try:
            raise KeyboardInterrupt
        finally:
            raise error

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["walk", "a"]) == 130
    assert capsys.readouterr().err == "\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(closed):
    done = shell(f"pellucid --version {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "" if " >&-" in f" {closed}" else f"pellucid {cli.pellucid.__version__}\n"
    )


def test_a_verb_with_closed_streams(monkeypatch, tmp_path):
    picture = tmp_path / "gpt2.svg"
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["info", "gpt2", "--svg", str(picture)]) == 0
    assert cli.main(["info", "no-such-model"]) == 2
    assert picture.read_text("utf-8").startswith("<svg")
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_behind_the_output_is_one_line():
    done = shell("pellucid --help > /dev/full")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("columns", ["0", "-3", "wide", ""])
def test_columns_that_state_no_width(columns, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    plain = run(capsys, "info", "gpt2")
    monkeypatch.setenv("COLUMNS", columns)
    assert run(capsys, "info", "gpt2") == plain
    assert plain[0] == 0 and "124,439,808" in plain[1]


def ascii_output(monkeypatch, *words: str) -> tuple[int, str]:
    """A verb whose standard output knows only ASCII."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii", errors="strict", write_through=True)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        status = cli.main(list(words))
        stream.flush()
    return status, written.getvalue().decode("ascii")


@pytest.mark.parametrize(
    ("words", "status", "lines"),
    [
        (["walk", "import os"], 0, ["Next token", "->", "attention of row to column:  . 5 %"]),
        (["info", "demo"], 0, ["2 x ", "+-"]),
        (["diff", "demo", "demo", "--tokens", "1,2,3"], 0, ["IDENTICAL", "v "]),
        (["--help"], 0, ["usage: pellucid VERB"]),
    ],
)
def test_an_output_that_knows_only_ascii(words, status, lines, monkeypatch):
    found, out = ascii_output(monkeypatch, *words)
    assert found == status
    for line in lines:
        assert line in out


def test_json_survives_an_output_that_knows_only_ascii(monkeypatch, capsys):
    _, out = ascii_output(monkeypatch, "walk", "x = '→…é'", "--json")
    told = json.loads(out)
    assert told["prompt"] == "x = '→…é'"
    assert told == json.loads(run(capsys, "walk", "x = '→…é'", "--json")[1])
