"""RoPE in ``config.json``: three spellings in, the one that transformers 4 and 5 both read out.

``rope_theta`` beside ``rope_scaling`` with ``type`` (the oldest) or ``rope_type``, and transformers
5's ``rope_parameters``, which holds theta too, and may hold one table per kind of layer. Names,
defaults and meaning: transformers 5.23, ``modeling_rope_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pellucid.families.keys import ConfigKeys
from pellucid.models import ModelConfig, RopeConfig

# Hugging Face's name -> ours; the other fields of RopeConfig have one name in both
_NAMES = {"rope_theta": "theta", "original_max_position_embeddings": "original_context"}
_READ = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    ),
    "longrope": ("factor", "attention_factor"),
}  # fmt: skip
_ORIGINAL = ("llama3", "yarn", "longrope")  # scale from a context length that the table states
TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The RoPE that all layers share.

    theta     where no key states it
    share     of a head that is turned where no key states it; None: the family turns all of it
    types     that the family's class knows
    aliases   types under another name, from older files
    original  the original context where nothing states it; None: the context itself
    extra     a key of the table that is no field of RopeConfig -> the field of ModelConfig it fills
    absent    the table of a file that has none
    """

    theta: float = 10000.0
    share: float | None = None
    types: tuple[str, ...] = TYPES
    aliases: Mapping[str, str] | None = None
    original: int | None = None
    extra: Mapping[str, str] | None = None
    absent: Mapping[str, Any] = field(default_factory=dict)

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in ``rope``."""
        top = keys.number("rope_theta", self.theta)
        outside = keys.integer("original_max_position_embeddings", self.original)
        scaling, parameters = keys.table("rope_scaling"), keys.table("rope_parameters")
        table = _one_table(keys, scaling, parameters)
        if scaling and parameters and table.get("rope_theta", top) != top:
            raise ValueError(
                f"{keys.where}: rope_theta is {top} beside rope_scaling and "
                f"{table['rope_theta']} in rope_parameters; leave one of them out"
            )
        inside = ConfigKeys(table or self.absent, f"{keys.where}: rope")
        share = None
        if self.share is not None:
            share = keys.number("partial_rotary_factor", self.share)
        for theirs, ours in (self.extra or {}).items():
            found[ours] = inside.number(theirs, 0.0)
        found["rope"] = self._table(inside, top, share, outside, found["context_length"])

    def _table(
        self, inside: ConfigKeys, theta: float, share: float | None, outside: Any, context: int
    ) -> RopeConfig:
        old, new = inside.text("type", "default"), inside.text("rope_type", None)
        kind = (self.aliases or {}).get(new or old, new or old)
        if kind not in self.types:
            where, known = inside.where.removesuffix(": rope"), ", ".join(self.types)
            raise ValueError(f"{where}: unknown rope type {kind!r}; expected one of {known}")
        stated = _numbers(inside)
        found: dict[str, Any] = {"type": kind, "theta": inside.number("rope_theta", theta)}
        if share is None:
            inside.must_be("partial_rotary_factor", 1.0)
        else:
            found["share"] = inside.number("partial_rotary_factor", share)
        stated_inside = inside.integer("original_max_position_embeddings", None)
        # a class that has the key as a field of its own takes that one
        original = (outside if self.original else stated_inside or outside) or context
        truncate = inside.flag("truncate", True)
        factors = {name: inside.numbers(name) for name in ("short_factor", "long_factor")}
        inside.close({"finetuned", *(("max_position_embeddings",) if self.extra else ())})
        if kind == "longrope":
            found |= _long_factors(factors, inside.where)
            stated.setdefault("factor", max(context / original, 1.0))
        if kind == "yarn":
            found["truncate"] = truncate
            stated.setdefault("factor", context / original)
            # transformers takes 0 for absent here
            stated = {name: value for name, value in stated.items() if value or name == "factor"}
        if kind != "default" and "factor" not in stated:
            raise ValueError(f"{inside.where} type {kind!r} needs a factor")
        if kind == "dynamic" or kind in _ORIGINAL:
            found["original_context"] = context if kind == "dynamic" else original
        found |= {name: stated[name] for name in _READ[kind] if name in stated}
        return RopeConfig(**found)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """``rope_theta`` and ``rope_scaling``."""
        rope = config.rope
        assert rope is not None, "a family with RoPE"
        scaling = rope_scaling(rope, config.context_length)
        share = {} if self.share is None else {"partial_rotary_factor": rope.share}
        extra = {theirs: getattr(config, ours) for theirs, ours in (self.extra or {}).items()}
        if extra:
            scaling = {"rope_type": "default", **(scaling or {}), **extra}
        outer = {}
        if self.original:
            outer = {"original_max_position_embeddings": rope.original_context or self.original}
        return {"rope_theta": rope.theta, "rope_scaling": scaling, **share, **outer}


def _one_table(
    keys: ConfigKeys, scaling: dict[str, Any] | None, parameters: dict[str, Any] | None
) -> dict[str, Any]:
    """The table of the old and the new spelling; ValueError where both are there and contradict."""
    if not scaling or not parameters:
        return parameters or scaling or {}
    apart = [
        key
        for key in scaling.keys() & parameters.keys()
        if scaling[key] is not None and scaling[key] != parameters[key]
    ]
    if apart or not _same_type(scaling, parameters):
        raise ValueError(
            f"{keys.where}: rope_scaling and rope_parameters contradict each other "
            f"({', '.join(sorted(apart)) or 'type'}); leave one of them out"
        )
    return {**scaling, **parameters}


def _same_type(scaling: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    kinds = [t.get("rope_type") or t.get("type") or "default" for t in (scaling, parameters)]
    return kinds[0] == kinds[1]


def _numbers(inside: ConfigKeys) -> dict[str, float]:
    """What the table states of the numbers that any type reads.

    A parameter that the type does not use is passed over, as transformers does.
    """
    return {
        name: value
        for name in sorted({name for names in _READ.values() for name in names})
        if (value := inside.number(name, None)) is not None
    }


def _long_factors(
    factors: Mapping[str, tuple[float, ...] | None], where: str
) -> dict[str, tuple[float, ...]]:
    missing = [name for name, values in factors.items() if not values]
    if missing:
        raise ValueError(f"{where} type 'longrope' needs {' and '.join(missing)}")
    return {name: values for name, values in factors.items() if values}


def rope_scaling(rope: RopeConfig, context: int) -> dict[str, Any] | None:
    """``rope_scaling``, the spelling that transformers 4 and 5 both read."""
    if rope.type == "default":
        return None
    if rope.type == "dynamic" and rope.original_context != context:
        raise ValueError(
            f"dynamic RoPE grows from {rope.original_context} tokens, but the context length is "
            f"{context}: Hugging Face's config states one number for both"
        )
    theirs = {ours: theirs for theirs, ours in _NAMES.items()}
    read = _READ[rope.type]
    if rope.type in ("llama3", "yarn"):
        read = (*read, "original_context")
    if rope.type == "yarn":
        read = (*read, "truncate")
    stated = {
        theirs.get(each.name, each.name): getattr(rope, each.name)
        for each in fields(rope)
        if each.name in read and getattr(rope, each.name) is not None
    }
    if rope.type != "longrope":
        return {"rope_type": rope.type, **stated}
    if rope.factor == max(context / (rope.original_context or context), 1.0):
        del stated["factor"]  # transformers 4 wants these three keys and no other
    long = {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    return {"type": "longrope", **long, **stated}


@dataclass(frozen=True, kw_only=True)
class LayerRopes:
    """Two RoPEs: ``rope`` of layers that see everything, ``second_rope`` of those with a window.

    theta       of the first, where no key states it
    local       of the second; None: the file's own rope_theta (OLMo 3)
    local_key   the older key of the second's theta (Gemma 3)

    ``rope_scaling``, the older spelling, scales the first only.
    """

    theta: float
    local: float | None = None
    local_key: str = ""

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in ``rope`` and ``second_rope``."""
        top = keys.number("rope_theta", self.theta)
        local = top if self.local is None else self.local
        if self.local_key:
            local = keys.number(self.local_key, local)
        scaling, parameters = keys.table("rope_scaling"), keys.table("rope_parameters")
        by_kind = ConfigKeys(parameters or {}, f"{keys.where}: rope_parameters")
        tables = [by_kind.table(f"{kind}_attention") or {} for kind in ("full", "sliding")]
        by_kind.close(())
        if self.local is None and top != self.theta and "rope_theta" not in tables[1]:
            raise ValueError(
                f"{keys.where}: rope_theta is {top}: transformers 4 takes it for all layers and "
                "transformers 5 for those without a window; state rope_parameters for both"
            )
        plain, context = Rope(), found["context_length"]
        tables[0] = _one_table(keys, scaling, tables[0])
        for name, theta, table in zip(("rope", "second_rope"), (top, local), tables, strict=True):
            inside = ConfigKeys(table, f"{keys.where}: rope")
            found[name] = plain._table(inside, theta, None, None, context)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Both spellings: transformers 4 knows the older one only."""
        full, local = config.rope, config.second_rope
        assert full is not None and local is not None, "a family with two RoPEs"
        scaling = rope_scaling(full, config.context_length)
        tables = {
            f"{kind}_attention": {
                **(rope_scaling(rope, config.context_length) or {"rope_type": "default"}),
                "rope_theta": rope.theta,
            }
            for kind, rope in (("full", full), ("sliding", local))
        }
        older = {self.local_key: local.theta} if self.local_key else {}
        stated = {"rope_theta": full.theta, "rope_scaling": scaling, **older}
        return {**stated, "rope_parameters": tables}
