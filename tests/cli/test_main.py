"""The command line's frame: help, versions, errors in one line. Verbs have tests of their own."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

import pellucid
from pellucid import cli

VERBS = [verb for verb, (module, _) in cli.VERBS.items() if find_spec(module)]


def test_every_verb_has_its_module():
    assert list(cli.VERBS) == VERBS


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_the_verbs(arguments, capsys):
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for verb, (_, line) in cli.VERBS.items():
        assert f"  {verb} " in out
        assert line in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: pellucid {verb}")
    assert "--traceback" in out
    assert err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_two_functions(verb):
    module = import_module(cli.VERBS[verb][0])
    assert callable(getattr(module, verb))
    assert callable(getattr(module, f"{verb}_arguments"))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pellucid {pellucid.__version__}\n"


def test_an_unknown_verb_is_one_line(capsys):
    assert cli.main(["wlak"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("pellucid wlak: no such verb; expected one of walk, trace")


class Failing:
    """A module with one verb that raises what it is given."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def walk_arguments(self, parser):
        parser.add_argument("prompt")

    def walk(self, arguments):
        raise self.error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("got 3,\n  expected 4"), "got 3, expected 4"),
        (FileNotFoundError(2, "No such file or directory", "nowhere"), "'nowhere'"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_status_2(error, line, monkeypatch, capsys):
    monkeypatch.setattr(cli, "import_module", lambda name: Failing(error))
    assert cli.main(["walk", "a prompt"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pellucid walk: ")
    assert line in err
    assert err.count("\n") == 1
    with pytest.raises(type(error)):
        cli.main(["walk", "a prompt", "--traceback"])


@pytest.mark.parametrize("kind", [AssertionError, KeyError, IndexError, TypeError])
def test_our_own_bugs_are_not_disguised(kind, monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: Failing(kind("a bug")))
    with pytest.raises(kind):
        cli.main(["walk", "a prompt"])


def test_interrupting_is_status_130(monkeypatch, capsys):
    monkeypatch.setattr(cli, "import_module", lambda name: Failing(KeyboardInterrupt()))
    assert cli.main(["walk", "a prompt"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_wrong_option_is_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([VERBS[0], "--no-such-option"])
    assert ended.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    "start", [["-m", "pellucid"], ["-c", "import pellucid.cli as c; c.main()"]]
)
def test_it_starts_as_a_process(start):
    result = subprocess.run(
        [sys.executable, *start, "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        f"pellucid {pellucid.__version__}\n",
        "",
    )


def test_the_status_reaches_the_shell():
    result = subprocess.run(
        [sys.executable, "-m", "pellucid", "wlak"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_reader_that_leaves_is_no_error():
    """`pellucid … | head`: the pipe is closed before the help is written."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "pellucid", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    writer.stdout.close()
    err = writer.stderr.read()
    writer.stderr.close()
    writer.wait()
    assert "Traceback" not in err
