"""Training states as versions before wrote them, read without running anything in them.

| | |
|---|---|
| ``training/state.json``, format 1 | one process: whole tensors in ``state.safetensors`` |
| ``sharded/`` | several ranks: files of torch.distributed.checkpoint, ``facts.json`` |

The second holds pickles: ``.metadata``, which slice of which tensor lies where, and in the
``.distcp`` files a ``torch.save`` archive for each slice. Neither is trusted.
`_Metadata` makes inert records of a few classes known by name and refuses every other; the archives
go through torch's own restricted reader.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pellucid.checkpoints.files import SafetensorsFile
from pellucid.files import read_json
from pellucid.train.slices import (
    DTYPES,
    Numbers,
    SlicedTensor,
    Slices,
    digest,
    plain_name,
    read_index,
)

SHARDED, FACTS, METADATA = "sharded", "facts.json", ".metadata"
ONE_PROCESS = "state.safetensors"
_RECORDS = {  # what a .metadata of a training run is made of, besides texts, numbers, lists, dicts
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
}
_OPTIMIZER = "optimizer.state."
_REFUSED = "refused, nothing of it was run"


class _Record:
    """What a class in the pickle is read as: its arguments and its state, and no behaviour."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:  # as the key of a dict while its state is not there yet
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _Metadata(pickle.Unpickler):
    """Reads ``.metadata``; UnpicklingError where it asks for anything but its few records."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._records = {  # new ones for each file: a pickle may write into what it is given
            (module, name): type(name, (_Record,), {})
            for module, names in _RECORDS.items()
            for name in names
        }

    def find_class(self, module: str, name: str) -> Any:
        """An inert class, ``torch.Size`` or a dtype."""
        if (module, name) in self._records:
            return self._records[module, name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def one_process(folder: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], Slices]:
    """Facts as today's and tensors of a state in format 1, whose ``state.json`` held `facts`."""
    path = folder / ONE_PROCESS
    index = {}
    if path.is_file():
        for name, stored in SafetensorsFile(path).entries.items():
            index[name] = SlicedTensor(
                stored.shape, stored.dtype, {ONE_PROCESS: (0,) * len(stored.shape)}
            )
    by_name = Slices.in_folder(folder, index)
    renamed = {_random_of_rank(name): name for name in index}
    tensors = Slices(
        {name: index[old] for name, old in renamed.items()},
        lambda file, name, offset: by_name[renamed[name]],
    )
    return facts | {"data_ranks": 1}, tensors


def _random_of_rank(name: str) -> str:
    kind = name.removeprefix("random.")
    return name if kind == name else f"random.0.{kind}"


def several_ranks(folder: Path, share: slice) -> tuple[dict[str, Any], Slices]:
    """Facts as today's and tensors of ``folder/sharded``; checks the checksums of a `share` of it.

    Raises ValueError or OSError, in one line, for what is missing, damaged or no such checkpoint.
    """
    inside = folder / SHARDED
    facts = _facts(inside)
    index, places, others = _index(inside)
    sums = facts["sha256"]
    for name in sorted(sums)[share]:
        if not (inside / plain_name(name)).is_file():
            raise FileNotFoundError(f"{inside / name} is missing from this checkpoint")
        if digest(inside / name) != sums[name]:
            raise ValueError(f"{inside / name} is damaged: it is not what was written (checksum)")

    for file, begin, length in others[share]:  # nothing of them is needed
        _archived(inside / file, begin, length)

    def read_file(file: str, name: str, offset: Numbers) -> Tensor:
        found = _archived(inside / file, *places[name, offset])
        if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta:
            raise ValueError(f"{inside / file}: {_REFUSED}: {name} is no plain tensor")
        return found

    stored = Slices(index, read_file)
    steps = {
        name.removeprefix("step."): float(stored[name]) for name in index if name[:5] == "step."
    }
    return facts | {"optimizer_steps": steps}, stored


def _facts(inside: Path) -> dict[str, Any]:
    path = inside / FACTS
    try:
        facts = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{inside}: no {FACTS} to resume from") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(facts.get("sha256"), dict):
        raise ValueError(f"{path} is damaged: it has no checksums")
    return facts


class _Contents(NamedTuple):
    """The index of the tensors; where in its file each slice lies; and where other values do."""

    entries: dict[str, SlicedTensor]
    places: dict[tuple[str, Numbers], tuple[int, int]]  # begin and length
    others: list[tuple[str, int, int]]  # file, begin and length


def _index(inside: Path) -> _Contents:
    """What ``.metadata`` says."""
    path = inside / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{inside}: no {METADATA} of a checkpoint in it")
    try:
        return _understood(_Metadata(io.BytesIO(path.read_bytes())).load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {_REFUSED}: {error}") from None
    except Exception as error:  # pickles of other things end in errors of every kind
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged: {said}") from None


def _understood(metadata: Any) -> _Contents:
    found = metadata.state
    files: dict[str, dict[str, Numbers]] = {}
    places: dict[tuple[str, Numbers], tuple[int, int]] = {}
    others: list[tuple[str, int, int]] = []
    for key, place in found["storage_data"].items():
        name, offset = _today(key.state["fqn"]), key.state.get("offset")
        file = plain_name(place.state["relative_path"])
        begin, length = place.state["offset"], place.state["length"]
        if offset is None:
            others.append((file, begin, length))
        elif name is not None:
            files.setdefault(name, {})[file] = tuple(offset)
            places[name, tuple(offset)] = (begin, length)
    index = {}
    for old, stored in found["state_dict_metadata"].items():
        name = _today(old)
        if name is not None and "size" in (stored.state or {}):
            dtype = str(stored.state["properties"].state[0]).removeprefix("torch.")
            index[name] = {
                "shape": list(stored.state["size"]),
                "dtype": dtype,
                "slices": {file: list(begin) for file, begin in files.get(name, {}).items()},
            }
    return _Contents(read_index(index, METADATA), places, others)


def _today(old: str) -> str | None:
    """What today's states call a tensor; None for what is not part of them."""
    name, _, kind = old.removeprefix(_OPTIMIZER).rpartition(".")
    if old.startswith(_OPTIMIZER) and kind in ("exp_avg", "exp_avg_sq", "step"):
        return f"{kind}.{name}"
    return old if old.startswith("random.") else None


def _archived(path: Path, begin: int, length: int) -> Any:
    """What an archive of ``torch.save`` in a file holds: tensors, numbers, texts."""
    with path.open("rb") as opened:
        opened.seek(begin)
        data = opened.read(min(length, path.stat().st_size))
    if not data.startswith(b"PK"):  # torch would take it for a pickle of its first format
        raise ValueError(f"{path}: {_REFUSED}: it holds no archive where the index says so")
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: {_REFUSED}: it asks for more than tensors") from None
    except Exception as error:  # torch names no class of its own for a broken archive
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is damaged: {said[:160]}") from None
    return found
