"""The text that needs no files: the small English world, Python's own library, or both."""

from __future__ import annotations

from pellucid.train.data.documents import Document, hold_out, stdlib_documents
from pellucid.train.data.world import world_documents


def shipped_text(world: float, every: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, `world` of their characters from the small English world.

    world  1: nothing else; 0: Python's standard library, all of it; between: as much of the
           library, in documents spread evenly over it, as makes the shares right
    every  each `every`-th document of either is held out, whichever share is taken: what is held
           out of the library alone is in no mixture's training text
    """
    library = hold_out(stdlib_documents(), every) if world < 1 else ([], [])
    if world == 0:
        return library
    pages = hold_out(world_documents(), every)
    if world == 1:
        return pages
    share = _length(pages[0]) * (1 - world) / world / _length(library[0])
    training, held_out = (
        [*ours, *_spread(code, share)] for ours, code in zip(pages, library, strict=True)
    )
    return training, held_out


def _length(documents: list[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _spread(documents: list[Document], share: float) -> list[Document]:
    """A share of the documents, evenly spread over them."""
    return [
        document
        for place, document in enumerate(documents)
        if int((place + 1) * share) > int(place * share)
    ]
