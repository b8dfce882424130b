"""What a seeded fault is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pellucid.diff.selftest.engine import Port

Rows = Literal["short", "long", "many", "padded"]
Damage = Callable[[dict[str, torch.Tensor], Any], None]
Change = Callable[[Any], Any]
Encode = Callable[[Any, str], list[int]]  # of (tokenizer, text)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One mistake, or for a control one difference that is none.

    port, weights, config, encode   what is wrong with B
    with_config, with_weights       what both sides need to be, beforehand
    applies                         which configs can have it
    hides                           leaves that B does not write down
    side_dtype                      B's dtype where it is not A's
    visible_only                    needs B's weights: a recording alone cannot tell it from a fault
    """

    name: str
    first: str = ""
    cause: str = ""
    static: str | None = None
    families: tuple[str, ...] = ("gpt2", "llama")
    applies: Callable[[Any], bool] = lambda config: True
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
    visible_only: bool = False
    verdicts: tuple[str, ...] = ("identical", "within-rounding")  # what a control may read


def fault(name: str, first: str, cause: str, **more: Any) -> Fault:
    """A fault of either family."""
    return Fault(name=name, first=first, cause=cause, **more)


def llama(name: str, first: str, cause: str, **more: Any) -> Fault:
    """A fault that only a Llama can have."""
    return Fault(name=name, first=first, cause=cause, families=("llama",), **more)


def gpt2(name: str, first: str, cause: str, **more: Any) -> Fault:
    """A fault that only a GPT-2 can have."""
    return Fault(name=name, first=first, cause=cause, families=("gpt2",), **more)
