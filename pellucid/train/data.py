"""From text to batches: documents, the held-out split, the token stream, windows of it.

    documents   [a.py] [b.py] [c.py] …                    some are held out, whole
    stream      <end> a a a a <end> b b b <end> c c …     one long line of token ids, (N)
    windows     |- context -|- context -|- context -|     one window is one row of a batch

A window's targets are its inputs one token later, so a row needs context + 1 tokens of the stream.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".html", ".csv")
# Folders of the standard library that are no part of it, or lists of values rather than text.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
SHORTEST_COPY = 16  # tokens, where a row is long enough
_TOPICS = "pydoc_data/topics.py"
_THIS_MACHINE = "_sysconfigdata"  # how this very interpreter was built


class Document(NamedTuple):
    """One text; `name` is what an error message calls it."""

    name: str
    text: str


def read_documents(paths: Iterable[str | Path]) -> list[Document]:
    """Every text file among `paths`, folders read whole, in the order of their names.

    A file given by name is always read; inside a folder only those that end in TEXT_SUFFIXES.
    Files without any text are left out.
    Raises OSError for a path that is not there and ValueError for bytes that are not UTF-8.
    """
    found: list[Document] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder to train on")
        inside = path.rglob("*") if path.is_dir() else [path]
        files = [file for file in inside if file.suffix in TEXT_SUFFIXES or file == path]
        found += [_read(file) for file in sorted(files) if file.is_file()]
    return [document for document in found if document.text.strip()]


def _read(file: Path) -> Document:
    try:
        return Document(str(file), file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from None


def stdlib_documents() -> list[Document]:
    """Python's standard library as it lies on this machine: modules, then the language reference.

    Tests and the tables of character encodings are left out. The language reference comes from
    ``pydoc_data/topics.py``, whose pages are read as the text they hold instead of as source.
    """
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if _LEFT_OUT & set(name.split("/")[:-1]) or name == _TOPICS:
            continue
        if name.startswith(_THIS_MACHINE):
            continue
        documents.append(Document(name, file.read_text(encoding="utf-8", errors="replace")))
    documents += [Document(f"topics/{name}", text) for name, text in sorted(topics.items())]
    return [document for document in documents if document.text.strip()]


def hold_out(
    documents: Sequence[Document], every: int = 40
) -> tuple[list[Document], list[Document]]:
    """(training, held-out): each `every`-th document is held out whole, so no text is in both.

    With fewer documents than that, the last tenth of each is cut off and held out.
    """
    if every < 2:
        raise ValueError(f"every {every}. document held out: expected 2 or more")
    if len(documents) >= every:
        held_out = [*documents[every - 1 :: every]]
        training = [doc for place, doc in enumerate(documents) if place % every != every - 1]
        return training, held_out
    cuts = [len(document.text) * 9 // 10 for document in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return (
        [Document(document.name, document.text[:cut]) for document, cut in pairs],
        [Document(document.name, document.text[cut:]) for document, cut in pairs],
    )


def token_stream(
    documents: Iterable[Document], encode: Callable[[str], Sequence[int]], end_id: int
) -> Tensor:
    """All documents as one line of token ids (N), each with `end_id` in front of it."""
    pieces = [torch.tensor([end_id, *encode(document.text)]) for document in documents]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)


class Batches:
    """Windows of a token stream, shuffled anew each epoch; `at(step)` needs no history.

    The stream is read as a ring and each epoch starts somewhere else on it, so that a token does
    not always stand at the same place of its window.

    copies  share of rows in which one passage stands a second time, in the place of what followed:
            text in which looking back pays, so that induction heads form early. 0 leaves the text

    Raises ValueError for a stream that is shorter than one window.
    """

    def __init__(
        self, stream: Tensor, *, context: int, batch: int, seed: int, copies: float = 0.0
    ) -> None:
        if len(stream) <= context:
            raise ValueError(
                f"the training text is {len(stream):,} tokens long: a context of {context:,} needs "
                f"at least {context + 1:,}; give more text or a smaller context"
            )
        if not 0 <= copies <= 1:
            raise ValueError(f"copies in {copies} of the rows: expected a share, 0 to 1")
        self.stream, self.context, self.batch, self.seed = stream, context, batch, seed
        self.copies = copies
        self.windows = len(stream) // context
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of optimiser step `step` (from 0), both (B, T)."""
        rows = range(step * self.batch, (step + 1) * self.batch)
        starts = torch.tensor([self._start(row) for row in rows])
        places = starts[:, None] + torch.arange(self.context + 1)  # (B, T + 1)
        ids = self.stream[places % len(self.stream)]
        if self.copies:
            generator = torch.Generator().manual_seed((self.seed + 1) * 2**32 + step)
            chosen = torch.rand(len(ids), generator=generator) < self.copies
            for row in chosen.nonzero().flatten().tolist():
                copy_passage(ids[row], generator)
        return ids[:, :-1], ids[:, 1:]

    def _start(self, row: int) -> int:
        epoch, place = divmod(row, self.windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            shift = torch.randint(self.context, (), generator=generator)
            order = torch.randperm(self.windows, generator=generator)
            self._epoch, self._starts = epoch, shift + order * self.context
        return int(self._starts[place])


def copy_passage(ids: Tensor, generator: torch.Generator) -> None:
    """Put a random passage of ids (N) a second time somewhere after itself, in place.

    a b c d e f g h i j   ->   a b c d e f b c d j
    """

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    longest = len(ids) // 2
    length = between(min(SHORTEST_COPY, longest), longest)
    first = between(0, len(ids) - 2 * length)
    second = between(first + length, len(ids) - length)
    ids[second : second + length] = ids[first : first + length].clone()


def held_out_windows(stream: Tensor, context: int, limit: int | None = None) -> Tensor:
    """Windows side by side, (N, T + 1), evenly spread over the stream if there are over `limit`.

    A stream shorter than one window is one short window; ValueError if it has no token to predict.
    """
    if len(stream) < 2:
        raise ValueError(f"the held-out text is {len(stream)} tokens long: expected 2 or more")
    context = min(context, len(stream) - 1)
    windows = (len(stream) - 1) // context
    chosen = torch.arange(windows)
    if limit is not None and limit < windows:
        chosen = torch.linspace(0, windows - 1, limit).long()
    return stream[chosen[:, None] * context + torch.arange(context + 1)]
