"""A model as one GGUF file, written tensor by tensor through the `gguf` package.

Names, keys and row order are llama.cpp's, by the table beside the family's row. Vectors and the
position table are float32 whatever the matrices are, as its converter leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.checkpoints.formats.gguf import PLAIN, dequantised
from pellucid.checkpoints.weights import parameter_shapes
from pellucid.families import (
    Entry,
    Shape,
    gguf_of,
    gguf_table,
    joined,
    rope_tensors,
    stored_shape,
    write_gguf_config,
)
from pellucid.gguf_file import TYPES
from pellucid.models import Config

_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # llama.cpp's enum llama_ftype
_SIZES = {name: (values, nbytes) for name, values, nbytes in TYPES.values()}
Read = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor to write: the entry of the name table, its shape and its GGUF type."""

    entry: Entry
    shape: Shape
    type: str

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        values, nbytes = _SIZES[self.type]
        return prod(self.shape) // values * nbytes


def planned(config: Config, types: str | Mapping[str, str]) -> list[Planned]:
    """What a model's file holds.

    types  GGUF type of the matrices, one for all or one for each parameter: F32, F16, BF16, Q8_0

    ValueError for a family or a config that llama.cpp's files cannot state, and for Q8_0 where
    rows are no multiple of 32.
    """
    shapes, found = parameter_shapes(config), []
    for entry in _all_entries(config):
        shape, kind = stored_shape(entry, shapes), "F32"
        if len(shape) == 2 and not (entry.heads or entry.stored.startswith("position_embd")):
            kind = types if isinstance(types, str) else types[entry.parameters[0]]
        if shape[-1] % _SIZES[kind][0]:
            raise ValueError(
                f"{entry.stored} has rows of {shape[-1]}: {kind} takes multiples of 32; "
                "write float16 or bfloat16"
            )
        found.append(Planned(entry=entry, shape=shape, type=kind))
    return found


def _all_entries(config: Config) -> Iterator[Entry]:
    """The entries of the table, and a tied head where llama.cpp requires one in every file."""
    yield from gguf_table(config)
    if config.tied and gguf_of(config).head == "own":
        yield Entry(stored="output.weight", parameters=("embed.weight",))


def as_stored(config: Config, types: str | Mapping[str, str]) -> Callable[[str, Tensor], Tensor]:
    """What comes back for a parameter from a file with these types: its name and value -> value."""
    by_name = {name: each for each in planned(config, types) for name in each.entry.parameters}

    def change(name: str, tensor: Tensor) -> Tensor:
        each = by_name[name]
        if each.entry.plus_one:
            return (tensor.float() + 1) - 1
        if each.type in PLAIN:
            return tensor.to(PLAIN[each.type])
        raw = torch.from_numpy(_data(tensor.contiguous(), each.type))
        return dequantised(raw.view(len(tensor), -1), each.type, torch.float32)

    return change


def write_gguf(
    path: Path,
    config: Config,
    read: Read,
    types: str | Mapping[str, str],
    tokenizer: Mapping[str, Any],
) -> None:
    """Write the file. `read` gives a parameter by name, `tokenizer` are the keys of that name."""
    from gguf import GGUFWriter

    keys, tensors, extra = write_gguf_config(config), planned(config, types), rope_tensors(config)
    kinds = [each.type for each in tensors if len(each.shape) == 2 and not each.entry.heads]
    keys["general.file_type"] = _FILE_TYPES[max(set(kinds), key=kinds.count)]
    if "Q8_0" in kinds:
        keys["general.quantization_version"] = 2
    writer = GGUFWriter(None, keys.pop("general.architecture"))
    try:
        for key, value in {**keys, **tokenizer}.items():
            _add(writer, key, value)
        for each in tensors:
            _announce(writer, each.entry.stored, each.shape, each.type, each.nbytes)
        for name, tensor in extra.items():
            _announce(writer, name, tuple(tensor.shape), "F32", tensor.nbytes)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in tensors:
            writer.write_tensor_data(_data(_stored(each, read), each.type))
        for tensor in extra.values():
            writer.write_tensor_data(tensor.numpy())
    finally:
        writer.close()


def _stored(each: Planned, read: Read) -> Tensor:
    if each.entry.zeros is not None:
        return torch.zeros(each.shape)
    return joined(each.entry, [read(name) for name in each.entry.parameters])


def _data(tensor: Tensor, kind: str) -> Any:
    """The bytes of a tensor in a GGUF type, as a numpy array."""
    from gguf import GGMLQuantizationType, quantize

    if kind == "Q8_0":
        return quantize(tensor.float().numpy(), GGMLQuantizationType.Q8_0)
    return tensor.to(PLAIN[kind]).contiguous().view(torch.uint8).numpy()


def _announce(writer: Any, name: str, shape: Shape, kind: str, nbytes: int) -> None:
    import numpy
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    number = GGMLQuantizationType[kind]
    plain = kind in PLAIN
    sizes = shape if plain else quant_shape_to_byte_shape(shape, number)
    dtype = numpy.dtype(numpy.float32 if plain else numpy.uint8)
    writer.add_tensor_info(name, sizes, dtype, nbytes, raw_dtype=number)


def _add(writer: Any, key: str, value: Any) -> None:
    """A key by the kind of its value; whole numbers become uint32, others float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def types_of(config: Config, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, str]]:
    """(parameter, GGUF type) for the dtypes that weights have; ValueError for another dtype."""
    names = {dtype: kind for kind, dtype in PLAIN.items()}
    for name in parameter_shapes(config):
        if dtypes[name] not in names:
            raise ValueError(f"{name} is {dtypes[name]}: GGUF holds float32, float16 and bfloat16")
        yield name, names[dtypes[name]]
