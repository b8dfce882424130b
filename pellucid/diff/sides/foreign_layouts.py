"""In which layout a foreign tensor holds ours, found by its shape and, of RoPE, by its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid import graph
from pellucid.diff.sides.layouts import FIXED, Layout, lay_out

Split = Literal["concat", "heads", "groups", "rows"]
SPLITS: tuple[Split, ...] = ("concat", "heads", "groups", "rows")
SCALED = 1e-3  # by how much a factor differs from 1, or from another one
TURNED = 1e-2  # relative change of the pairs' sizes up to which they were only turned


def laid_out(x: Tensor, ours: str, sizes: Mapping[str, int], kind: str) -> Layout | None:
    """The likeliest layout in which x can hold a tensor of ours, or None.

    kind  "flat": heads side by side come first; "apart": heads as an axis of their own
    """
    dims = graph.dims(ours)
    wanted = [sizes[letter] for letter in dims]
    if ours.endswith("logits") and x.ndim == 3 and x.shape[1] == 1:
        wanted[1] = 1  # of the last token alone
    fixed = {letter: sizes[letter] for letter in FIXED}
    for axes in _axes(dims, sizes, kind):
        layout = Layout(axes=axes)
        try:
            laid = lay_out(x, layout, dims, fixed)
        except (ValueError, RuntimeError):
            continue
        if list(laid.shape) == wanted:
            return layout
    return None


def _axes(
    dims: tuple[str, ...], sizes: Mapping[str, int], kind: str
) -> Iterator[tuple[tuple[str, ...], ...]]:
    plain = tuple((letter,) for letter in dims)
    bare = plain[1:] if dims[0] == "B" else (("B",), *plain)
    if "D" not in dims:
        yield plain
        yield bare
        if dims == ("B", "H", "T", "S"):
            yield (("B", "H"), ("T",), ("S",))
        return
    heads = dims[1]
    options = [(heads,)]
    if heads == "Hkv" and sizes["H"] != sizes["Hkv"]:
        times = str(sizes["H"] // sizes["Hkv"])
        options += [("Hkv", times), (times, "Hkv")]  # repeated for the query heads, or tiled
    for h in options:
        flat = [(("B",), ("T",), (*h, "D")), (("T",), (*h, "D"))]
        apart = [
            (("B",), h, ("T",), ("D",)), (("B",), ("T",), h, ("D",)), (("B",), h, ("D",), ("T",)),
            (("B", *h), ("T",), ("D",)), (("B", *h), ("D",), ("T",)),
            (h, ("T",), ("D",)), (("T",), h, ("D",)), (h, ("D",), ("T",)),
        ]  # fmt: skip
        yield from (*flat, *apart) if kind == "flat" else (*apart, *flat)


def pairs_turned(before: Tensor, after: Tensor) -> str | None:
    """Which pairs of components a rotation turned, "halves" or "neighbours", by their sizes.

    before, after  (B, H, T, D). A rotation keeps the size of each pair that it turns, whatever its
    angles. None where nothing was turned, or no pairs of either kind keep their size.
    """
    if before.shape != after.shape or torch.equal(before, after):
        return None
    x, y = before.double(), after.double()
    kept = {
        "halves": _changed(*(torch.stack(z.chunk(2, -1)).norm(dim=0) for z in (x, y))),
        "neighbours": _changed(*(z.unflatten(-1, (-1, 2)).norm(dim=-1) for z in (x, y))),
    }
    best = min(kept, key=lambda pairs: kept[pairs])
    return best if kept[best] < TURNED else None


def even_factor(before: Tensor, after: Tensor) -> float | None:
    """The number by which all of a tensor's vectors grew, turned or not; None for no such."""
    if before.shape != after.shape:
        return None
    x, y = before.double().norm(dim=-1), after.double().norm(dim=-1)
    factor = float((x * y).sum() / x.square().sum().clamp(min=1e-30))
    return factor if float((y - factor * x).norm() / y.norm().clamp(min=1e-30)) < TURNED else None


def _changed(x: Tensor, y: Tensor) -> float:
    """Relative difference but for one factor, which some scalings of RoPE have."""
    factor = (x * y).sum() / y.square().sum().clamp(min=1e-30)
    return float((x - factor * y).norm() / x.norm().clamp(min=1e-30))


def split_joined(
    x: Tensor, split: Split, modules: Sequence[str], config: Any, dim: int = 0
) -> tuple[Tensor, ...]:
    """Joined matrices apart: B's joined rows (or a product's last axis) for each of `modules`.

    concat  one after the other          heads   for each head q, k, v
    groups  for each key head its queries, then k and v         rows    in turn, row by row
    """
    x = x.movedim(dim, 0)
    width, heads, kv = config.head_dim, config.n_heads, config.n_kv_heads
    if split == "concat":
        return tuple(part.movedim(0, dim) for part in x.split(_rows(modules, config)))
    if split == "rows":
        apart = x.unflatten(0, (-1, len(modules)))
        return tuple(apart[:, place].movedim(0, dim) for place in range(len(modules)))
    if split == "heads":
        apart = x.unflatten(0, (heads, len(modules), width))
        parts = [apart[:, place].flatten(0, 1) for place in range(len(modules))]
        return tuple(part.movedim(0, dim) for part in parts)
    each = heads // kv
    apart = x.unflatten(0, (kv, each + 2, width))
    parts = [apart[:, :each].flatten(0, 2), apart[:, each].flatten(0, 1)]
    parts.append(apart[:, each + 1].flatten(0, 1))
    return tuple(part.movedim(0, dim) for part in parts)


def _rows(modules: Sequence[str], config: Any) -> list[int]:
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads, "v_proj": config.n_kv_heads}
    last = [module.rpartition(".")[2] for module in modules]
    return [
        heads[name] * config.head_dim if name in heads else config.hidden_width for name in last
    ]


def splits_of(modules: Sequence[str], config: Any) -> Iterator[Split]:
    """The ways in which these modules can be joined."""
    attention = len(modules) == 3
    for split in SPLITS:
        alike = config.n_heads == config.n_kv_heads or not attention
        if (split in ("heads", "groups") and not attention) or (split == "rows" and not alike):
            continue
        if split == "heads" and not alike:
            continue
        yield split


def order_of_parts(whole: Tensor, parts: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The order in which matrices stand below each other in a joined one; None for no such."""
    if whole.shape[0] != sum(len(part) for part in parts):
        return None
    for order in permutations(range(len(parts))):
        pieces = whole.split([len(parts[place]) for place in order])
        same = (
            torch.equal(piece, parts[place].to(piece.dtype))
            for piece, place in zip(pieces, order, strict=True)
        )
        if all(same):
            return order
    return None


def same_values(x: Tensor, y: Tensor) -> bool:
    """Bit-equal, in the coarser dtype of both, whatever the axes."""
    if x.numel() != y.numel():
        return False
    x, y = (x, y) if x.shape == y.shape else (x.flatten(), y.flatten())
    if x.dtype == y.dtype:
        return torch.equal(x, y)
    coarse = min((x.dtype, y.dtype), key=lambda dtype: dtype.itemsize)
    return torch.equal(x.to(coarse), y.to(coarse))


def without_head_axis(x: Tensor, ours: str, config: Any) -> Tensor:
    """A projection whose heads are an axis of their own as (out, in); as it is where none is.

    x  (heads, C, D), (heads, D, C), (C, heads, D) …, of q, k, v or o
    """
    out = not ours.endswith("o_proj.weight")
    count = config.n_heads if ".q_proj" in ours or not out else config.n_kv_heads
    for order in permutations(range(3)):
        laid = x.permute(order)
        if laid.shape == (count, config.head_dim, config.width):
            flat = laid.reshape(-1, config.width)
            return flat if out else flat.T
    return x
