"""Text to train on: documents from files and folders, the held-out split, the token stream.

    documents   [a.py] [b.py] [c.py] …                    some are held out, whole
    stream      <end> a a a a <end> b b b <end> c c …     one long line of token ids, (N)

A text file is one document, or several with a separator between them; in a file of JSON lines each
line is one.
"""

from __future__ import annotations

import codecs
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pellucid.files import parse_json
from pellucid.tokenizers.base import Tokenizer, valid_unicode

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".html", ".csv")
JSON_LINES = ".jsonl"
_FILES_LOOKED_AT = 32  # for a note, before all of them are read
_OFTEN = 3  # times that a text may spell a special token without a note
# Folders of the standard library that are no part of it, or lists of values rather than text.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
_TOPICS = "pydoc_data/topics.py"
_THIS_MACHINE = "_sysconfigdata"  # how this very interpreter was built


class Document(NamedTuple):
    """One text; `name` is what an error message calls it."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """How documents lie in files.

    text_key   the key of the text in each object of a ``.jsonl`` file
    separator  what stands between two documents of a text file, such as ``<|endoftext|>``; line
               breaks around it belong to it. None: a file is one document
    """

    text_key: str = "text"
    separator: str | None = None

    def __post_init__(self) -> None:
        if self.separator is not None and not self.separator.strip():
            raise ValueError(f"separator {self.separator!r}: expected something that can be seen")

    def delimiter(self, file: str | Path) -> bytes | None:
        """The bytes between the documents of a file, None where the file is one document."""
        if str(file).endswith(JSON_LINES):
            return b"\n"
        return self.separator.encode() if self.separator else None

    def text(self, record: bytes, file: str | Path, where: int) -> str:
        """The text of what stands between two delimiters; `where` is its first byte in the file.

        Raises ValueError for bytes that are not UTF-8 and for a line without the key.
        """
        text = decoded(record, file, where)
        if str(file).endswith(JSON_LINES):
            return self._of_line(text, f"{file} (line at byte {where})")
        return text.strip("\r\n") if self.separator else text

    def _of_line(self, line: str, place: str) -> str:
        if not line.strip():
            return ""
        found = parse_json(line, place)
        if not isinstance(found, dict) or not isinstance(found.get(self.text_key), str):
            keys = ", ".join(map(repr, found)) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{place} has no text under {self.text_key!r}: found {keys or 'none'}")
        return valid_unicode(found[self.text_key])  # escapes can spell half a character


def decoded(data: bytes, file: str | Path, where: int = 0) -> str:
    """UTF-8 as text, without the byte order mark that some programs put in front of a file.

    where  the place of the first byte in the file. ValueError, with the byte, for other bytes
    """
    mark = codecs.BOM_UTF8 if where == 0 and data.startswith(codecs.BOM_UTF8) else b""
    try:
        return data[len(mark) :].decode("utf-8")
    except UnicodeDecodeError as error:
        place = where + len(mark) + error.start
        raise ValueError(f"{file} is not UTF-8 text (byte {place})") from None


def note_spelt_specials(
    texts: Iterable[str], tokenizer: Tokenizer, separator: str | None = None
) -> None:
    """A warning where text spells a special token often: there it is text, and never that token."""
    counts: Counter[str] = Counter()
    for text in texts:
        for name in tokenizer.specials:
            counts[name] += text.count(name) if name != separator else 0
    name, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if count >= _OFTEN:
        warnings.warn(
            f"the text spells {name!r} {count:,} times, and is read as text there; where it stands "
            f"between documents, give --separator {name!r}",
            stacklevel=2,
        )


def beginnings(paths: Iterable[str | Path]) -> Iterator[str]:
    """The first mebibyte of each of the first files, as far as it is text."""
    for file in find_files(paths)[:_FILES_LOOKED_AT]:
        with file.open("rb") as opened:
            yield opened.read(1 << 20).decode("utf-8", "ignore")


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """Every text file among `paths`, folders read whole, in the order of their names.

    A file given by name is always taken; inside a folder only those that end in TEXT_SUFFIXES.
    Raises OSError for a path that is not there.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of text")
        inside = path.rglob("*") if path.is_dir() else [path]
        files = [file for file in inside if file.suffix in TEXT_SUFFIXES or file == path]
        found += sorted(file for file in files if file.is_file())
    return found


def stream_documents(
    paths: Iterable[str | Path], layout: TextFormat | None = None
) -> Iterator[Document]:
    """The documents of all files, one at a time; those without any text are left out.

    Raises OSError for a path that is not there and ValueError for what is not text.
    """
    layout = layout or TextFormat()
    for file in find_files(paths):
        delimiter = layout.delimiter(file)
        records = [(0, file.read_bytes())] if delimiter is None else _records(file, delimiter)
        for number, (where, record) in enumerate(records, start=1):
            text = layout.text(record, file, where)
            if text.strip():
                yield Document(str(file) if delimiter is None else f"{file}:{number}", text)


def _records(file: Path, delimiter: bytes) -> Iterator[tuple[int, bytes]]:
    if delimiter == b"\n":
        with file.open("rb") as lines:
            where = 0
            for line in lines:
                yield where, line
                where += len(line)
        return
    where = 0
    for record in file.read_bytes().split(delimiter):
        yield where, record
        where += len(record) + len(delimiter)


def read_documents(paths: Iterable[str | Path], layout: TextFormat | None = None) -> list[Document]:
    """All of `stream_documents` in memory."""
    return list(stream_documents(paths, layout))


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
    cuts = [tenth_from_end(len(document.text)) for document in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return (
        [Document(document.name, document.text[:cut]) for document, cut in pairs],
        [Document(document.name, document.text[cut:]) for document, cut in pairs],
    )


def tenth_from_end(characters: int) -> int:
    """Where the last tenth of so many characters begins."""
    return characters * 9 // 10


def begin_and_end(tokenizer: Tokenizer) -> tuple[int, int | None]:
    """The tokens around a text: one in front, where generation begins too, and one behind, if any.

        Llama   <bos> text <eos> <bos> text <eos> …       adds_bos: its prompts begin with it
        GPT-2   <end> text <end> text …                   one token between texts is both: no second

    ValueError for a tokenizer that has neither.
    """
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if bos is not None and (tokenizer.adds_bos or eos is None):
        return bos, None if eos == bos else eos
    if eos is None:
        raise ValueError("this tokenizer has no token that begins or ends a text")
    return eos, None


def token_stream(
    documents: Iterable[Document],
    encode: Callable[[str], Sequence[int]],
    begin: int,
    end: int | None = None,
) -> Tensor:
    """All documents in one row of token ids (N), each behind `begin` and before `end`, if any."""
    behind = [] if end is None else [end]
    pieces = [torch.tensor([begin, *encode(document.text), *behind]) for document in documents]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)
