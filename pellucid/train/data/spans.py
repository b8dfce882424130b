"""Which bytes of which file are read together: text of any size, cut into pieces that fit memory.

    file       |———— document ————|—— document ——|———————— document ————————|
    spans      |——— about 1 MiB ———————————————————|—————————————————————————|…
    shards     [ spans of about 64 MiB ] [ … ] …

Where documents have a delimiter between them, a span ends behind one. A text that is one document
is cut at a line's end where both neighbours are visible, else before a single space: there every
byte-level BPE cuts too, so the tokens are those of the whole text.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pellucid.train.data.documents import TextFormat, find_files, tenth_from_end

SPAN_BYTES = 1 << 20
LEARN_BYTES = 256 << 20
TRAINING, HELD_OUT = "training", "held_out"
_SEARCH = 1 << 16  # bytes looked through for a place to cut
_LINE_END, _SPACE = re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"(?<=\S) (?=\S)")


class Span(NamedTuple):
    """A stretch of bytes of one file.

    document  number, over all files, of the first document in it
    begins    whether its first byte begins a document; ends: whether its last byte ends one
    split     where all of it belongs; None: each of its documents goes by its number
    """

    file: str
    start: int
    stop: int
    document: int
    begins: bool
    ends: bool
    split: str | None


class FilePiece(NamedTuple):
    """Text for one side of the split; `begins`, `ends`: whether a document does so there."""

    split: str
    begins: bool
    ends: bool
    text: str


class SpanPlan(NamedTuple):
    """All spans in order, how many documents they hold, and the settings that cut them."""

    spans: list[Span]
    documents: int
    hold_out: int
    layout: TextFormat

    @property
    def few(self) -> bool:
        """Whether there are too few documents to hold out whole ones."""
        return 0 < self.documents < self.hold_out

    def pieces(self, span: Span) -> Iterator[FilePiece]:
        """The text of a span; documents without any are left out."""
        with open(span.file, "rb") as file:
            file.seek(span.start)
            data = file.read(span.stop - span.start)
        delimiter = self.layout.delimiter(span.file)
        if delimiter is None:
            text = self.layout.text(data, span.file, span.start)
            if text.strip() or not span.begins:
                split = span.split or self._split(span.document)
                yield FilePiece(split, span.begins, span.ends, text)
            return
        where = span.start
        for number, record in enumerate(data.split(delimiter), start=span.document):
            text = self.layout.text(record, span.file, where)
            where += len(record) + len(delimiter)
            if not text.strip():
                continue
            if self.few:
                cut = tenth_from_end(len(text))
                yield FilePiece(TRAINING, True, True, text[:cut])
                yield FilePiece(HELD_OUT, True, True, text[cut:])
            else:
                yield FilePiece(self._split(number), True, True, text)

    def _split(self, document: int) -> str:
        every = self.hold_out
        return HELD_OUT if every and document % every == every - 1 else TRAINING


def plan_spans(
    files: Iterable[Path], layout: TextFormat, hold_out: int, span_bytes: int = SPAN_BYTES
) -> SpanPlan:
    """How to read `files`; each `hold_out`-th document is held out whole, none with 0.

    With fewer documents than that, the last tenth of each is cut off and held out. Reads files that
    have a delimiter once, to count; of others only the places of the cuts.
    Raises ValueError for hold_out 1, where nothing would be left.
    """
    if hold_out == 1 or hold_out < 0:
        raise ValueError(f"every {hold_out}. document held out: expected 2 or more, 0 for none")
    documents = 0
    spans: list[Span] = []
    for file in files:
        found, count = _spans_of(file, layout.delimiter(file), documents, span_bytes)
        spans += found
        documents += count
    planned = SpanPlan(spans, documents, hold_out, layout)
    if planned.few:
        return planned._replace(spans=_split_each(spans, layout, span_bytes))
    return planned


def training_texts(
    paths: Iterable[str | Path], layout: TextFormat, hold_out: int, limit: int = LEARN_BYTES
) -> Iterator[str]:
    """The training side of the text in pieces, for a tokenizer to learn from.

    Of more than `limit` bytes only some spans are read, evenly spread over all of it: a vocabulary
    needs no more, and learning one holds every distinct word in memory.
    """
    planned = plan_spans(find_files(paths), layout, hold_out)
    total = sum(span.stop - span.start for span in planned.spans)
    for span in planned.spans[:: max(1, -(-total // limit))]:
        for piece in planned.pieces(span):
            if piece.split == TRAINING:
                yield piece.text


def shards(spans: Sequence[Span], shard_bytes: int) -> list[list[Span]]:
    """Spans in order, in groups of about `shard_bytes`."""
    groups: list[list[Span]] = []
    room = 0
    for span in spans:
        if room <= 0:
            groups.append([])
            room = shard_bytes
        groups[-1].append(span)
        room -= span.stop - span.start
    return groups


def _spans_of(
    file: Path, delimiter: bytes | None, first: int, span_bytes: int
) -> tuple[list[Span], int]:
    """The spans of one file and the number of its documents, counted on from `first`."""
    size, name = file.stat().st_size, str(file)
    if size == 0:
        return [], 0
    if delimiter is None and size <= span_bytes:
        return [Span(name, 0, size, first, True, True, None)], 1
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if delimiter is None:
            return list(_cut_document(name, data, first, span_bytes)), 1
        spans, documents = [], first
        for start, stop in _cut_records(data, delimiter, span_bytes):
            spans.append(Span(name, start, stop, documents, True, True, None))
            documents += data[start:stop].count(delimiter)
        documents += data[-len(delimiter) :] != delimiter  # the last one has none behind it
        return spans, documents - first


def _cut_records(data: mmap.mmap, delimiter: bytes, span_bytes: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(data):
        found = data.find(delimiter, min(start + span_bytes, len(data)))
        stop = len(data) if found < 0 else found + len(delimiter)
        yield start, stop
        start = stop


def _cut_document(file: str, data: mmap.mmap, document: int, span_bytes: int) -> Iterator[Span]:
    start = 0
    while start < len(data):
        stop = _seam(data, start + span_bytes)
        yield Span(file, start, stop, document, start == 0, stop == len(data), None)
        start = stop


def _seam(data: mmap.mmap, place: int) -> int:
    """The first place from `place` on where text can be cut, or its end."""
    place = _character(data, place)
    if place >= len(data):
        return len(data)
    text = data[place : place + _SEARCH].decode("utf-8", errors="ignore")
    for seam, behind in ((_LINE_END, 1), (_SPACE, 0)):
        if found := seam.search(text):
            return place + len(text[: found.start() + behind].encode())
    return place


def _character(data: mmap.mmap, place: int) -> int:
    """`place`, moved on to where a UTF-8 character begins."""
    while place < len(data) and data[place] & 0xC0 == 0x80:
        place += 1
    return place


def _split_each(spans: list[Span], layout: TextFormat, span_bytes: int) -> list[Span]:
    """Documents that are whole files, cut where their last tenth begins."""
    cut: list[Span] = []
    places: dict[str, int] = {}
    for span in spans:
        if layout.delimiter(span.file) is not None:
            cut.append(span)  # its documents are cut when they are read
            continue
        if span.file not in places:
            places[span.file] = _last_tenth(Path(span.file), span_bytes)
        place = places[span.file]
        if span.start < place:
            stop = min(span.stop, place)
            cut.append(span._replace(stop=stop, ends=stop == place, split=TRAINING))
        if span.stop > place:
            start = max(span.start, place)
            cut.append(span._replace(start=start, begins=start == place, split=HELD_OUT))
    return cut


def _last_tenth(file: Path, block: int) -> int:
    """The byte at which the last tenth of a file's characters begins."""
    wanted = tenth_from_end(sum(len(begin) for _, begin in _characters(file, block)))
    for where, begin in _characters(file, block):
        if wanted < len(begin):
            return where + int(begin[wanted])
        wanted -= len(begin)
    return file.stat().st_size


def _characters(file: Path, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of a file: where each begins, and where in it characters begin."""
    with file.open("rb") as opened:
        where = 0
        while data := opened.read(block):
            yield where, np.flatnonzero(np.frombuffer(data, np.uint8) & 0xC0 != 0x80)
            where += len(data)
