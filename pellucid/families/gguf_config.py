"""The config in the keys of a GGUF file, both ways, by the table beside the family's row.

In: each key becomes its key of ``config.json``, which the family's parts read as strictly as there.
Out: what the parts write goes back through the same table, is read again and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pellucid.families.config import DROPOUTS, family_of, read_config, write_config
from pellucid.families.gguf_rope import divisors, recovered
from pellucid.families.gguf_row import Gguf
from pellucid.families.layers import FULL, WINDOW, one_in
from pellucid.families.names import Entry, Shape, entries
from pellucid.families.rows import FAMILIES
from pellucid.gguf_file import shortest
from pellucid.models import ModelConfig, RopeConfig

_WITH_GGUF = {f.model_type: f.gguf for f in FAMILIES.values() if f.gguf is not None}
ARCHITECTURES = frozenset(gguf.architecture for gguf in _WITH_GGUF.values())
ROPE_DIVISORS = "rope_freqs.weight"
LONG_FACTORS = {
    "long_factor": "rope_factors_long.weight",
    "short_factor": "rope_factors_short.weight",
}
# Key after rope.scaling. -> key of config.json's table
_SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
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
Numbers = Callable[[str], Sequence[float]]


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
    values |= _rope(gguf, own, values, numbers, shapes, where)
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
    for tensor, flag in gguf.biases.items():
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
    windowed = _flags(own, key, layers, where)
    if not values.get("sliding_window"):
        return {}
    return {"layer_types": [WINDOW if each else FULL for each in windowed]}


def _flags(own: dict[str, Any], key: str, layers: int, where: str) -> list[bool]:
    """A key's flag for each layer, taken; all set where the key is absent."""
    stated = own.pop(key, [True] * layers)
    if not isinstance(stated, list) or len(stated) != layers:
        raise ValueError(f"{where}: {key} is {str(stated)[:60]}; expected a flag for each layer")
    return [bool(each) for each in stated]


def _check_numbers(own: dict[str, Any], gguf: Gguf, where: str) -> None:
    """ValueError for what should be a number and is none; a list of one number for all layers
    becomes that number."""
    for key in own.keys() & {*gguf.keys, *_NUMBERS, *(f"rope.scaling.{key}" for key in _SCALING)}:
        value = own[key]
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            own[key] = value = value[0]
        if not isinstance(value, int | float):
            raise ValueError(f"{where}{key} is {str(value)[:60]!r}; expected a number")


def _rope(
    gguf: Gguf,
    own: dict[str, Any],
    values: dict[str, Any],
    numbers: Numbers,
    shapes: Mapping[str, Shape],
    where: str,
) -> dict[str, Any]:
    """config.json's keys of RoPE."""
    if "rope.freq_base" not in gguf.keys:
        return {}
    found: dict[str, Any] = {"rope_theta": float(values.get("rope_theta", 10000.0))}
    each = values.get("head_dim")
    turned = own.pop("rope.dimension_count", each)
    if gguf.share and each:
        found[gguf.share] = turned / each
    elif turned != each:
        raise ValueError(
            f"{where}: rope.dimension_count is {turned} and a head is {each} wide; Pellucid turns "
            f"all of it in {gguf.architecture} models"
        )
    kind = own.get("rope.scaling.type", "none")
    if "rope.scaling.type" not in gguf.fixed:
        own.pop("rope.scaling.type", None)
    scaling = {
        theirs: own.pop(f"rope.scaling.{key}")
        for key, theirs in _SCALING.items()
        if f"rope.scaling.{key}" in own
    }
    if kind == "yarn":
        scaling |= _yarn(own, scaling)
    if gguf.growth:
        scaling["llama_4_scaling_beta"] = own.pop("attention.temperature_scale", 0.0)
        context = scaling.get("original_max_position_embeddings")
        if own.pop("attention.temperature_length", context) != context:
            raise ValueError(
                f"{where}: attention.temperature_length is not the original context length"
            )
    if gguf.longrope and LONG_FACTORS["long_factor"] in shapes:
        factors = {name: [*map(shortest, numbers(t))] for name, t in LONG_FACTORS.items()}
        if _usual_for_longrope(values) == scaling.setdefault("attention_factor", 1.0):
            del scaling["attention_factor"]
        return found | {"rope_scaling": {"type": "longrope", **scaling, **factors}}
    if ROPE_DIVISORS in shapes:
        if shapes[ROPE_DIVISORS] != (turned // 2,):
            raise ValueError(
                f"{where}: {ROPE_DIVISORS} is {shapes[ROPE_DIVISORS]}, expected {(turned // 2,)}"
            )
        original = scaling.get("original_max_position_embeddings")
        context = values["max_position_embeddings"]
        try:
            divided = recovered(numbers(ROPE_DIVISORS), found["rope_theta"], original, context)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return found | {"rope_scaling": divided}
    if kind != "none" or gguf.growth:
        found["rope_scaling"] = {"rope_type": "default" if kind == "none" else kind, **scaling}
    if gguf.some_turned:
        turned = _flags(own, "attention.rope_pattern", values["num_hidden_layers"], where)
        found["layer_rope_theta"] = [found["rope_theta"] if each else 0.0 for each in turned]
    if gguf.plain_in_windows:
        theta = {"rope_theta": found["rope_theta"]}
        if own.pop("rope.freq_base_swa", found["rope_theta"]) != found["rope_theta"]:
            own["rope.freq_base_swa"] = "another than rope.freq_base"
        full = {**found.pop("rope_scaling", {}), **theta}
        found["rope_parameters"] = {"full_attention": full, "sliding_attention": theta}
    return found


def _usual_for_longrope(values: Mapping[str, Any]) -> float | None:
    """longrope's factor on cos and sin where config.json states none, as float32."""
    context = values["max_position_embeddings"]
    original = values.get("original_max_position_embeddings")
    if not isinstance(context, int) or not isinstance(original, int) or original < 2:
        return None
    once, factor = (1.0,), max(context / original, 1.0)
    rope = RopeConfig(
        type="longrope",
        factor=factor,
        original_context=original,
        short_factor=once,
        long_factor=once,
    )
    return shortest(rope.magnitude)


def _yarn(own: dict[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """What is special to yarn: llama.cpp's factor on cos and sin counts on top of the usual one.

    ``yarn_attn_factor`` is written by its converter and overridden where it is read
    (src/llama-context.cpp).
    """
    own.pop("rope.scaling.yarn_attn_factor", None)
    found: dict[str, Any] = {}
    if weight := own.pop("rope.scaling.yarn_log_multiplier", 0.0):
        found |= {"mscale": 1.0, "mscale_all_dim": weight}
    factor = scaling.get("factor")
    if "attention_factor" in scaling and isinstance(factor, int | float) and factor >= 1:
        usual = RopeConfig(type="yarn", factor=factor, original_context=1, **found).magnitude
        found["attention_factor"] = _times(scaling["attention_factor"], usual)
    return found


def _times(stored: float, usual: float) -> float:
    """The shortest decimal that, divided by `usual`, is `stored` in float32."""
    tried = (float(f"{stored * usual:.{digits}g}") for digits in range(1, 10))
    return next((each for each in tried if shortest(each / usual) == stored), stored * usual)


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
        keys |= {f"{start}rope.scaling.{key}": value for key, value in _scaling(config).items()}
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


def _scaling(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    assert rope is not None, "a model with RoPE"
    if rope.type == "default":
        return {}
    if rope.type == "dynamic":
        raise ValueError(f"RoPE scaling {rope.type!r} is not written to GGUF files")
    found: dict[str, Any] = {}
    if rope.type in ("linear", "yarn"):
        found |= {"type": rope.type, "factor": float(rope.factor)}
    if rope.type == "yarn":
        found |= {"yarn_beta_fast": rope.beta_fast, "yarn_beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            usual = replace(rope, attention_factor=None).magnitude
            found["attn_factor"] = rope.attention_factor / usual
        if rope.mscale:
            found["yarn_log_multiplier"] = rope.mscale_all_dim or 0.0
    if rope.type == "longrope" and rope.short_factor != rope.long_factor:
        found |= {"type": "longrope", "attn_factor": rope.magnitude}
    if rope.original_context and not gguf_of(config).longrope:
        found["original_context_length"] = rope.original_context
    return found


def rope_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The small tensors that say how RoPE is scaled, float32."""
    rope = config.rope
    if rope is None or rope.type not in ("llama3", "longrope"):
        return {}
    if rope.type == "longrope" and gguf_of(config).longrope:
        return {name: torch.tensor(getattr(rope, key)) for key, name in LONG_FACTORS.items()}
    return {ROPE_DIVISORS: divisors(rope, config.head_dim)}


def _check(config: ModelConfig, keys: Mapping[str, Any]) -> None:
    """ValueError where reading the keys again gives another config."""
    if gguf_of(config).head == "tied" and not config.tied:
        raise ValueError(
            f"GGUF files of {keys['general.architecture']} models have no head beside the "
            "embedding, and this model has one"
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
