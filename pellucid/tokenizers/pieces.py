"""The pieces of a SentencePiece model file: read, and given other names.

Fields are numbered as ``sentencepiece_model.proto`` numbers them: 1 is a piece, in it 1 the text, 2
the score and 3 the type.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # how a field is written


class Piece(NamedTuple):
    """One piece: its text, its score, its type."""

    text: str
    score: float
    type: int


def pieces_in(model: bytes) -> list[Piece]:
    """The pieces of a model that the sentencepiece library has read, by id."""
    return [_piece(content) for number, content, _ in _fields(model) if number == 1]


def with_names(model: bytes, names: Mapping[str, str]) -> bytes:
    """The model with other texts for some pieces: text -> its new one."""
    found = []
    for number, content, whole in _fields(model):
        piece = _piece(content) if number == 1 else None
        if piece is not None and piece.text in names:
            whole = piece_field(piece._replace(text=names[piece.text]))
        found.append(whole)
    return b"".join(found)


def piece_field(piece: Piece) -> bytes:
    """A piece as a model file has it."""
    score = b"\x15" + struct.pack("<f", piece.score)
    return field(1, field(1, piece.text.encode()) + score + number_field(3, piece.type))


def field(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def number_field(number: int, value: int) -> bytes:
    """A field of a whole number."""
    return _varint(number << 3) + _varint(value)


def _piece(content: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value, _ in _fields(content):
        if number == 1:
            text = value.decode("utf-8", "replace")
        elif number == 2:
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = _number(value, 0)[0]
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, content, the whole field) of each field in order."""
    place = 0
    while place < len(data):
        tag, begin = _number(data, place)
        way = tag & 7
        if way == _BYTES:
            size, begin = _number(data, begin)
        else:
            size = {_EIGHT: 8, _FOUR: 4}.get(way) or _number(data, begin)[1] - begin
        yield tag >> 3, data[begin : begin + size], data[place : begin + size]
        place = begin + size


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A varint and the place after it."""
    value = shift = 0
    while place < len(data):
        value |= (data[place] & 127) << shift
        shift, place = shift + 7, place + 1
        if data[place - 1] < 128:
            break
    return value, place


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
