"""Paragraphs with people in them: giving, walking, talking, and who is where with what."""

from __future__ import annotations

from pellucid.train.data.world.chance import Draws, kept_back, kept_back_pair
from pellucid.train.data.world.words import (
    CLOTHES,
    COLOURS,
    DAYS,
    FOODS,
    GIVING,
    MOODS,
    PEOPLE,
    PLACES,
    ROOMS,
    THINGS,
    WEATHER,
    capitalised,
    pronoun,
    with_article,
)

# Where two people are, before one of them gives something to the other.
OPENINGS = (
    "When {a} and {b} went to the {place}, ",
    "After {a} and {b} went to the {place}, ",
    "While {a} and {b} were at the {place}, ",
    "When {a} and {b} met at the {place}, ",
    "{a} and {b} went to the {place}. ",
    "Then {a} and {b} went to the {place}. ",
    "{a} and {b} had a long day at the {place}. ",
    "On {day} {a} met {b} at the {place}. ",
    "{a} was at the {place} with {b}. ",
    "{a} saw {b} at the {place}. ",
)
BETWEEN = (
    "The weather was {weather}. ",
    "It was {weather} there. ",
    "They talked about the weather. ",
    "They were both very {mood}. ",
    "{a} was {mood}. ",
    "{b} was {mood}. ",
    "{c} was not there. ",
    "They were looking for {c}. ",
    "A dog was there too. ",
    "There were many people. ",
)
AFTERWARDS = (
    "{Taker} thanked {giver_her}. ",
    "{taker} was very happy. ",
    '{taker} said, "Thank you, {giver}!" ',
    "{Taker} liked it very much. ",
    "{Giver} smiled. ",
    "Then {giver} went home and {taker} went to the {elsewhere}. ",
    "{taker} put the {thing} into {taker_hers} bag. ",
    "It was {weather}, and they walked home. ",
    "Who has the {thing} now? {taker}. ",
    "Who gave the {thing} away? {giver}. ",
)


def draw_people(draws: Draws, count: int) -> list[str]:
    """People who may stand in one document."""

    def meet(people: list[str]) -> bool:
        return not any(
            kept_back_pair("names", one, other)
            for place, one in enumerate(people)
            for other in people[:place]
        )

    return draws.until(lambda: draws.some(PEOPLE, count), meet)


def draw_gift(draws: Draws, place: str) -> str:
    """A thing that may be given at a place."""
    things = list(THINGS)
    return draws.until(lambda: draws.one(things), lambda it: not kept_back("gift", place, it))


def giving(draws: Draws, people: list[str]) -> str:
    """One of two people gives something to the other; who, depends on the names alone."""
    a, b, c = people[:3]
    if draws.chance(0.1):
        return _giving_of_two(draws, a, b, c)
    giver, taker = draws.some([a, b], 2)
    place = draws.one(PLACES)
    thing = draw_gift(draws, place)
    said = {
        "a": a,
        "b": b,
        "c": c,
        "place": place,
        "elsewhere": draws.one(PLACES),
        "day": draws.one(DAYS),
        "weather": draws.one(WEATHER),
        "mood": draws.one(MOODS),
        "thing": thing,
        "giver": giver,
        "taker": taker,
        "Giver": capitalised(pronoun(giver)),
        "Taker": capitalised(pronoun(taker)),
        "giver_her": pronoun(giver, "her"),
        "taker_hers": pronoun(taker, "hers"),
    }
    opening = draws.one(OPENINGS)
    parts = [opening]
    if opening.endswith(". ") and draws.chance(0.4):
        parts += draws.some(BETWEEN, draws.number(1, 2))
    parts.append(f"{giver} {_gives(draws)} {with_article(thing)} to {taker}. ")
    parts += draws.some(AFTERWARDS, draws.one((0, 0, 1, 2)))
    return "".join(parts).format_map(said).strip()


def _gives(draws: Draws) -> str:
    past = "gave" if draws.chance(0.4) else draws.one(list(GIVING))
    if draws.chance(0.25):
        return f"{draws.one(('wanted', 'decided', 'forgot'))} to {GIVING[past]}"
    return past


def _giving_of_two(draws: Draws, a: str, b: str, c: str) -> str:
    """Three people, of whom two give: the one that is not named again takes."""
    givers = draws.some([a, b, c], 2)
    (taker,) = {a, b, c} - set(givers)
    place = draws.one(PLACES)
    thing = with_article(draw_gift(draws, place))
    return (
        f"When {a}, {b} and {c} went to the {place}, {givers[0]} and {givers[1]} gave {thing} "
        f"to {taker}."
    )


def day_of_two(draws: Draws, people: list[str]) -> str:
    """A longer story: one person meets another, and a thing changes hands and comes back."""
    hero, friend = people[:2]
    she, her, hers = (pronoun(hero, case) for case in ("she", "her", "hers"))
    thing, colour = draws.one(list(THINGS)), draws.one(COLOURS)
    place, clothes = draws.one(PLACES), draws.one(CLOTHES)
    begin = draws.one(
        (
            f"One {draws.one(('day', 'morning', 'evening'))} {hero} wanted to go to the {place}.",
            f"Once upon a time there was a {'girl' if she == 'she' else 'boy'} named {hero}. "
            f"{capitalised(she)} lived near the {place}.",
            f"{hero} woke up early on {draws.one(DAYS)}. The weather was {draws.one(WEATHER)}.",
            f"It was a {draws.one(WEATHER)} day, and {hero} was {draws.one(MOODS)}.",
        )
    )
    worn = f"{hers} {draws.one(COLOURS)} {clothes}"
    walk = f"{capitalised(she)} put on {worn} and walked to the {place}."
    meet = draws.one(
        (
            f"There {she} met {friend}. {friend} had a {colour} {thing}.",
            f"At the {place} {she} saw {hers} friend {friend} with a {colour} {thing}.",
            f"{friend} was there too, and {pronoun(friend)} had a {colour} {thing}.",
        )
    )
    ask = draws.one(
        (
            f'"May I have the {thing}?" asked {hero}. "Yes," said {friend}.',
            f'"What a nice {thing}!" said {hero}. "Thank you, {hero}," said {friend}.',
            f"{hero} liked the {colour} {thing}, and {friend} gave the {thing} to {her}.",
        )
    )
    end = draws.one(
        (
            f"Then {she} gave the {colour} {thing} back to {friend} and went home.",
            f"In the evening {hero} and {friend} were {draws.one(MOODS)}, and they went home.",
            f'"Goodbye, {friend}!" said {hero}. "Goodbye, {hero}!" said {friend}.',
            f"{hero} told {hers} mother about {friend} and the {colour} {thing}.",
        )
    )
    return " ".join((begin, walk, meet, ask, end))


def whereabouts(draws: Draws, people: list[str]) -> str:
    """People go into rooms, and questions about where they are."""
    moved: dict[str, str] = {}
    lines = []
    for person in [*draws.some(people[:3], 3), draws.one(people[:3])]:
        moved[person] = draws.one(ROOMS)
        lines.append(f"{person} {draws.one(('went', 'walked', 'ran'))} to the {moved[person]}.")
    asked = draws.one(list(moved))
    return f"{' '.join(lines)} Where is {asked}? {asked} is in the {moved[asked]}."


def coloured_things(draws: Draws, people: list[str]) -> str:
    """Things of people with their colours, and questions about them."""
    count = draws.number(2, 3)
    things = draws.some(list(THINGS), count)
    colours = [
        draws.until(lambda: draws.one(COLOURS), lambda it, t=thing: not kept_back("colour", t, it))
        for thing in things
    ]
    told = draws.one(("the", "owned"))
    owners = [f"{people[i]}'s" if told == "owned" else "the" for i in range(count)]
    lines = [
        f"{capitalised(owner)} {thing} is {colour}."
        for owner, thing, colour in zip(owners, things, colours, strict=True)
    ]
    at = draws.number(0, count - 1)
    question = f"What colour is {owners[at]} {things[at]}?"
    answer = draws.one(
        (
            f"{capitalised(colours[at])}.",
            f"{capitalised(owners[at])} {things[at]} is {colours[at]}.",
        )
    )
    return f"{' '.join(lines)} {question} {answer}"


def quotation(draws: Draws, people: list[str]) -> str:
    """One person says a sentence, and the text reports what was said."""
    one, other = people[:2]
    place = draws.one(PLACES)
    words = draws.one(
        (
            f"I like the {draws.one(COLOURS)} {draws.one(list(THINGS))}.",
            f"The {draws.one(list(THINGS))} is in the {draws.one(ROOMS)}.",
            f"I will go to the {place} on {draws.one(DAYS)}.",
            f"I am {draws.one(MOODS)} and {draws.one(MOODS)}.",
            f"Where is my {draws.one(COLOURS)} {draws.one(CLOTHES)}?",
            f"We have {draws.one(FOODS)} and {draws.one(FOODS)}.",
        )
    )
    return draws.one(
        (
            f'{one} said to {other}, "{words}" What did {one} say? {one} said, "{words}"',
            f'"{words}" said {one}. {other} did not hear it. {one} said it again: "{words}"',
            f'{one} wrote in a letter: "{words}" {other} read it aloud: "{words}"',
        )
    )


def shopping(draws: Draws, people: list[str]) -> str:
    """A list, and the same list again."""
    person = people[0]
    foods = draws.some(FOODS, draws.number(3, 5))
    joined = f"{', '.join(foods[:-1])} and {foods[-1]}"
    again = draws.one(
        (
            "\n".join(["The list:", *(f"- {food}" for food in foods)]),
            f"What did {person} buy? {capitalised(joined)}.",
            f"{capitalised(pronoun(person))} came home with {joined}.",
        )
    )
    return f"{person} went to the {draws.one(('store', 'market'))} and bought {joined}. {again}"
