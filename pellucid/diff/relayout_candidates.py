"""Wrong versions of a weight: what B's may be where only what was computed with it is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pellucid import names
from pellucid.diff.relayout import HEADED, head_layouts, shard_orders
from pellucid.diff.rounding import dtype_name, gives


def candidates(
    name: str, weights: Callable[[str], Tensor | None], config: Any
) -> Iterator[tuple[str, str, Tensor]]:
    """Wrong versions of a weight of the same shape, to replay where only the result is seen."""
    x = weights(name)
    if x is None:
        return
    near = {
        other: tensor
        for other in _neighbours(name, config)
        if (tensor := weights(other)) is not None
    }
    near[name] = x
    for coarse in (torch.bfloat16, torch.float16):
        if not gives(x.to(coarse), x):
            fits = bool(x.to(coarse).isfinite().all())
            cause = "rounded weights" if fits else "float16 overflow"
            yield cause, f"through {dtype_name(coarse)}", x.to(coarse).to(x.dtype)
    for other, tensor in near.items():
        if other != name and tensor.shape == x.shape:
            elsewhere = names.layer_of(other) != names.layer_of(name)
            cause = "tensor of another layer" if elsewhere else "swapped weights"
            yield cause, f"A's {other.rsplit('.', 1)[0]}", tensor
    if x.ndim == 2 and x.shape[0] == x.shape[1]:
        yield "transposed weight", "transposed", x.T
    if name.removesuffix(".weight").removesuffix(".bias").endswith(HEADED):
        for cause, finding, _, tensor in head_layouts(name, x, near, config):
            yield cause, finding, tensor
    if name.endswith("norm.weight"):
        yield "norm weight plus one", "weight + 1", x + 1
        yield "norm weight plus one", "weight - 1", x - 1
    if name.endswith("attn.o_proj.weight") and config is not None:
        yield from _head_columns(x, config.head_dim)
    yield from _gate_and_up(name, x, near)
    if x.ndim == 2:
        for cause, finding, _, tensor in shard_orders(x):
            yield cause, finding, tensor


def _head_columns(x: Tensor, width: int) -> Iterator[tuple[str, str, Tensor]]:
    """Columns of an output projection with heads, or the halves of each head, in another order."""
    heads = x.unflatten(1, (-1, width))
    orders = [("heads in reverse order", heads.flip(1))]
    orders += [(f"heads moved by {n}", heads.roll(n, 1)) for n in range(1, heads.shape[1])]
    if width % 2 == 0:
        for there, here, word in ((2, width // 2, "interleaved"), (width // 2, 2, "split")):
            pairs = heads.unflatten(2, (there, here)).transpose(2, 3)
            orders.append((f"components of each head {word} as for RoPE", pairs.flatten(2)))
    for said, tensor in orders:
        yield "reordered columns", said, tensor.reshape(x.shape)


def _gate_and_up(
    name: str, x: Tensor, near: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    """Rows of joined gate and up, cut in halves where they alternate, or the reverse."""
    stem, _, kind = name.rpartition("_proj.")
    if not stem.endswith(("mlp.gate", "mlp.up")):
        return
    block = stem.rpartition(".")[0]
    parts = [
        x if n == name else near.get(n)
        for n in (f"{block}.{w}_proj.{kind}" for w in ("gate", "up"))
    ]
    if any(part is None or part.shape != x.shape for part in parts):
        return
    gate, up = (part for part in parts if part is not None)
    place = int(stem.endswith("up"))
    alternating = torch.stack((gate, up), 1).flatten(0, 1)
    cause = "gate and up split wrongly"
    yield cause, "rows that alternate, cut in halves", alternating.chunk(2)[place]
    yield cause, "halves, read as rows that alternate", torch.cat((gate, up))[place::2]


def _neighbours(name: str, config: Any) -> Iterator[str]:
    """The same parameter of every other layer, then the others of its own block."""
    layer = names.layer_of(name)
    if layer is None:
        yield "embed.weight"
        return
    local = name.split(".", 2)[2]
    for other in range(config.n_layers):
        if other != layer:
            yield f"layers.{other}.{local}"
    for stem in (
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "attn_norm",
        "mlp_norm",
    ):
        for kind in ("weight", "bias"):
            if f"{stem}.{kind}" != local:
                yield f"layers.{layer}.{stem}.{kind}"
