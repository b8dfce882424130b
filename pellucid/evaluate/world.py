"""A model on the small English world: text that it did not train on, and an exam by facet.

    report = world_report(pellucid.load("demo"))
    report["exam"]["names"]["right"], report["perplexity"]

The call behind ``pellucid eval MODEL --world``. What is asked for stands in no document of
``pellucid train --world`` (`pellucid.train.data.world`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pellucid.evaluate.harness import Answers
from pellucid.evaluate.text import Report
from pellucid.evaluate.text_report import text_report
from pellucid.train.data.world import PAGES, Question, world_documents, world_questions

if TYPE_CHECKING:
    from pellucid.language_model import LanguageModel

HELD_OUT = 40  # every so-many-th page, as `train --hold-out` has it unless told otherwise


def world_texts(limit: int | None = None) -> list[str]:
    """The pages of the world that ``pellucid train --world`` does not train on."""
    pages = world_documents(range(HELD_OUT - 1, PAGES, HELD_OUT)[:limit])
    return [page.text for page in pages]


def world_report(
    lm: LanguageModel, *, limit: int | None = None, progress: Report | None = None, **windows: Any
) -> dict[str, Any]:
    """The report of `text_report` over the held-out pages, and the exam: facet -> its marks.

    limit    the first so many pages, and questions of each facet
    windows  context, stride and batch, as `text_report` takes them
    """
    report = text_report(lm, world_texts(limit), progress=progress, **windows)
    by_facet: dict[str, list[Question]] = {}
    for question in world_questions():
        by_facet.setdefault(question.facet, []).append(question)
    exam = {facet: mark_answers(lm, asked[:limit]) for facet, asked in by_facet.items()}
    return {**report, "exam": exam}


def mark_answers(lm: LanguageModel, questions: list[Question]) -> dict[str, Any]:
    """How many questions a model answers rightly.

    right      share of the answers that are, token by token, the likeliest of all
    preferred  share in which the answer is likelier than the other one that is offered, of the
               questions that offer one; None where none does
    """
    answers = Answers(lm)

    def likelihoods(continuations: list[str]) -> list[tuple[float, bool]]:
        encode = lm.tokenizer.encode
        prompts = [lm.encode(question.prompt) for question in questions]
        pairs = [(ids, encode(text)) for ids, text in zip(prompts, continuations, strict=True)]
        return answers.continuations(pairs)

    found = likelihoods([question.answer for question in questions])
    marks: dict[str, Any] = {
        "questions": len(questions),
        "right": sum(greedy for _, greedy in found) / len(questions),
        "preferred": None,
    }
    if all(question.other is not None for question in questions):
        others = likelihoods([str(question.other) for question in questions])
        better = sum(ours[0] > theirs[0] for ours, theirs in zip(found, others, strict=True))
        marks["preferred"] = better / len(questions)
    return marks
