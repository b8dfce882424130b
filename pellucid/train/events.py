"""TensorBoard's event files, as far as scalars go; TensorBoard itself is only needed to look.

A file is a row of records, each framed as in TFRecord: length (8 bytes), its checksum (4), an Event
in protocol buffers, its checksum (4), all little-endian. The fields, by number, are those of
``event.proto`` and ``summary.proto``:

    Event    1 wall_time: double    2 step: varint    3 file_version: text    5 summary: Summary
    Summary  1 value: Value         Value  1 tag: text    2 simple_value: float
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType

VERSION = "brain.Event:2"


class EventFile:
    """A new event file in `folder`; `add` appends scalars, which can be read at once."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        stem = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
        number = sum(file.name.startswith(stem) for file in folder.iterdir())
        self._file = (folder / f"{stem}.{number}").open("wb", buffering=0)
        self._file.write(record(_double(1, now) + _text(3, VERSION)))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point of each curve."""
        values = b"".join(
            _bytes(1, _text(1, tag) + _float(2, value)) for tag, value in scalars.items()
        )
        self._file.write(record(_double(1, time.time()) + _whole(2, step) + _bytes(5, values)))

    def __enter__(self) -> EventFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def record(data: bytes) -> bytes:
    """`data` with its length and both checksums around it."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", checksum(length)) + data + struct.pack("<I", checksum(data))


def checksum(data: bytes) -> int:
    """CRC-32C (Castagnoli), turned and shifted as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _table()[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _whole(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _double(field: int, number: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", number)


def _float(field: int, number: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", number)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())
