"""The exam: prompts made of what stands in no document, with their answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from pellucid.train.data.world import facts, stories
from pellucid.train.data.world.chance import Draws, kept_back, kept_back_pair
from pellucid.train.data.world.words import (
    BEINGS,
    BESIDE,
    COLOURS,
    PEOPLE,
    PLACES,
    THINGS,
    with_article,
)

SEED = 1  # of what a question does not ask about: places, colours, the order of names


class Question(NamedTuple):
    """A prompt and how it goes on.

    facet   what is asked for, such as "names"
    answer  with its leading space
    other   what a model that does not understand would answer as readily; None where there is none
    """

    facet: str
    prompt: str
    answer: str
    other: str | None = None


def world_questions() -> list[Question]:
    """All questions, the same each time, by facet."""
    draws = Draws(SEED)
    tables = [question for kind in facts.TABLES for question in _told(kind)]
    return [
        *_names(draws),
        *_names_after_a_sentence(draws),
        *_agreement(draws),
        *tables,
        *_sums(),
        *_colours(draws),
    ]


def _strangers() -> list[tuple[str, str]]:
    """Pairs of people who never meet in a document."""
    pairs = combinations(sorted(PEOPLE), 2)
    return [pair for pair in pairs if kept_back_pair("names", *pair)]


def _gift(draws: Draws) -> tuple[str, str]:
    """A place, and a thing that is never given there in a document."""
    pairs = [(p, t) for p in PLACES for t in THINGS if kept_back("gift", p, t)]
    return draws.one(pairs)


def _names(draws: Draws) -> Iterator[Question]:
    """Who is given something: two people who never met, in both orders, each of them giving."""
    for pair in _strangers():
        for order in (pair, pair[::-1]):
            for giver, taker in (order, order[::-1]):
                place, thing = _gift(draws)
                prompt = (
                    f"When {order[0]} and {order[1]} went to the {place}, {giver} gave "
                    f"{with_article(thing)} to"
                )
                yield Question("names", prompt, f" {taker}", f" {giver}")


def _names_after_a_sentence(draws: Draws) -> Iterator[Question]:
    """The same with a sentence in between, which may name one of them or a third person."""
    for one, other in _strangers():
        giver, taker = draws.some([one, other], 2)
        place, thing = _gift(draws)
        between = draws.one(stories.BETWEEN).format(
            a=one, b=other, c="Paul", weather="cold", mood="tired"
        )
        if "Paul" in (one, other):
            between = "The weather was cold. "
        prompt = (
            f"Then {one} and {other} went to the {place}. {between}{giver} handed "
            f"{with_article(thing)} to"
        )
        yield Question("names, a sentence between", prompt, f" {taker}", f" {giver}")


def _agreement(draws: Draws) -> Iterator[Question]:
    """One noun beside another of the other number: the verb follows the first."""
    pairs = [(a, b) for a in BEINGS for b in BEINGS if a != b and kept_back("nouns", a, b)]
    for subject, other in pairs:
        beside = draws.one(BESIDE)
        one = f"The {subject} {beside} the {BEINGS[other]}"
        many = f"The {BEINGS[subject]} {beside} the {other}"
        yield Question("agreement", one, " is", " are")
        yield Question("agreement", many, " are", " is")


def _told(kind: str) -> Iterator[Question]:
    """Facts in words in which no document tells them."""
    table, ways = facts.TABLES[kind]
    for fact, answer in table.items():
        for number, way in enumerate(ways):
            if facts.way_kept_back(kind, fact, number) and way.endswith(" {answer}."):
                prompt = way.removesuffix(" {answer}.").format(fact=fact)
                yield Question(kind, prompt, f" {answer}")


def _sums() -> Iterator[Question]:
    """Sums of two numbers that no document adds in either order."""
    numbers = range(facts.LARGEST + 1)
    for one in numbers:
        for other in numbers:
            if facts.sum_kept_back(one, other):
                yield Question("sums", f"{one} + {other} =", f" {one + other}")


def _colours(draws: Draws) -> Iterator[Question]:
    """Two things with their colours, of which one never had its colour in a document."""
    for thing in THINGS:
        for colour in COLOURS:
            if not kept_back("colour", thing, colour):
                continue
            another = draws.until(lambda: draws.one(list(THINGS)), lambda it, t=thing: it != t)
            wrong = draws.until(lambda: draws.one(COLOURS), lambda it, c=colour: it != c)
            lines = [f"The {thing} is {colour}.", f"The {another} is {wrong}."]
            first, second = draws.some(lines, 2)
            prompt = f"{first} {second} What colour is the {thing}? The {thing} is"
            yield Question("colours", prompt, f" {colour}", f" {wrong}")
