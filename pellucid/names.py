"""Names as text: the layer and the decoding step in a name, the index in an address.

An address is a name with an optional index, ``layers.3.attn.scores[5,7,3]``; the batch axis is left
out when B is 1. Which names there are is data: `graph`.
"""

from __future__ import annotations

import re
from functools import lru_cache

Index = tuple[int | slice, ...]

_STEP = re.compile(r"step\.(\d+)\.")
_LAYER = re.compile(r"layers\.(\d+)\.")


def without_step(name: str) -> str:
    """`name` without the ``step.i.`` of a decoding step."""
    return _STEP.sub("", name, count=1) if name.startswith("step.") else name


def step_of(name: str) -> int:
    """Decoding step of a name; 0 for the first pass, whose names have no prefix."""
    found = _STEP.match(name)
    return int(found[1]) if found else 0


def layer_of(name: str) -> int | None:
    """Layer of a name, or None for a tensor of the whole model."""
    found = _LAYER.match(without_step(name))
    return int(found[1]) if found else None


@lru_cache(maxsize=1 << 12)
def general(name: str) -> str:
    """`name` without its step and with N for its layer: ``layers.N.attn.q``."""
    return _LAYER.sub("layers.N.", without_step(name))


def parse(address: str) -> tuple[str, Index]:
    """Name and index of an address: ``"mask[0,:3]"`` -> ``("mask", (0, slice(None, 3)))``."""
    name, bracket, inside = address.partition("[")
    if not bracket:
        return name, ()
    if not inside.endswith("]"):
        raise ValueError(f"address {address!r}: the index has no closing bracket")
    return name, tuple(_parse_one(part.strip(), address) for part in inside[:-1].split(","))


def _parse_one(part: str, address: str) -> int | slice:
    try:
        if ":" not in part:
            return int(part)
        fields = [int(field) if field.strip() else None for field in part.split(":")]
        return slice(*fields)
    except (ValueError, TypeError):
        raise ValueError(
            f"address {address!r}: {part!r} is no index; expected a number or a slice such as 2:5"
        ) from None
