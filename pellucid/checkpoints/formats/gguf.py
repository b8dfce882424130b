"""GGUF, llama.cpp's format: one file with config, tokenizer and weights, most of them quantised.

Quantised tensors are made into numbers one at a time and piece by piece, straight into the dtype
that is asked for, so loading takes the memory of the result and little more. The levels of each
type are those of the `gguf` package, llama.cpp's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.checkpoints.files import Stored, forget_pages, read_pages, same_bits
from pellucid.checkpoints.weights import (
    Recipe,
    Redundant,
    Weights,
    accounted,
    expected_shapes,
)
from pellucid.families import (
    Entry,
    as_ours,
    gguf_table,
    read_gguf_config,
    rope_tensors,
    stored_shape,
)
from pellucid.gguf_file import GGUFHeader, read_header
from pellucid.models import Config

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 1 << 18  # values dequantised at a time: a few MB with what the levels need on the way
_SMALL = 1 << 16  # values of a tensor that states RoPE's scaling


class GGUFFile:
    """One ``.gguf`` file; quantised tensors are read as `dtype`."""

    def __init__(self, header: GGUFHeader, dtype: torch.dtype = torch.float32) -> None:
        self.header, self.path, self.paths, self.dtype = header, header.path, (header.path,), dtype
        self.entries = {
            name: Stored(each.shape, PLAIN.get(each.type, dtype))
            for name, each in header.tensors.items()
        }
        self._bytes = self._mapped()

    def _mapped(self) -> Any:
        """The whole file in memory, private (not shared): not a byte of it is read yet."""
        return torch.UntypedStorage.from_file(str(self.path), False, self.path.stat().st_size)

    def raw(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The stored bytes of a tensor's rows, (rows, bytes of a row), mapped."""
        each = self.header.tensors[name]
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        found = nothing.set_(self._bytes[each.begin : each.begin + each.nbytes])
        return found.view(-1, each.nbytes // max(1, torch.Size(each.shape[:-1]).numel()))[rows]

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor or some of its rows: mapped where the type is a plain one, else computed."""
        each, stored = self.header.tensors[name], self.entries[name]
        raw = self.raw(name, rows)
        shape = (*raw.shape[: len(each.shape) - 1], each.shape[-1])
        if rows == slice(None):
            shape = each.shape
        if each.type in PLAIN:
            return raw.view(stored.dtype).view(shape)
        found = dequantised(raw, each.type, stored.dtype).view(shape)
        forget_pages(raw)
        return found

    def reopened(self, dtype: torch.dtype | None = None) -> GGUFFile:
        """The same file through a mapping of its own, quantised tensors as `dtype`."""
        fresh = copy(self)
        if dtype is not None:
            fresh = GGUFFile(self.header, dtype)
        fresh._bytes = self._mapped()
        return fresh


def dequantised(raw: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows of blocks (rows, bytes) of a GGUF type as numbers (rows, values); float32 on the way."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    number = GGMLQuantizationType[kind]
    values, nbytes = GGML_QUANT_SIZES[number]
    found = torch.empty(len(raw), raw.shape[1] // nbytes * values, dtype=dtype)
    rows = max(1, _PIECE // max(1, found.shape[1]))
    for first in range(0, len(raw), rows):
        piece = dequantize(raw[first : first + rows].numpy(), number)
        found[first : first + rows] = torch.from_numpy(piece)
    return found


class GGUFWeights(Weights):
    """As `Weights`; what is only brought into memory or let go is not dequantised for that."""

    _files: list[GGUFFile]

    @property
    def file(self) -> GGUFFile:
        """The file."""
        return self._files[0]

    def type(self, name: str) -> str:
        """GGUF type that a parameter is stored in: "Q4_K"."""
        return self.file.header.tensors[self.stored_name(name)].type

    def blocks(self, name: str) -> Tensor:
        """The stored bytes of a matrix, rows in our order: (rows, bytes of a row)."""
        make = self._recipes[name].make
        assert isinstance(make, _Part), "every recipe of a GGUF file is one"
        return make.picked(self.file.raw(self.stored_name(name)))

    def forget(self, name: str, rows: slice | None = None) -> None:
        """Hand back the memory of the file's pages."""
        forget_pages(self.file.raw(self.stored_name(name), rows or slice(None)))

    def read_pages(self, name: str, rows: slice | None = None) -> None:
        """Have the system read a parameter's bytes from the disk now."""
        read_pages(self.file.raw(self.stored_name(name), rows or slice(None)))

    def rows(self, name: str, rows: slice) -> Tensor:
        """``weights[name][rows]``, and no other row is dequantised where rows keep their order."""
        if name in ("embed.weight", "unembed.weight"):
            return self.file.read(self.stored_name(name), rows)
        return self[name][rows]

    def look_up(self, name: str, index: Tensor) -> Tensor:
        """``weights[name][index]``, and no other row is dequantised."""
        different, places = index.flatten().unique(return_inverse=True)
        found = [self.rows(name, slice(row, row + 1)) for row in different.tolist()]
        return torch.cat(found)[places].view(*index.shape, -1)

    def reopened(self, dtype: torch.dtype | None = None) -> GGUFWeights:
        """The same parameters through a mapping of their own, quantised ones as `dtype`."""
        files = [self.file.reopened(dtype)]
        return GGUFWeights(files, self._recipes, self._redundant, self._where)


def open_file(path: Path) -> tuple[Config, GGUFWeights]:
    """Config and weights of a file, every key of its architecture and every tensor accounted for.

    ValueError or OSError, in one line, where something is missing, cut short or does not fit.
    """
    header = read_header(path)
    if (parts := header.keys.get("split.count", 1)) not in (0, 1):
        raise ValueError(
            f"{path}: one of {parts} parts; join them (llama-gguf-split --merge) and give the whole"
        )
    file = GGUFFile(header)
    where = str(path)
    shapes = {name: each.shape for name, each in header.tensors.items()}
    config = read_gguf_config(header.keys, shapes, _small_tensors(file), _is_tied(file), where)
    parameters = expected_shapes(config, [file], where)
    recipes: dict[str, Recipe] = {}
    redundant = {name: Redundant() for name in rope_tensors(config)}
    if config.tied:
        redundant["output.weight"] = Redundant(shape=(config.vocab_size, config.width))
    for entry in gguf_table(config):
        if entry.zeros is not None:
            redundant[entry.stored] = Redundant(
                shape=entry.zeros,
                agrees=lambda bias, weights: not bias.any(),
                otherwise="is not zero, although the keys say there is none",
            )
        begin = 0
        for name in entry.parameters:
            rows = parameters[name][0]
            recipes[name] = Recipe(
                stored=entry.stored,
                shape=parameters[name],
                shapes=(stored_shape(entry, parameters),),
                make=_Part(begin, rows, entry),
            )
            begin += rows
    ordered = {name: recipes[name] for name in parameters}
    checked = accounted([file], ordered, redundant, where, "its keys")
    return config, GGUFWeights(checked._files, ordered, redundant, where)


def _small_tensors(file: GGUFFile) -> Callable[[str], Sequence[float]]:
    """Reader of the small tensors that say how RoPE is scaled."""

    def numbers(name: str) -> Sequence[float]:
        stored = file.header.tensors[name]
        if stored.type != "F32" or torch.Size(stored.shape).numel() > _SMALL:
            raise ValueError(
                f"{file.path}: {name} is {stored.shape} {stored.type}, expected F32 for each pair"
            )
        return file.read(name).flatten().tolist()

    return numbers


def _is_tied(file: GGUFFile) -> bool:
    """Whether there is no head, or one that is the embedding written twice."""
    both = [file.header.tensors.get(f"{name}.weight") for name in ("token_embd", "output")]
    if both[1] is None or both[0] is None:
        return True
    if (both[0].type, both[0].shape) != (both[1].type, both[1].shape):
        return False
    embed, head = (file.raw(f"{name}.weight") for name in ("token_embd", "output"))
    return same_bits(embed[:16], head[:16]) and same_bits(embed, head)


@dataclass(frozen=True)
class _Part:
    """Rows `begin` … `begin + rows` of a stored tensor in our order, without the 1 of 1 + w."""

    begin: int
    rows: int
    entry: Entry

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        found = self.picked(parts[0])
        return found.float() - 1 if self.entry.plus_one else found

    def picked(self, whole: Tensor) -> Tensor:
        """The rows, whatever stands in them."""
        whole = as_ours(self.entry, whole)
        return whole[self.begin : self.begin + self.rows]


def stored_types(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """GGUF type -> how many tensors of the file have it, and their bytes; {} for other files."""
    if not isinstance(weights, GGUFWeights):
        return {}
    found: dict[str, tuple[int, int]] = {}
    for each in weights.file.header.tensors.values():
        count, nbytes = found.get(each.type, (0, 0))
        found[each.type] = count + 1, nbytes + each.nbytes
    return found
