"""The config in the keys of a GGUF file, both ways, by the table beside the family's row.

In: each key becomes its key of ``config.json``, which the family's parts read as strictly as there.
Out: what the parts write goes back through the same table, is read again and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pellucid.families.config import DROPOUTS, family_of, read_config, write_config
from pellucid.families.gguf_row import Gguf
from pellucid.families.gguf_scaling import (
    SCALING,
    Numbers,
    flags,
    read_rope,
    scaling_keys,
    scaling_tensors,
)
from pellucid.families.layers import FULL, WINDOW, one_in
from pellucid.families.names import Entry, Shape, entries
from pellucid.families.rows import FAMILIES
from pellucid.gguf_file import shortest
from pellucid.models import ModelConfig

_WITH_GGUF = {f.model_type: f.gguf for f in FAMILIES.values() if f.gguf is not None}
ARCHITECTURES = frozenset(gguf.architecture for gguf in _WITH_GGUF.values())
_NUMBERS = (
    "attention.head_count_kv", "attention.value_length", "attention.temperature_scale",
    "rope.dimension_count", "rope.freq_base_swa", "rope.scaling.yarn_log_multiplier",
)  # fmt: skip
_NEEDED = ("context_length", "embedding_length", "block_count", "attention.head_count")
# Keys that change nothing: the tensors say it, or how the file came to be
_IGNORED = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"})
_ONLY = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scale_linear": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}


def gguf_of(config: ModelConfig) -> Gguf:
    """The table of a config's family; ValueError for a family that llama.cpp's files do not have
    or not as Pellucid reads them."""
    found = family_of(config.family, "config").gguf
    if found is None:
        raise ValueError(
            f"{config.family} models are not written to GGUF files; Pellucid writes "
            f"{', '.join(sorted(_WITH_GGUF))}"
        )
    return found


def gguf_table(config: ModelConfig) -> Iterator[Entry]:
    """Every stored tensor of a model's GGUF file that holds parameters, in order."""
    gguf = gguf_of(config)
    return entries(config, gguf.names, gguf.pairs)


def read_gguf_config(
    keys: Mapping[str, Any], shapes: Mapping[str, Shape], numbers: Numbers, tied: bool, where: str
) -> ModelConfig:
    """The config of a file with these keys and tensors.

    numbers  name of a small tensor -> its values
    tied     whether the head is the embedding

    ValueError, beginning with `where`, for an architecture that Pellucid does not have and for keys
    that are missing, unknown or do not fit.
    """
    architecture = keys.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"{where}: general.architecture is {architecture!r}; Pellucid reads GGUF files of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    start = f"{architecture}."
    own = {key.removeprefix(start): value for key, value in keys.items() if key.startswith(start)}
    family, gguf = _family_in(architecture, own)
    _check_numbers(own, gguf, f"{where}: {start}")
    for key in _NEEDED:
        if not isinstance(own.get(key), int):
            stated = "missing" if key not in own else repr(own[key])[:60]
            raise ValueError(f"{where}: {start}{key} is {stated}; expected a whole number")
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{where}: the tensor token_embd.weight is missing")
    if (blocks := own["block_count"]) > len(shapes):
        raise ValueError(f"{where}: {start}block_count is {blocks}, of {len(shapes)} tensors")
    values = _stated(family, gguf, own, shapes, tied)
    values |= _layer_types(gguf, own, values, where)
    values |= read_rope(gguf, own, values, numbers, shapes, where)
    for key, only in {**_ONLY, **gguf.fixed}.items():
        if own.pop(key, only) != only:
            raise ValueError(f"{where}: {start}{key} is set; Pellucid computes {only!r} only")
    unknown = sorted(own.keys() - _IGNORED)
    if unknown:
        stated = ", ".join(f"{start}{key} = {str(own[key])[:60]}" for key in unknown)
        raise ValueError(
            f"{where}: unknown {'keys' if len(unknown) > 1 else 'key'} {stated}; it may change "
            "what the model computes, so it is not passed over in silence"
        )
    return read_config(values, where)


def _family_in(architecture: str, own: Mapping[str, Any]) -> tuple[str, Gguf]:
    """The ``model_type`` and the table of a file with these keys: several share an architecture."""
    found = [
        (model_type, gguf)
        for model_type, gguf in _WITH_GGUF.items()
        if gguf.architecture == architecture and not gguf.comes_back
    ]
    return next(
        (each for each in found if each[1].chosen_by and own.get(each[1].chosen_by)),
        next(each for each in found if not each[1].chosen_by),
    )


def _stated(
    model_type: str, gguf: Gguf, own: dict[str, Any], shapes: Mapping[str, Shape], tied: bool
) -> dict[str, Any]:
    """config.json's keys, RoPE's left aside; what was used is taken out of `own`."""
    values = {
        "model_type": model_type,
        **gguf.assumed,
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": tied,
    }
    layers, width, heads = (
        own[key] for key in ("block_count", "embedding_length", "attention.head_count")
    )
    for key, theirs in gguf.keys.items():
        if key in own:
            values[theirs] = own.pop(key)
    own.pop("attention.head_count_kv", None)  # of an architecture without: as many as queries
    each = values.get("head_dim")
    if "attention.key_length" in gguf.keys and not each and isinstance(heads, int) and heads > 0:
        each = values["head_dim"] = width // heads
    if own.pop("attention.value_length", each) != each:
        own["attention.value_length"] = "another than attention.key_length"
    for tensor, flag in gguf.flags.items():
        values[flag] = f"blk.0.{tensor}" in shapes
    if gguf.scale_key and each:
        values[gguf.scale_key] = width // heads if layers == gguf.wide_at else each
    if "attention.scale" in gguf.keys and each:
        values.setdefault(gguf.keys["attention.scale"], each**-0.5)
    return values


def _layer_types(
    gguf: Gguf, own: dict[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, list[str]]:
    """Which layers have a window, from a flag for each or every how many one has none."""
    if gguf.period is None:
        return {}
    key, layers = "attention.sliding_window_pattern", values["num_hidden_layers"]
    pattern: Any = own.get(key, gguf.period)
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        own[key] = [pattern == 0 or one_in(pattern)(layer) for layer in range(layers)]
    windowed = flags(own, key, layers, where)
    if not values.get("sliding_window"):
        return {}
    return {"layer_types": [WINDOW if each else FULL for each in windowed]}


def _check_numbers(own: dict[str, Any], gguf: Gguf, where: str) -> None:
    """ValueError for what should be a number and is none; a list of one number for all layers
    becomes that number."""
    for key in own.keys() & {*gguf.keys, *_NUMBERS, *(f"rope.scaling.{key}" for key in SCALING)}:
        value = own[key]
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            own[key] = value = value[0]
        if not isinstance(value, int | float):
            raise ValueError(f"{where}{key} is {str(value)[:60]!r}; expected a number")


def write_gguf_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config, general.architecture first; floats are exact in float32 as decimals.

    ValueError for a config that llama.cpp's files cannot state.
    """
    gguf = gguf_of(config)
    stated = write_config(config, torch.float32)
    start = f"{gguf.architecture}."
    keys: dict[str, Any] = {
        "general.architecture": gguf.architecture,
        f"{start}vocab_size": config.vocab_size,
    }
    for key, theirs in gguf.keys.items():
        value = stated.get(theirs)
        if value is not None and stated.get(theirs) != (theirs == "qkv_bias"):
            keys[start + key] = value
    if config.rope is not None:
        keys[f"{start}attention.value_length"] = config.head_dim
        keys[f"{start}rope.dimension_count"] = config.rotary_width(config.rope)
        keys |= {f"{start}{key}": value for key, value in gguf.fixed.items()}
        keys |= {
            f"{start}rope.scaling.{key}": value for key, value in scaling_keys(config, gguf).items()
        }
    if gguf.some_turned:
        keys[f"{start}attention.rope_pattern"] = [bool(kind.rope) for kind in config.kinds]
    if config.query_growth:
        keys[f"{start}attention.temperature_scale"] = config.query_growth
    if gguf.period is not None and config.window:
        windows = [kind.window for kind in config.kinds]
        if not gguf.period or windows != [*map(one_in(gguf.period), range(config.n_layers))]:
            keys[f"{start}attention.sliding_window_pattern"] = windows
    keys = {key: shortest(v) if isinstance(v, float) else v for key, v in keys.items()}
    _check(config, keys)
    return keys


def rope_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The small tensors that say how RoPE is scaled, float32."""
    return scaling_tensors(config, gguf_of(config))


def _check(config: ModelConfig, keys: Mapping[str, Any]) -> None:
    """ValueError where reading the keys again gives another config."""
    if gguf_of(config).head == "tied" and not config.tied:
        raise ValueError(
            f"GGUF files of {keys['general.architecture']} models have no head beside the "
            "embedding, and this model has one"
        )
    normed, size = bool(config.qk_norm), gguf_of(config).normed_from
    if size and normed != (config.n_layers >= size):
        said = "with" if normed else "without"
        raise ValueError(
            f"llama.cpp reads norms of queries and keys in {keys['general.architecture']} files of "
            f"{size} layers or more, and only there; this model has {config.n_layers} layers "
            f"{said} them: write another layout"
        )
    extra = rope_tensors(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in extra.items()}
    shapes["token_embd.weight"] = (config.vocab_size, config.width)
    shapes |= {entry.stored: () for entry in gguf_table(config)} | shapes
    again = read_gguf_config(
        keys, shapes, lambda name: extra[name].tolist(), config.tied, f"a {config.family} config"
    )
    if gguf_of(config).comes_back:
        again = replace(again, family=config.family)
    apart = [
        f"{name} {getattr(config, name)!r}"
        for name in (each.name for each in fields(config))
        if getattr(config, name) != getattr(again, name) and name not in DROPOUTS
    ]
    if apart:
        raise ValueError(
            f"GGUF files of {keys['general.architecture']} models cannot state {', '.join(apart)}: "
            "such a model would come back as another"
        )
