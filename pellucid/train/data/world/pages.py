"""The small world as documents: pages of paragraphs, of one or of several kinds."""

from __future__ import annotations

from collections.abc import Callable

from pellucid.train.data.documents import Document
from pellucid.train.data.world import facts, stories
from pellucid.train.data.world.chance import Draws

SEED = 42
PAGES = 25_000
SHORT = 0.75  # of the pages: a paragraph or two, so that names mostly stand beside few others
PARAGRAPHS = (6, 18)  # in one of the other pages, at least and at most
OF_ONE_KIND = 0.3  # of the other pages
CAST = 3  # people in a page
Paragraph = Callable[[Draws, list[str]], str]


def _of(kind: str) -> Paragraph:
    return lambda draws, _: facts.told(draws, kind)


# What a paragraph tells, and how often beside the others. Who is given something takes a model the
# most paragraphs to learn: at a third of these it stayed at chance.
PARAGRAPHS_OF: tuple[tuple[Paragraph, int], ...] = (
    (stories.giving, 75),
    (stories.day_of_two, 6),
    (stories.whereabouts, 4),
    (stories.coloured_things, 6),
    (stories.quotation, 4),
    (stories.shopping, 4),
    (_of("capitals"), 8),
    (_of("opposites"), 4),
    (_of("days"), 3),
    (_of("months"), 3),
    (lambda draws, _: facts.ring(draws), 2),
    (lambda draws, _: facts.sums(draws), 10),
    (lambda draws, _: facts.counting(draws), 3),
    (lambda draws, _: facts.agreement(draws), 9),
    (lambda draws, _: facts.kinds(draws), 2),
    (lambda draws, _: facts.ultimate(draws), 2),
)


def world_documents(numbers: range = range(PAGES)) -> list[Document]:
    """Pages of the small world by their numbers, always the same; about 400 characters each."""
    return [Document(f"world/{number}", _page(Draws(SEED + number))) for number in numbers]


def _page(draws: Draws) -> str:
    people = stories.draw_people(draws, CAST)
    short = draws.chance(SHORT)
    count = draws.number(1, 2) if short else draws.number(*PARAGRAPHS)
    if not short and draws.chance(OF_ONE_KIND):
        kinds = [_paragraph(draws)] * (count // 2)
    else:
        kinds = [_paragraph(draws) for _ in range(count)]
    return "\n".join(write(draws, draws.some(people, CAST)) for write in kinds)


def _paragraph(draws: Draws) -> Paragraph:
    """What a paragraph tells."""
    at = draws.number(1, sum(share for _, share in PARAGRAPHS_OF))
    for write, share in PARAGRAPHS_OF:
        at -= share
        if at <= 0:
            return write
    raise AssertionError("a number is at most the sum of the shares")
