"""What a seeded fault is, and what a model must have for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pellucid import graph
from pellucid.diff.selftest.port import Port

Rows = Literal["short", "long", "many", "padded"]
Damage = Callable[[dict[str, torch.Tensor], Any], None]
Change = Callable[[Any], Any]
Encode = Callable[[Any, str], list[int]]  # of (tokenizer, text)
Applies = Callable[[Any], bool]  # of a config


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One mistake, or for a control one difference that is none.

    first                           first wrong tensor: its name, or a function of the config
    port, weights, config, encode   what is wrong with B
    with_config, with_weights       what both sides need to be, beforehand
    applies                         which configs can have it
    hides                           leaves that B does not write down
    side_dtype                      B's dtype where it is not A's
    not_in                          dtypes in which it changes nothing
    visible_only                    needs B's weights: a recording alone cannot tell it from a fault
    """

    name: str
    first: str | Callable[[Any], str] = ""
    cause: str = ""
    static: str | None = None
    applies: Applies = lambda config: True
    port: Port = field(default_factory=Port)
    weights: Damage | None = None
    config: Change | None = None
    encode: Encode | None = None
    with_config: Change | None = None
    with_weights: Damage | None = None
    rows: Rows = "short"
    steps: int = 0
    hides: tuple[str, ...] = ()
    copies: int = 1
    side_dtype: str | None = None
    not_in: tuple[str, ...] = ()
    visible_only: bool = False
    verdicts: tuple[str, ...] = ("identical", "within-rounding")  # what a control may read

    def first_of(self, config: Any) -> str:
        """The first tensor that the fault makes wrong in a model with this config."""
        return self.first if isinstance(self.first, str) else self.first(config)


def fault(name: str, first: str | Callable[[Any], str], cause: str, **more: Any) -> Fault:
    """A fault with its first wrong tensor and what to call it."""
    return Fault(name=name, first=first, cause=cause, **more)


def every(*needed: Applies) -> Applies:
    """Configs for which all of these hold."""
    return lambda config: all(need(config) for need in needed)


def turned(config: Any) -> bool:
    """The first layer turns its queries and keys by the first RoPE."""
    return config.kinds[0].rope == "rope"


def first_turned(config: Any) -> bool:
    """The first layer turns its queries and keys, by whichever RoPE."""
    return bool(config.kinds[0].rope)


def learned(config: Any) -> bool:
    """Positions have learned embeddings."""
    return graph.has(config, "pos_embed")


def plain_scores(config: Any) -> bool:
    """Attention that a fused kernel computes: no cap on its scores, no sinks."""
    return not config.score_cap and not config.sinks


def normed_before(config: Any) -> bool:
    """The first norm of the model is that of the first block's attention."""
    return config.norm_places != "after" and not config.embed_norm


def head(config: Any) -> str:
    """What the head's product is called."""
    return "raw_logits" if graph.has(config, "raw_logits") else "logits"


def product(leaf: str, layer: int) -> Callable[[Any], str]:
    """Output of attention ("attn") or MLP as its last product leaves it."""

    def name(config: Any) -> str:
        plain = f"{leaf}.out" if graph.has(config, f"{leaf}.out", layer) else f"{leaf}_out"
        return f"layers.{layer}.{plain}"

    return name
