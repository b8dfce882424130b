"""Names as text: the layer and the decoding step in a name, the index in an address.

An address is a name with an optional index, ``layers.3.attn.scores[5,7,3]``; the batch axis is left
out when B is 1. Which names there are is data: `graph`.
"""

from __future__ import annotations

import re
from functools import lru_cache

Index = tuple[int | slice, ...]

_STEP = re.compile(r"step\.(\d+)\.")
_LENS_NAME = re.compile(r"(step\.\d+\.)?(blocks\.[^.]+\.)?(.*)")
_OUTSIDE_BLOCKS = ("hook_embed", "hook_pos_embed")
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


def spellings(name: str) -> tuple[str, ...]:
    """`name`, or glob, as it is called here: TransformerLens's names stand for these tensors.

    Where its name means one of two tensors by the kind of model, both come. Only names whose values
    are the same are known; the axes are this package's, (B, H, T, D) where TransformerLens has
    (B, T, H, D).
    """
    if "hook_" not in name:
        return (name,)
    parts = _LENS_NAME.fullmatch(name)
    assert parts is not None, "all of it may be the last part"
    before, block, leaf = parts.groups("")
    found = _TRANSFORMER_LENS.get(leaf, ()) if block or leaf in _OUTSIDE_BLOCKS else ()
    block = block.replace("blocks.", "layers.")
    return (name, *(f"{before}{block}{each}" for each in found))


# TransformerLens's name -> ours. Its attention scores are those behind the mask, its `pre` and
# `post` the gate and the product of a gated MLP.
_TRANSFORMER_LENS = {
    "hook_embed": ("embed",),
    "hook_pos_embed": ("pos_embed",),
    "hook_resid_pre": ("resid_pre",),
    "hook_resid_mid": ("resid_mid",),
    "hook_resid_post": ("resid_post",),
    "hook_attn_out": ("attn_out",),
    "hook_mlp_out": ("mlp_out",),
    "attn.hook_q": ("attn.q",),
    "attn.hook_k": ("attn.k",),
    "attn.hook_v": ("attn.v",),
    "attn.hook_rot_q": ("attn.q_rotated",),
    "attn.hook_rot_k": ("attn.k_rotated",),
    "attn.hook_attn_scores": ("attn.masked_scores",),
    "attn.hook_pattern": ("attn.pattern",),
    "attn.hook_z": ("attn.z",),
    "mlp.hook_pre": ("mlp.gate", "mlp.pre"),
    "mlp.hook_pre_linear": ("mlp.up",),
    "mlp.hook_post": ("mlp.hidden", "mlp.act"),
}


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
