"""Save a model in Hugging Face's layout: whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import tokenizers
from pellucid.checkpoints.files import Shape, Stored
from pellucid.checkpoints.formats.hf import INDEX, TOKENIZER_FILES
from pellucid.checkpoints.weights import Weights, parameter_shapes
from pellucid.checkpoints.writers import SafetensorsWriter, size
from pellucid.families import Entry, joined, stored_shape, table, write_config
from pellucid.files import folder_beside, move, refuse_current
from pellucid.models import Config
from pellucid.tokenizers.gguf import files_of as gguf_files

MAX_SHARD_BYTES = 5_000_000_000
_OURS = ("config.json", "*.safetensors", INDEX, *TOKENIZER_FILES)


def save(
    folder: str | Path,
    config: Config,
    weights: Mapping[str, Tensor],
    tokenizer_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a model as a folder that `open_checkpoint` and transformers' ``from_pretrained`` read.

    weights          parameter name -> tensor: a ``state_dict``, or a checkpoint's lazy weights,
                     of which one tensor is held at a time
    tokenizer_from   folder whose tokenizer files are copied along; the ids that begin and end text
                     go into the config
    dtype            None: as each tensor is
    max_shard_bytes  more than this is split over several files with an index
    overwrite        replace a model that is there; a folder that holds anything else is refused

    The folder is written beside its place and moved there when it is complete. Raises ValueError
    where the weights do not fit the config, OSError where the folder may not be written.
    """
    check_weights(config, weights)
    dtypes = {name: dtype or _dtype(weights, name) for name in weights}
    with model_folder(
        folder, config, dtypes["embed.weight"], tokenizer_from, overwrite=overwrite
    ) as beside:
        write_weights(
            beside,
            hf_files(config, dtypes, max_shard_bytes),
            lambda name: weights[name].detach().to("cpu", dtype),
        )


@contextmanager
def model_folder(
    folder: str | Path,
    config: Config,
    dtype: torch.dtype,
    tokenizer_from: str | Path | None,
    *,
    overwrite: bool,
    stated: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """A place to write weights into; with config.json and tokenizer it then becomes `folder`.

    dtype   of the model, for config.json
    stated  what config.json says besides

    OSError where `folder` may not be written.
    """
    folder = Path(folder)
    refuse_current(folder)
    if folder.exists():
        _check_replaceable(folder, overwrite)
    tokenizer = None if tokenizer_from is None else tokenizers.load(Path(tokenizer_from))
    text = json.dumps({**config_json(config, dtype, tokenizer), **(stated or {})}, indent=2)
    with folder_beside(folder) as beside:
        yield beside
        if tokenizer_from is not None:
            copy_tokenizer(Path(tokenizer_from), beside)
        (beside / "config.json").write_text(text + "\n", encoding="utf-8")
        move(beside, folder)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    """OSError where `folder` is something else than a model, or one that is to stay."""
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


def check_weights(config: Config, weights: Mapping[str, Tensor]) -> None:
    """ValueError where `weights` are not exactly the parameters of a model with `config`."""
    shapes = parameter_shapes(config)
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


@dataclass(frozen=True, kw_only=True)
class HFFile:
    """One weight file: its name, and what it holds of the name table."""

    name: str
    entries: tuple[Entry, ...]
    stored: dict[str, Stored]


def hf_files(
    config: Config,
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    shards: int | None = None,
) -> list[HFFile]:
    """The weight files of a model, tensors in the order of the forward pass.

    dtypes  parameter name -> the dtype it is written in
    shards  number of files, about equally large; None: as few as `max_shard_bytes` allows, where a
            larger tensor has a file of its own
    """
    shapes = parameter_shapes(config)
    stored = {
        entry.stored: Stored(
            stored_shape(entry, shapes),
            dtypes[entry.parameters[0] if entry.parameters else "embed.weight"],
        )
        for entry in table(config)
    }
    sizes = [(entry, size(stored[entry.stored])) for entry in table(config)]
    if shards is None:
        runs = list(_at_most(sizes, max_shard_bytes))
    else:
        runs = list(_evenly(sizes, shards))
    return [
        HFFile(
            name="model.safetensors"
            if len(runs) == 1
            else f"model-{number:05}-of-{len(runs):05}.safetensors",
            entries=tuple(run),
            stored={entry.stored: stored[entry.stored] for entry in run},
        )
        for number, run in enumerate(runs, start=1)
    ]


def write_weights(folder: Path, files: Iterable[HFFile], read: Callable[[str], Tensor]) -> None:
    """Write the files, one tensor at a time, and the index that says what lies where.

    read  parameter name -> tensor, in the dtype that `hf_files` was told
    """
    weight_map, total = {}, 0
    for file in files:
        with SafetensorsWriter(folder / file.name, file.stored) as out:
            for entry in file.entries:
                out.write(entry.stored, _tensor(entry, file.stored[entry.stored], read))
        weight_map |= dict.fromkeys(file.stored, file.name)
        total += sum(map(size, file.stored.values()))
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensor(entry: Entry, stored: Stored, read: Callable[[str], Tensor]) -> Tensor:
    if entry.zeros is not None:
        return torch.zeros(stored.shape, dtype=stored.dtype)
    return joined(entry, [read(name) for name in entry.parameters])


def _at_most(sizes: Iterable[tuple[Entry, int]], most: int) -> Iterator[list[Entry]]:
    """Entries in order, cut into runs of at most `most` bytes; one that is larger stands alone."""
    run: list[Entry] = []
    held = 0
    for entry, bytes_ in sizes:
        if run and held + bytes_ > most:
            yield run
            run, held = [], 0
        run.append(entry)
        held += bytes_
    yield run


def _evenly(sizes: list[tuple[Entry, int]], shards: int) -> Iterator[list[Entry]]:
    """Entries in order, cut into `shards` runs of about the same size; none is empty."""
    if not 1 <= shards <= len(sizes):
        raise ValueError(f"{shards} files: expected 1 to {len(sizes)}, the number of tensors")
    left, place = sum(bytes_ for _, bytes_ in sizes), 0
    for remaining in range(shards, 0, -1):
        run, held = [], 0
        while place <= len(sizes) - remaining and (
            not run or remaining == 1 or held + sizes[place][1] / 2 <= left / remaining
        ):
            run.append(sizes[place][0])
            held += sizes[place][1]
            place += 1
        left -= held
        yield run


def config_json(
    config: Config, dtype: torch.dtype, tokenizer: tokenizers.Tokenizer | None
) -> dict[str, Any]:
    """``config.json``, with the ids that begin and end text.

    They are stated where there are none, too: without them transformers assumes ids 1 and 2.
    """
    return write_config(config, dtype) | {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": tokenizer.eos_id if tokenizer else None,
    }


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's files, whichever there are, or write those a GGUF file has in its keys;
    their names."""
    if source.is_file():
        for name, content in gguf_files(source).items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                text = json.dumps(content, indent=2, ensure_ascii=False)
                (folder / name).write_text(text + "\n", encoding="utf-8")
        return [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    there = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in there:
        shutil.copyfile(source / name, folder / name)
    return there
