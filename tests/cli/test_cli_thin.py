"""The command line is thin: a verb's module parses, calls and shows, and is short."""

from __future__ import annotations

import argparse
import ast
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

import pellucid
from pellucid import cli
from pellucid.cli.arguments import SHARED
from pellucid.cli.parser import VerbParser

PACKAGE = Path(pellucid.__file__).parent
LINES = 145
# What each verb is from Python.
CALLS = {
    "walk": "walk_prompt",
    "trace": "LanguageModel.trace",
    "diff": "diff.diff",
    "generate": "LanguageModel.generate",
    "chat": "generate.Conversation",
    "serve": "serve_models",
    "info": "model_report",
    "code": "code",
    "plan": "plan_training",
    "train": "train",
    "finetune": "finetune",
    "eval": "text_report",
    "bench": "run_bench",
    "doctor": "examine_machine",
    "convert": "convert",
    "fetch": "fetch",
}


def source(verb: str) -> Path:
    return PACKAGE.parent.joinpath(*cli.VERBS[verb][0].split(".")).with_suffix(".py")


def names_in(tree: ast.AST) -> set[str]:
    """Every name that a module mentions, annotations written as text included."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.name for alias in node.names}
            found |= {getattr(node, "module", None) or ""}
    return found


def test_an_argparse_namespace_ends_in_cli():
    below = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "cli"]
    assert len(below) > 100
    wrong = [
        str(path.relative_to(PACKAGE))
        for path in below
        if {"argparse", "Namespace"} & names_in(ast.parse(path.read_text()))
    ]
    assert not wrong


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_has_a_short_module_of_its_own(verb):
    assert len(source(verb).read_text().splitlines()) <= LINES
    assert [v for v in cli.VERBS if cli.VERBS[v][0] == cli.VERBS[verb][0]] == [verb]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_computes_and_draws_nothing_itself(verb):
    used = names_in(ast.parse(source(verb).read_text()))
    heavy = {
        name for name in used if name.split(".")[0] in ("torch", "numpy", "rich", "matplotlib")
    }
    assert not heavy


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_is_also_a_call(verb):
    called = reduce(getattr, CALLS[verb].split("."), pellucid)
    assert callable(called)
    assert called.__doc__


def test_the_calls_of_the_front_door_are_listed():
    assert {name.split(".")[0] for name in CALLS.values()} - {"generate"} <= set(pellucid.__all__)
    for name in pellucid.__all__:
        assert getattr(pellucid, name) is not None


def flags_of(verb: str) -> list[argparse.Action]:
    """The arguments of a verb that its help shows, but ``--help``."""
    parser = VerbParser("pellucid", "")
    getattr(import_module(cli.VERBS[verb][0]), f"{verb}_arguments")(parser)
    shown = [each for each in parser._actions if each.help != argparse.SUPPRESS]
    return [each for each in shown if not isinstance(each, argparse._HelpAction)]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_line_of_help_is_read_without_its_neighbours(verb):
    """No line is a fragment of the flag's name, such as "of JSON lines" or "(as stored)"."""
    for action in flags_of(verb):
        words = (action.help or "").split()
        assert len(words) >= 3, action.option_strings
        assert words[0] not in ("of", "default:", "which", "where", "more"), action.help
        assert not action.help.startswith("("), action.help


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_states_every_default(verb):
    for action in flags_of(verb):
        quiet = (None, False, [], [""], argparse.SUPPRESS)  # nothing is taken unless given
        assert action.default in quiet or "(default: " in action.help, action.option_strings
        assert "(default " not in action.help, action.option_strings


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_fits_80_columns(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = VerbParser(f"pellucid {verb}", cli.VERBS[verb][1])
    getattr(import_module(cli.VERBS[verb][0]), f"{verb}_arguments")(parser)
    usage, _, rest = parser.format_help().partition("\n\n")  # argparse may not break it
    assert usage and not [line for line in rest.splitlines() if len(line) > 80]


def test_a_flag_of_several_verbs_has_one_sentence():
    one = {"--out", *SHARED}  # -m has a default in most verbs, in convert it has none
    another = {"--dtype"}  # train, finetune and convert: of weights that are written
    said: dict[str, set[str]] = {}
    for action in (action for verb in cli.VERBS for action in flags_of(verb)):
        for flag in one.intersection(action.option_strings) - another:
            said.setdefault(flag, set()).add(action.help)
    assert len(said) > 8
    assert not {flag: lines for flag, lines in said.items() if len(lines) > 1}
