"""RoPE in the keys of a GGUF file, both ways: base, scaling, and in which layers each counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pellucid.families.gguf_rope import divisors, recovered
from pellucid.families.gguf_row import Gguf
from pellucid.families.names import Shape
from pellucid.gguf_file import shortest
from pellucid.models import ModelConfig, RopeConfig

ROPE_DIVISORS = "rope_freqs.weight"
LONG_FACTORS = {
    "long_factor": "rope_factors_long.weight",
    "short_factor": "rope_factors_short.weight",
}
# Key after rope.scaling. -> key of config.json's table
SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
Numbers = Callable[[str], Sequence[float]]


def read_rope(
    gguf: Gguf,
    own: dict[str, Any],
    values: dict[str, Any],
    numbers: Numbers,
    shapes: Mapping[str, Shape],
    where: str,
) -> dict[str, Any]:
    """config.json's keys of RoPE; what was used is taken out of `own`."""
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
    kind, scaling = _stated(gguf, own, where)
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
    return found | _of_layers(gguf, own, values, found, where)


def _of_layers(
    gguf: Gguf, own: dict[str, Any], values: Mapping[str, Any], found: dict[str, Any], where: str
) -> dict[str, Any]:
    """The keys of RoPE that differ from layer to layer."""
    theta = found["rope_theta"]
    if gguf.some_turned:
        turned = flags(own, "attention.rope_pattern", values["num_hidden_layers"], where)
        return {"layer_rope_theta": [theta if each else 0.0 for each in turned]}
    if gguf.plain_in_windows:
        if own.pop("rope.freq_base_swa", theta) != theta:
            own["rope.freq_base_swa"] = "another than rope.freq_base"
        plain = {"rope_theta": theta}
        full = {**found.pop("rope_scaling", {}), **plain}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": plain}}
    return {}


def _stated(gguf: Gguf, own: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """RoPE's type and the numbers of its table."""
    kind = own.get("rope.scaling.type", "none")
    if "rope.scaling.type" not in gguf.fixed:
        own.pop("rope.scaling.type", None)
    scaling = {
        theirs: own.pop(f"rope.scaling.{key}")
        for key, theirs in SCALING.items()
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
    return kind, scaling


def flags(own: dict[str, Any], key: str, layers: int, where: str) -> list[bool]:
    """A key's flag for each layer, taken; all set where the key is absent."""
    stated = own.pop(key, [True] * layers)
    if not isinstance(stated, list) or len(stated) != layers:
        raise ValueError(f"{where}: {key} is {str(stated)[:60]}; expected a flag for each layer")
    return [bool(each) for each in stated]


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


def scaling_keys(config: ModelConfig, gguf: Gguf) -> dict[str, Any]:
    """The keys after ``rope.scaling.``; ValueError for a type that llama.cpp does not have."""
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
    if rope.original_context and not gguf.longrope:
        found["original_context_length"] = rope.original_context
    return found


def scaling_tensors(config: ModelConfig, gguf: Gguf) -> dict[str, Tensor]:
    """The small tensors that say how RoPE is scaled, float32."""
    rope = config.rope
    if rope is None or rope.type not in ("llama3", "longrope"):
        return {}
    if rope.type == "longrope" and gguf.longrope:
        return {name: torch.tensor(getattr(rope, key)) for key, name in LONG_FACTORS.items()}
    return {ROPE_DIVISORS: divisors(rope, config.head_dim)}
