"""Text to train on: documents from files and folders, the held-out split, the token stream.

documents   [a.py] [b.py] [c.py] …                    some are held out, whole
stream      <end> a a a a <end> b b b <end> c c …     one long line of token ids, (N)
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
