"""Hugging Face's layout: a folder of safetensors as `Weights`, by the family's name table."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.checkpoints.files import (
    SafetensorsFile,
    SafetensorsFolder,
    same_bits,
)
from pellucid.checkpoints.weights import (
    Recipe,
    Redundant,
    Weights,
    accounted,
    expected_shapes,
)
from pellucid.checkpoints.wrappers import without_wrappers
from pellucid.families import (
    WITH_TEXT_PART,
    Entry,
    as_ours,
    family_of,
    known_buffers,
    left_out_prefix,
    read_config,
    stored_shape,
    table,
)
from pellucid.families.parts import Bias
from pellucid.files import read_json
from pellucid.models import Config

# Tensors for pictures, and what joins them to the text part: listed as left out, never read
PICTURES = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"
# What makes a tokenizer, whichever kind it is, and what says how to talk to the model.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "chat_template.jinja",
    "generation_config.json",
)


def open_folder(folder: Path) -> tuple[Config, Weights]:
    """Config and weights of a folder in Hugging Face's layout, every key and tensor accounted for.

    ValueError or OSError, in one line, where something is missing, cut short or does not fit.
    """
    stated = read_json(folder / "config.json")
    config = read_config(stated, str(folder / "config.json"))
    stored = _safetensors(folder)
    wrapped = stated.get("model_type") in WITH_TEXT_PART
    if wrapped and not config.tied and stated.get("tie_word_embeddings") is not False:
        # the whole model ties them, whatever its text part says, unless its files have a head
        config = replace(config, tied=not any(name.endswith(HEAD) for name in stored.entries))
    config = _with_stored_biases(config, stored.entries)
    shapes = expected_shapes(config, [stored], str(folder / "config.json"))
    source = without_wrappers(stored, lambda names: _spelt_names(config, names))
    spelt = left_out_prefix(config, source.entries)
    recipes: dict[str, Recipe] = {}
    redundant = _redundant(config, spelt)
    if wrapped:
        redundant |= {name: Redundant() for name in source.entries if PICTURES.match(name)}
    for entry in table(config):
        stored = spelt(entry.stored)
        if entry.parameters == ("embed.weight",) and config.tied and stored not in source.entries:
            head = spelt(HEAD)  # of a tied pair either name may be the one that was kept
            stored = (
                stored if redundant.pop(head, None) is None or head not in source.entries else head
            )
        if entry.zeros is not None:
            redundant[stored] = Redundant(
                shape=entry.zeros,
                agrees=lambda bias, weights: not bias.any(),
                otherwise='is not zero, although config.json says "qkv_bias": false',
            )
        begin = 0
        if entry.head:  # one more of those that are the parameter together
            before = recipes[entry.parameters[0]]
            more = (*before.more, stored)
            recipes[entry.parameters[0]] = replace(before, more=more, make=torch.cat, dim=0)
            continue
        for name in entry.parameters:
            recipes[name] = Recipe(
                stored=stored,
                shape=shapes[name],
                shapes=(stored_shape(entry, shapes),),
                make=_Part(begin, shapes[name][0], entry),
            )
            begin += shapes[name][0]
    assert recipes.keys() == shapes.keys(), "the name table and the model disagree"
    ordered = {name: recipes[name] for name in shapes}
    try:
        return config, accounted([source], ordered, redundant, str(folder), "config.json")
    except ValueError as error:
        cure = _cure(stated, config, source.entries)
        raise ValueError(f"{error}{cure}") from None


def _with_stored_biases(config: Config, stored: Collection[str]) -> Config:
    """The config without the bias of attention's output where files have q's and none of these.

    A Llama's config has one flag for both; a Qwen 2 written as a Llama has the first alone.
    """
    if not {"qkv", "o"} <= set(config.biases):
        return config
    without = replace(config, biases=tuple(part for part in config.biases if part != "o"))
    spelt = _spelt_names(config, stored) - _spelt_names(without, stored)
    outputs = tuple(".".join(name.split(".")[-2:]) for name in spelt)
    if any(name.endswith(outputs) for name in stored):
        return config
    return without if any(name.endswith("q_proj.bias") for name in stored) else config


def _spelt_names(config: Config, stored: Collection[str]) -> set[str]:
    """Every name that the files of a model may have, as files with the names `stored` spell it."""
    spelt = left_out_prefix(config, stored)
    return {spelt(entry.stored) for entry in table(config)} | {*_redundant(config, spelt)}


def _cure(stated: Mapping[str, Any], config: Config, stored: Collection[str]) -> str:
    """The key of config.json with whose other value the names in the files would fit better."""

    def misfits(config: Config) -> int:
        spelt = left_out_prefix(config, stored)
        wanted = {spelt(entry.stored) for entry in table(config)}
        return len(wanted - {*stored}) + len({*stored} - wanted - {*_redundant(config, spelt)})

    family = family_of(config.family, "config")
    keys = [part.key for part in family.parts if isinstance(part, Bias) and part.key]
    fewest, best = misfits(config), ""
    for key in ("tie_word_embeddings", *keys):
        for value in (True, False):
            with contextlib.suppress(ValueError):
                count = misfits(read_config({**stated, key: value}, ""))
                if count < fewest:
                    fewest, best = count, f'; with "{key}": {json.dumps(value)} fewer would not fit'
    return best if fewest else best.replace("fewer would not", "in config.json they would")


@dataclass(frozen=True)
class _Part:
    """Rows `begin` … `begin + rows` of a stored tensor, turned upright and in our order.

    A view, unless the rows have another order in the file.
    """

    begin: int
    rows: int
    entry: Entry

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        upright = as_ours(self.entry, parts[0])
        whole = len(self.entry.parameters) == 1
        return upright if whole else upright[self.begin : self.begin + self.rows]


def _redundant(config: Config, spelt: Callable[[str], str]) -> dict[str, Redundant]:
    """What files hold beside the parameters: buffers, and a tied head written out."""
    found = {spelt(name): Redundant(shape=shape) for name, shape in known_buffers(config)}
    if config.tied:
        found[spelt(HEAD)] = Redundant(
            shape=(config.vocab_size, config.width),
            agrees=lambda head, weights: same_bits(head, weights["embed.weight"]),
            otherwise="differs from the embedding, although config.json says they are one "
            '("tie_word_embeddings": true)',
        )
    return found


def _safetensors(folder: Path) -> SafetensorsFile | SafetensorsFolder:
    """The folder's tensors: ``model.safetensors``, or the files of an index."""
    single = folder / "model.safetensors"
    if single.is_file():
        return SafetensorsFile(single)
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        instead = f"; {', '.join(others[:3])} is not read: save as safetensors" if others else ""
        raise FileNotFoundError(
            f"{folder}: no weights: expected model.safetensors or {INDEX}{instead}"
        )
    return _from_index(folder)


def _from_index(folder: Path) -> SafetensorsFolder:
    index = folder / INDEX
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in listed.values()
    ):
        raise ValueError(f"{index}: expected a weight_map from tensor names to file names")
    names = sorted(set(listed.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder}: {len(absent)} of {len(names)} weight files missing: {', '.join(absent)}"
        )
    files = {name: SafetensorsFile(folder / name) for name in names}
    lost = [tensor for tensor, name in listed.items() if tensor not in files[name].entries]
    if lost:
        raise ValueError(
            f"{index}: {len(lost)} of {len(listed)} tensors are not in the file it names: "
            + ", ".join(f"{tensor} in {listed[tensor]}" for tensor in lost[:6])
        )
    unlisted = [
        f"{tensor} in {name}"
        for name, file in files.items()
        for tensor in file.entries
        if tensor not in listed  # what it lists for another file, it overrides
    ]
    if unlisted:
        raise ValueError(
            f"{index}: {len(unlisted)} tensors are in the files but not in the index: "
            + ", ".join(unlisted[:6])
        )
    return SafetensorsFolder({tensor: files[name] for tensor, name in listed.items()})
