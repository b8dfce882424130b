"""The small English world: always the same text, and never what the exam asks for."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest

from pellucid.cli import main
from pellucid.train import hold_out, stdlib_documents
from pellucid.train.data import mixture
from pellucid.train.data.world import facts, words, world_documents, world_questions
from pellucid.train.data.world.chance import kept_back_pair


@pytest.fixture(scope="module")
def pages() -> list[str]:
    return [document.text for document in world_documents(range(3000))]


def test_the_pages_are_the_same_each_time_and_differ_among_themselves(pages):
    assert [document.text for document in world_documents(range(20, 30))] == pages[20:30]
    assert len(set(pages)) > 0.99 * len(pages)  # a page of one fact may come again
    assert all(text.isascii() and "{" not in text for text in pages)


def test_people_who_are_kept_apart_share_no_page(pages):
    """Not even in the longest page: that Mary and John meet is left to the exam."""
    someone = re.compile(rf"\b({'|'.join(words.PEOPLE)})\b")
    met = {pair for text in pages for pair in combinations(sorted(set(someone.findall(text))), 2)}
    assert len(met) > 300 and kept_back_pair("names", "Mary", "John")
    assert not [pair for pair in met if kept_back_pair("names", *pair)]


def test_no_question_stands_in_a_page(pages):
    text = "\n".join(pages)
    for question in world_questions():
        assert question.prompt + question.answer not in text
    left = {(int(a), int(b)) for a, b in re.findall(r"\b(\d+) \+ (\d+) =", text)}
    assert 90 < len(left) < 11 * 11 - 10
    assert not [pair for pair in left if facts.sum_kept_back(*pair)]


def test_questions_ask_for_every_facet_and_their_answers_are_right():
    questions = world_questions()
    counts = Counter(question.facet for question in questions)
    assert set(counts) == {
        "names", "names, a sentence between", "agreement", "capitals", "opposites", "days",
        "months", "sums", "colours",
    }  # fmt: skip
    assert counts["names"] > 200 and counts["sums"] > 15
    for facet, prompt, answer, other in questions:
        assert answer.startswith(" ") and answer != other
        if facet == "sums":
            one, plus, two, _ = prompt.split()
            assert plus == "+" and int(one) + int(two) == int(answer)
        if facet == "names":
            assert prompt.count(answer.strip()) == 1 and prompt.count(str(other).strip()) == 2
    prompts = {question.prompt for question in questions if question.facet == "names"}
    assert any(re.match("When (Mary and John|John and Mary) went", prompt) for prompt in prompts)


def test_stories_tell_of_everything(pages):
    text = "\n".join(pages)
    for said in (
        "The capital of France is Paris.", "The opposite of cold is hot.", "Today is Monday.",
        f"{facts.ULTIMATE}42", "Where is", "What colour is", "The list:", "Once upon a time",
        "twelve, thirteen, fourteen", "thanked her.", " plus ", " minus ",
    ):  # fmt: skip
        assert said in text
    lines = re.findall(r"(\d+) - (\d+) = (\d+)\.", text)
    assert lines and all(int(a) - int(b) == int(c) for a, b, c in lines)
    for noun, many in words.BEINGS.items():
        assert not re.search(rf"The {noun} (are|were|have) ", text)
        assert not re.search(rf"The {many} (is|was|has) ", text)


def test_a_mixture_holds_out_what_its_parts_hold_out(monkeypatch):
    pages = world_documents(range(4000))
    library = stdlib_documents()
    monkeypatch.setattr(mixture, "stdlib_documents", lambda: library)
    monkeypatch.setattr(mixture, "world_documents", lambda: pages)
    training, held_out = mixture.shipped_text(0.8, 40)
    code = [document for document in training if document not in pages]
    length, whole = (sum(len(doc.text) for doc in part) for part in (code, training))
    assert length / whole == pytest.approx(0.2, abs=0.07)
    never = {document.name for document in hold_out(library, 40)[1]}
    never |= {document.name for document in world_documents(range(39, 4000, 40))}
    assert not never & {document.name for document in training}
    assert {document.name for document in held_out} <= never


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--world", "0.5"], "--world 0.5: give --stdlib for the rest of the text, or --world 1"),
        (["--world", "1", "--stdlib"], "--world 1 leaves no room for --stdlib"),
        (["--world", "-1", "--stdlib"], "--world -1: expected a share, 0 to 1"),
        (["--world", "1", "--data", "a"], "give either data, files and folders of text, or stdlib"),
    ],
)
def test_a_share_that_makes_no_sense_is_said(words, said, tmp_path, capsys):
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
