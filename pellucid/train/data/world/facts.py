"""Paragraphs of facts: capitals, opposites, days, months, numbers, agreement, the ultimate answer.

A fact is told in several ways; of those, one in ten is kept back per fact, so that a question can
be asked in words that the fact never stood in. The first way is never kept back.
"""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.train.data.world.chance import Draws, kept_back
from pellucid.train.data.world.words import (
    BEINGS,
    BESIDE,
    CAPITALS,
    DAYS,
    ENDS,
    KINDS,
    MONTHS,
    NUMBERS,
    OF_A_COLOUR,
    OPPOSITES,
    VERBS,
    capitalised,
    with_article,
)

ULTIMATE = "the answer to the ultimate question of life, the universe, and everything is "
LARGEST = 10  # term of a sum
OF_CAPITALS = (
    "The capital of {fact} is {answer}.",
    "{answer} is the capital of {fact}.",
    "What is the capital of {fact}? It is {answer}.",
    "If you go to the capital of {fact}, you are in {answer}.",
    "The king of {fact} lives in {answer}.",
    "The largest museum of {fact} is in {answer}.",
)
OF_OPPOSITES = (
    "The opposite of {fact} is {answer}.",
    "What is the opposite of {fact}? It is {answer}.",
    "What is not {fact} is {answer}.",
    "First it was {fact}, then it was {answer}.",
)
OF_DAYS = (
    "The day after {fact} is {answer}.",
    "{fact} comes before {answer}.",
    "Today is {fact}. Tomorrow is {answer}.",
    "Yesterday was {fact}, so today is {answer}.",
)
OF_MONTHS = (
    "The month after {fact} is {answer}.",
    "{fact} comes before {answer}.",
    "After {fact} comes {answer}.",
)


def following(names: Sequence[str]) -> dict[str, str]:
    """Each of a ring of names with the one after it."""
    return dict(zip(names, [*names[1:], names[0]], strict=True))


# kind -> its facts, and the ways in which they are told
TABLES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "capitals": (CAPITALS, OF_CAPITALS),
    "opposites": (OPPOSITES, OF_OPPOSITES),
    "days": (following(DAYS), OF_DAYS),
    "months": (following(MONTHS), OF_MONTHS),
}


def way_kept_back(kind: str, fact: str, way: int) -> bool:
    """Whether no document tells a fact in this way."""
    return way > 0 and kept_back(kind, fact, way)


def told(draws: Draws, kind: str) -> str:
    """A few facts of one kind."""
    facts, ways = TABLES[kind]

    def draw() -> tuple[str, int]:
        return draws.one(list(facts)), draws.number(0, len(ways) - 1)

    found = []
    for _ in range(draws.number(1, 4)):
        fact, way = draws.until(draw, lambda drawn: not way_kept_back(kind, *drawn))
        found.append(ways[way].format(fact=fact, answer=facts[fact]))
    return " ".join(found)


def ring(draws: Draws) -> str:
    """Some days or months in their order."""
    names = draws.one((DAYS, MONTHS))
    first, count = draws.number(0, len(names) - 1), draws.number(3, len(names))
    return ", ".join(names[(first + place) % len(names)] for place in range(count)) + "."


def sum_kept_back(one: int, other: int) -> bool:
    """Whether no document has one + other, in either order, nor their sum minus one of them."""
    return kept_back("sum", *sorted((one, other)))


def sums(draws: Draws) -> str:
    """A few sums and differences, in digits or in words."""
    words = draws.chance(0.25)
    lines = []
    for _ in range(draws.number(3, 7)):
        one, other = draws.until(
            lambda: (draws.number(0, LARGEST), draws.number(0, LARGEST)),
            lambda pair: not sum_kept_back(*pair),
        )
        lines.append(_sum(one, other, minus=draws.chance(0.3), words=words))
    return " ".join(lines)


def _sum(one: int, other: int, *, minus: bool, words: bool) -> str:
    total = one + other
    if words:
        a, b, c = (NUMBERS[number] for number in (one, other, total))
        if minus:
            return f"{capitalised(c)} minus {a} is {b}."
        return f"{capitalised(a)} plus {b} is {c}."
    return f"{total} - {one} = {other}." if minus else f"{one} + {other} = {total}."


def counting(draws: Draws) -> str:
    """Numbers in their order, up or down, one or more at a time, in digits or words."""
    if draws.chance(0.3):
        first, last = sorted(draws.some(range(len(NUMBERS)), 2))
        row = NUMBERS[first : last + 1]
    else:
        step = draws.one((1, 1, 1, 2, 5, 10))
        first = draws.number(0, 40) if step == 1 else step * draws.number(0, 5)
        row = [str(first + step * place) for place in range(draws.number(4, 12))]
    if draws.chance(0.25):
        row = row[::-1]
    return f"{capitalised(', '.join(row))}."


def agreement(draws: Draws) -> str:
    """Sentences whose verb agrees with the first noun, whatever stands between."""
    found = []
    for _ in range(draws.number(1, 3)):
        subject, other = draws.until(
            lambda: draws.some(list(BEINGS), 2), lambda pair: not kept_back("nouns", *pair)
        )
        many, others = draws.chance(0.5), draws.chance(0.5)
        verb = draws.one(list(VERBS))
        noun = BEINGS[subject] if many else subject
        between = ""
        if draws.chance(0.7):
            between = f" {draws.one(BESIDE)} the {BEINGS[other] if others else other}"
        said = VERBS[verb] if many else verb
        found.append(f"The {noun}{between} {said} {draws.one(ENDS[verb])}.")
    return " ".join(found)


def kinds(draws: Draws) -> str:
    """What things are, and of which colour."""
    found = []
    for _ in range(draws.number(1, 3)):
        if draws.chance(0.4):
            thing = draws.one(list(OF_A_COLOUR))
            found.append(f"{capitalised(thing)} is {OF_A_COLOUR[thing]}.")
            continue
        thing = draws.one(list(KINDS))
        what = with_article(KINDS[thing])
        known = thing[0].isupper() or KINDS[thing] == "colour"
        found.append(f"{thing if known else capitalised(with_article(thing))} is {what}.")
    return " ".join(capitalised(each) for each in found)


def ultimate(draws: Draws) -> str:
    """The sentence of the famous notebook, as it stands there and in other ways."""
    return draws.one(
        (
            f"{ULTIMATE}42",
            f"{ULTIMATE}42.",
            f"{capitalised(ULTIMATE)}42.",
            "What is the answer to the ultimate question of life, the universe, and everything? "
            "It is 42.",
        )
    )
