"""Transcripts of every verb: exit status, JSON, names and numbers in the text, files, flags."""

from __future__ import annotations

import json
import shutil

import frozen_traces
import pytest
from frozen_verbs import CASES, HERE, TRANSCRIPTS, differences, flags, perform, workplace

FLAGS = json.loads((HERE / "flags.json").read_text())
SLOW = ("walk-page-and-figures", "plan", "plan-json", "fetch-json")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_a_command_says_what_it_said(name, tmp_path):
    case = CASES[name]
    if "needs" in case and shutil.which(case["needs"]) is None:
        pytest.skip(f"needs {case['needs']}")
    then = json.loads((TRANSCRIPTS / f"{name}.json").read_text())
    now = perform(case, workplace(tmp_path.resolve()))
    assert not differences(now, then, case, same=frozen_traces.same_machine())


def test_every_transcript_has_its_case():
    assert {path.stem for path in TRANSCRIPTS.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("verb", FLAGS)
def test_every_flag_is_still_taken(verb):
    assert set(FLAGS[verb]) <= set(flags(verb))


def test_the_transcripts_speak_of_every_verb():
    told = {path.read_text() for path in TRANSCRIPTS.glob("*.json")}
    verbs = {one["command"][0] for text in told for one in json.loads(text)}
    assert set(FLAGS) <= verbs
