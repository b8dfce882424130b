"""Trace files as sides of a diff: read them, name their tensors, hold them against a config."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.checkpoints.wrappers import unwrapped_names
from pellucid.diff.sides.maps import NameMap, UnknownNames, guess_map, section_of
from pellucid.trace import Trace

_MOST_PACKED, _SMALL = 100, 100 << 20  # times as large unpacked; bytes that are no matter
ALIGNMENT = 64  # bytes: where torch's own tensors begin
_PROJECTED = ("attn.q", "attn.k", "attn.v")  # and q_rotated, k_rotated
# With left padding these have an axis for the batch too; without it, foreign ones may.
_LOOSE = (
    "positions", "mask", "window_mask", "rope.cos", "rope.sin", "second_rope.cos",
    "second_rope.sin", "pos_embed", "tokens",
)  # fmt: skip


def load_recording(path: str | Path) -> Trace:
    """The tensors of a ``.safetensors`` or ``.npz`` file, under the names they have there.

    ValueError where the file is none, or holds what torch has no dtype for.
    """
    if Path(path).suffix != ".npz":
        return Trace.load(path)
    from zipfile import BadZipFile

    import numpy as np

    try:
        _check_sizes(Path(path))
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (BadZipFile, ValueError, OSError, EOFError, AttributeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable .npz file ({line})") from None
    return Trace({name: _tensor(array, name, path) for name, array in arrays.items()})


def _check_sizes(path: Path) -> None:
    """ValueError for a ``.npz`` whose arrays are larger than their part of the file holds.

    Headers can state any shape, and a few bytes can be unpacked into gigabytes.
    """
    from zipfile import ZipFile

    import numpy as np

    with ZipFile(path) as archive:
        for each in archive.infolist():
            if each.file_size > _MOST_PACKED * each.compress_size + _SMALL:
                raise ValueError(f"{each.filename} unpacks into {each.file_size:,} bytes")
            with archive.open(each) as member:
                version = np.lib.format.read_magic(member)
                read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                    version, np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(member)
            stated = prod(shape) * dtype.itemsize
            if stated > each.file_size or min(shape, default=0) < 0:
                raise ValueError(
                    f"{each.filename} says it has {stated:,} bytes, and holds {each.file_size:,}"
                )


def _tensor(array: Any, name: str, path: str | Path) -> Tensor:
    dtype = array.dtype
    if dtype.kind not in "fiub" or (dtype.kind == "u" and dtype.itemsize == 2):
        raise ValueError(
            f"{path}: {name} is {dtype}: numpy has no bfloat16 to tell it from other 16-bit "
            "data; save a .safetensors file, or convert to float32"
        )
    try:
        return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C", copy=False).copy())
    except TypeError:
        raise ValueError(f"{path}: {name} is {dtype}, which torch does not have") from None


def named(recorded: Trace, label: str, name_map: NameMap | None, config: Any = None) -> Trace:
    """The recording under our names: by `name_map`, else as it is, else by the best shipped map.

    ValueError where it is empty, and `UnknownNames` where most names are not known.
    """
    if not recorded:
        raise ValueError(f"{label}: the trace is empty: nothing can be compared")
    recorded = _without_wrappers(recorded, name_map, section_of(config))
    own = [name for name in recorded if graph.known(name) and names.without_step(name) != "tokens"]
    chosen = name_map or guess_map(recorded, section_of(config))
    if name_map is None and chosen is not None and chosen.knows(recorded) <= len(own):
        chosen = None
    if chosen is not None and chosen.knows(recorded):
        return chosen.apply(recorded, config)
    unknown = [name for name in recorded if not graph.known(name)]
    if len(own) >= len(unknown):
        return recorded
    said = f"name map {chosen.label} knows none" if chosen else f"{len(unknown)} are unknown"
    raise UnknownNames(
        f"{label}: of its {len(recorded)} names {said}, such as {unknown[0]!r}; give a name_map",
        recorded,
    )


def _without_wrappers(recorded: Trace, name_map: NameMap | None, section: Any) -> Trace:
    """A recording of a wrapped model, under the names of the model inside."""
    if all(map(graph.known, recorded)):
        return recorded

    def expected(stored: Collection[str]) -> set[str]:
        chosen = name_map or guess_map(stored, section)
        found = chosen.found(stored) if chosen is not None else ()
        return {name for name in stored if graph.known(name)} | {row[0] for row in found}

    spelt = unwrapped_names(recorded, expected)
    if all(new == old for new, old in spelt.items()):
        return recorded
    return Trace({new: recorded[old] for new, old in spelt.items()}, recorded.meta)


def in_memory_order(seen: Trace) -> Trace:
    """Queries, keys and values (B, heads, T, D) with the heads of a token side by side in memory.

    A projection leaves them so, a file does not, and a matrix product may add up in another order.
    So it may where a tensor begins at an odd place of a mapped file: such tensors are copied.
    """
    return Trace({name: _in_memory_order(name, x) for name, x in seen.items()}, seen.meta)


def _in_memory_order(name: str, x: Tensor) -> Tensor:
    if _headed(name, x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _headed(name: str, x: Tensor) -> bool:
    return graph.known(name) and x.ndim == 4 and graph.row(name).leaf.startswith(_PROJECTED)


def check_length(seen: Trace, label: str, tokens: int) -> None:
    """ValueError where a recording is of another number of tokens than the run."""
    for name in seen:
        if graph.known(name) and names.step_of(name) == 0 and "T" in graph.dims(name):
            dims = graph.dims(name)
            length = seen[name].shape[dims.index("T") - len(dims)]
            if length != tokens:
                raise ValueError(
                    f"{label} is a recording of {length} tokens, the run is of {tokens}: "
                    "give the prompt it was made of"
                )
            return


def check_recording(seen: Trace, label: str, config: Any) -> None:
    """ValueError, with both shapes, where a recording cannot be of a model with `config`."""
    wanted = set(graph.expand(config))
    held: dict[tuple[int, str], int] = {}
    known = graph.sizes(config, batch=0, tokens=0, seen=0)
    for name in seen:
        if not graph.known(name):
            continue
        plain, step = names.without_step(name), names.step_of(name)
        if plain not in wanted:
            raise ValueError(
                f"{label} holds {name}, which a {config.family} of {config.n_layers} layers does "
                "not have: a trace of another model"
            )
        dims, shape = graph.dims(name), tuple(seen[name].shape)
        if plain in _LOOSE or (plain.endswith("logits") and shape[1:-1] == (1,)):
            continue  # the logits of the last token alone
        expected = tuple(
            held.get((0 if letter == "B" else step, letter), length)
            if letter in "BTS"
            else shape[-1]
            if letter == "V"
            else known[letter]
            for letter, length in zip(dims, shape, strict=False)
        )
        if shape != expected or len(shape) != len(dims):
            raise ValueError(
                f"{label}: {name} has shape {shape}, expected ({', '.join(dims)}) = {expected}: "
                "a trace of another model, or a layout that a name map must state"
            )
        for letter, length in zip(dims, shape, strict=True):
            if letter in "BTS":
                held[0 if letter == "B" else step, letter] = length
