"""``adapter_config.json``: what PEFT notes about an adapter, and what of it can be read here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pellucid.files import read_json

CONFIG = "adapter_config.json"

# Keys of adapter_config.json that are read, and those that say how the adapter came about. Any
# other one changes what the adapter computes as soon as it says anything.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"}
_READ |= {"use_rslora", "init_lora_weights"}
_HARMLESS = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
_HARMLESS |= {"auto_mapping", "target_modules", "exclude_modules", "layers_to_transform"}
_HARMLESS |= {"layers_pattern", "fan_in_fan_out", "megatron_core", "qalora_group_size"}
_HARMLESS |= {"eva_config", "runtime_config", "ensure_weight_tying"}
# Of a pattern: what repeats, chooses or groups; a character class or an escaped sign is none of it.
_SIGN = re.compile(r"\\.|\[\^?\]?[^\]]*\]|\(\?:?|\)[*+?{]|[{*+?|()]")
_PATH, _MOST_WAYS, _LONGEST = 64, 64**3, 2000
# These begin from changed base weights, which the checkpoint at hand does not have.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


def written_config(
    names: Mapping[str, Sequence[str]],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    dropout: float,
    base: str | None,
) -> dict[str, Any]:
    """The config of an adapter as PEFT reads it.

    names   every module of the model that could be adapted, by transformers' path
    ranks   adapted module -> rank; alphas likewise: the product is scaled by alpha / rank
    """
    targets = {module: _target(module, ranks, names) for module in ranks}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(_whole(value) for value in alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": _pattern(ranks, rank, targets),
        "alpha_pattern": _pattern({m: _whole(a) for m, a in alphas.items()}, alpha, targets),
        "target_modules": sorted(set(targets.values())),
        "fan_in_fan_out": any(len(paths) > 1 for paths in names.values()),  # GPT-2's Conv1D
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _target(module: str, adapted: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> str:
    """The shortest end of a module's path that says which layers are adapted, and no others."""
    parts = module.split(".")
    for length in (1, 2):
        end = ".".join(parts[-length:])
        if all(name in adapted for name in names if name.endswith(f".{end}")):
            return end
    return module


def _pattern(
    values: Mapping[str, Any], default: float, targets: Mapping[str, str]
) -> dict[str, Any]:
    """Where a value is not the default; one line per target whose modules all agree."""
    groups: dict[str, dict[str, Any]] = {}
    for module, target in targets.items():
        groups.setdefault(target, {})[module] = values[module]
    pattern: dict[str, Any] = {}
    for target, inside in groups.items():
        same = len(set(inside.values())) == 1
        pattern |= {target: next(iter(inside.values()))} if same else inside
    return {key: value for key, value in pattern.items() if value != default}


def read_config(folder: Path) -> dict[str, Any]:
    """The config in a folder. OSError where there is none, ValueError for more than plain LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no adapter: expected {CONFIG} beside the weights")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: an adapter of type {config.get('peft_type')}; expected LORA")
    empty = (None, False, "none")
    others = {
        key: value
        for key, value in config.items()
        if key not in _READ | _HARMLESS and value not in empty and value not in ({}, [])
    }
    if config.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        others["init_lora_weights"] = config["init_lora_weights"]
    if others:
        stated = ", ".join(f"{key} = {str(value)[:60]}" for key, value in others.items())
        raise ValueError(f"{path}: {stated} is more than plain LoRA, which Pellucid computes")
    config = {"r": 8, "lora_alpha": 8, **config, "lora_dropout": config.get("lora_dropout") or 0.0}
    for key in ("r", "lora_alpha", "lora_dropout"):
        _check_number(config[key], f"{path}: {key}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, Mapping):
            raise ValueError(f"{path}: {key}: expected a number for each pattern, not {pattern!r}")
        for module, value in pattern.items():
            _check_number(value, f"{path}: {key}: {module}")
    if not isinstance(config.get("use_rslora") or False, bool):
        raise ValueError(f"{path}: use_rslora: expected true or false")
    return config


def _check_number(value: Any, where: str) -> None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 <= value < 1e9:  # also for NaN
        raise ValueError(f"{where}: expected a number from 0 to 1e9, found {str(value)[:60]}")


def scale(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """Factor on B A: alpha / r, or alpha / √r with rank-stabilised LoRA (Kalajdzievski 2023).

    ValueError, beginning with `where`, if the config states another rank than the tensors have.
    """
    stated = _matching(config.get("rank_pattern"), module, config["r"])
    if stated != rank:
        raise ValueError(f"{where}: {module} has rank {rank}, {CONFIG} says {stated}")
    alpha = _matching(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's path, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if _searched(key).match(module):
            return value
    return default


@cache
def _searched(key: str) -> re.Pattern[str]:
    """A pattern of module paths, which an adapter states, as PEFT searches with it.

    A search tries every way to repeat and to choose, and a few characters can make that years. So
    ValueError for one that could take more than `_MOST_WAYS`: each repetition counts as the length
    of a path, each choice as its alternatives, and what repeats a group is refused.
    """
    ways, open_groups = 1, []
    for sign in _SIGN.findall(key):
        if sign in ("(", "(?:"):
            open_groups.append(1)
        elif sign == ")" and open_groups:
            ways *= open_groups.pop()
        elif sign == "|" and open_groups:
            open_groups[-1] += 1
        elif sign in ("*", "+", "?"):
            ways *= _PATH
        elif sign[0] in "({)":
            ways = _MOST_WAYS + 1
    try:
        if ways > _MOST_WAYS or len(key) > _LONGEST:
            raise ValueError("expected a module's name, or a pattern that is quickly searched")
        return re.compile(rf"(.*\.)?({key})$")
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{CONFIG}: pattern {key[:60]!r}: {error}") from None
