"""Save a model in Hugging Face's layout: whole or not at all."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import tokenizers
from pellucid.checkpoints.files import Shape
from pellucid.checkpoints.hf import INDEX, TOKENIZER_FILES, Entry, joined, stored_shape, table
from pellucid.checkpoints.hf_config import write_config
from pellucid.checkpoints.weights import Weights, parameter_shapes
from pellucid.models import Config

_OURS = ("config.json", "*.safetensors", INDEX, *TOKENIZER_FILES)


def save(
    folder: str | Path,
    config: Config,
    weights: Mapping[str, Tensor],
    tokenizer_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a model as a folder that `open_checkpoint` and transformers' ``from_pretrained`` read.

    weights          parameter name -> tensor: a ``state_dict``, or a checkpoint's lazy weights,
                     of which one file's worth is held at a time
    tokenizer_from   folder whose tokenizer files are copied along; the ids that begin and end text
                     go into the config
    dtype            None: as each tensor is
    max_shard_bytes  more than this is split over several files with an index
    overwrite        replace a model that is there; a folder that holds anything else is refused

    The folder is written beside its place and moved there when it is complete. Raises ValueError
    where the weights do not fit the config, OSError where the folder may not be written.
    """
    folder = Path(folder)
    if folder.exists():
        _check_replaceable(folder, overwrite)
    shapes = parameter_shapes(config)
    _check_weights(config, weights, shapes)
    stated = write_config(config, dtype or _dtype(weights, "embed.weight"))
    stated |= _token_ids(tokenizer_from)
    beside = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.part"
    beside.mkdir(parents=True)
    try:
        _write_weights(beside, config, weights, dtype, max_shard_bytes)
        if tokenizer_from is not None:
            for name in TOKENIZER_FILES:
                if (Path(tokenizer_from) / name).is_file():
                    shutil.copyfile(Path(tokenizer_from) / name, beside / name)
        (beside / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        _move(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a file stands where the model's folder would go")
    there = sorted(path.name for path in folder.iterdir())
    strangers = [name for name in there if not any(fnmatchcase(name, ours) for ours in _OURS)]
    if strangers:
        raise FileExistsError(
            f"{folder}: holds more than a model ({', '.join(strangers[:3])}"
            f"{' …' if len(strangers) > 3 else ''}); save into a new folder"
        )
    if there and not overwrite:
        raise FileExistsError(
            f"{folder}: holds a model already; save into a new folder or overwrite it"
        )


def _check_weights(
    config: Config, weights: Mapping[str, Tensor], shapes: Mapping[str, Shape]
) -> None:
    missing = [f"{name} {shapes[name]}" for name in shapes.keys() - weights.keys()]
    extra = sorted(weights.keys() - shapes.keys())
    wrong = [
        f"{name} is {found}, expected {shape}"
        for name, shape in shapes.items()
        if name in weights and (found := _shape(weights, name)) != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:6])}"
        for kind, names in (("missing", missing), ("not as expected", wrong), ("unknown", extra))
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit this {config.family} config: {'; '.join(problems)}"
        )


def _shape(weights: Mapping[str, Tensor], name: str) -> Shape:
    return weights.shape(name) if isinstance(weights, Weights) else tuple(weights[name].shape)


def _dtype(weights: Mapping[str, Tensor], name: str) -> torch.dtype:
    return weights.dtype(name) if isinstance(weights, Weights) else weights[name].dtype


def _write_weights(
    folder: Path,
    config: Config,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    """``model.safetensors``, or numbered files and the index that says what lies where."""
    from safetensors.torch import save_file

    shapes = parameter_shapes(config)
    zeros_dtype = dtype or _dtype(weights, "embed.weight")

    def size(entry: Entry) -> int:
        stored = dtype or (
            _dtype(weights, entry.parameters[0]) if entry.parameters else zeros_dtype
        )
        return prod(stored_shape(entry, shapes)) * stored.itemsize

    def tensor(entry: Entry) -> Tensor:
        if entry.zeros is not None:
            return torch.zeros(entry.zeros, dtype=zeros_dtype)
        parts = [weights[name].detach().to("cpu", dtype) for name in entry.parameters]
        return joined(entry, parts)

    shards = list(_shards(table(config), size, max_shard_bytes))
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            name = "model.safetensors"
        tensors = _apart({entry.stored: tensor(entry) for entry in shard})
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= {entry.stored: name for entry in shard}
        total += sum(size(entry) for entry in shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where two share memory: safetensors refuses to write those."""
    apart, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        apart[name] = tensor.clone() if tensor.data_ptr() < end else tensor
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return apart


def _shards(
    entries: Iterable[Entry], size: Callable[[Entry], int], most: int
) -> Iterator[list[Entry]]:
    """Entries in order, cut into runs of at most `most` bytes; one that is larger stands alone."""
    run: list[Entry] = []
    held = 0
    for entry in entries:
        if run and held + size(entry) > most:
            yield run
            run, held = [], 0
        run.append(entry)
        held += size(entry)
    yield run


def _token_ids(tokenizer_from: str | Path | None) -> dict[str, Any]:
    """Where text begins and ends, for transformers: without it, it assumes ids 1 and 2."""
    if tokenizer_from is None:
        return {"bos_token_id": None, "eos_token_id": None}
    tokenizer = tokenizers.load(Path(tokenizer_from))
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _move(beside: Path, folder: Path) -> None:
    """Put the complete folder in its place; a model that is there steps aside until it is done."""
    if not folder.exists():
        beside.rename(folder)
        return
    aside = beside.with_suffix(".old")
    folder.rename(aside)
    beside.rename(folder)
    shutil.rmtree(aside)
