"""Parameters of a module without a name map, found by their values.

Values are compared by a sum of their bits, which no re-layout changes: transposed, permuted or
joined with others, a matrix keeps it. What B's modules of one pattern hold in most layers decides,
so that one wrong tensor does not hide which one it is; what no value speaks for is placed by shape
and by the order of use.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

from pellucid import names

# Matrices that implementations keep joined, in the order in which they are joined.
JOINED = (
    ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    ("attn.k_proj", "attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
ALIKE = 0.5  # correlation from which a changed matrix is still known
Parts = tuple[str, ...]  # local names of ours that one tensor holds: ("attn.q_proj.weight",)


@dataclass(frozen=True)
class Place:
    """A foreign name as the container of its block, the block's index, and the rest."""

    container: str
    index: int | None
    rest: str

    @property
    def pattern(self) -> str:
        """The name with {N} for the index."""
        return self.rest if self.index is None else f"{self.container}{{N}}{self.rest}"


@dataclass(kw_only=True)
class Matched:
    """What a module's parameters turned out to be.

    parts      pattern of a parameter -> what of ours it holds
    container  text before the index of a block: ``transformer.h.``
    layers     index of a block in B -> our layer
    """

    parts: dict[str, Parts] = field(default_factory=dict)
    container: str = ""
    layers: dict[int, int] = field(default_factory=dict)

    def place(self, name: str) -> Place:
        """Where a foreign name stands."""
        if self.container and name.startswith(self.container):
            digits, dot, rest = name[len(self.container) :].partition(".")
            number = digits.partition("(")[0]
            if number.isdigit() and int(number) in self.layers:
                return Place(self.container, int(number), digits[len(number) :] + dot + rest)
        return Place("", None, name)

    def held(self, name: str) -> tuple[str, ...]:
        """Our full names of what a foreign parameter holds; () for what is not known."""
        place = self.place(name)
        parts = self.parts.get(place.pattern, ())
        if place.index is None:
            return parts
        return tuple(f"layers.{self.layers[place.index]}.{part}" for part in parts)


def match_weights(
    theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor], n_layers: int, used: Sequence[str]
) -> Matched:
    """Which of A's parameters each of B's holds.

    theirs, mine  B's and A's parameters by name
    used          B's parameters in the order in which its run first read them
    """
    order = {name: place for place, name in enumerate(used)}
    found = Matched()
    found.container, found.layers = _blocks(theirs, n_layers, order)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(theirs, key=lambda name: order.get(name, len(order))):
        if theirs[name].is_floating_point() and theirs[name].ndim:
            groups[found.place(name).pattern].append(name)
    coarse = _coarser(theirs, mine)
    known = _known(mine, coarse)
    votes = {
        pattern: _votes(held, theirs, known, coarse, inside="{N}" in pattern)
        for pattern, held in groups.items()
    }
    _assign(found, groups, votes)
    _beside_weights(found, groups, mine)
    _by_likeness(found, groups, theirs, mine, order)
    return found


def _blocks(
    theirs: Mapping[str, Tensor], n_layers: int, order: Mapping[str, int]
) -> tuple[str, dict[int, int]]:
    """What stands before the index of a block, and the layer of each index, by order of use."""
    held: dict[str, dict[int, int]] = defaultdict(dict)
    counts: Counter[str] = Counter()
    for name in theirs:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                container = "".join(f"{before}." for before in parts[:place])
                first = held[container].get(int(part), len(order))
                held[container][int(part)] = min(first, order.get(name, len(order)))
                counts[container] += 1
    fitting = [container for container in held if len(held[container]) == n_layers]
    if not fitting:  # some are missing: the longest row of blocks that there is
        longest = max((len(h) for h in held.values() if len(h) < n_layers), default=0)
        fitting = [c for c in held if len(held[c]) == longest and counts[c] > 4 * longest > 4]
    if not fitting:
        return "", {}
    best = max(fitting, key=lambda container: counts[container])
    ordered = sorted(held[best], key=lambda index: (held[best][index], index))
    return best, {index: layer for layer, index in enumerate(ordered)}


def _coarser(theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> torch.dtype:
    """The coarsest dtype in which either side holds weights: values are compared in it."""
    held = {x.dtype for side in (theirs, mine) for x in side.values() if x.is_floating_point()}
    return max(held, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def sum_of_bits(x: Tensor, coarse: torch.dtype) -> int:
    """A mark of the values in the dtype `coarse`, the same in whatever order they stand."""
    return int(x.detach().to(coarse).float().contiguous().view(torch.int32).sum(dtype=torch.int64))


def _known(mine: Mapping[str, Tensor], coarse: torch.dtype) -> dict[tuple[int, int], set[Parts]]:
    """(elements, sum of bits) -> what of A has them, alone or joined."""
    found: dict[tuple[int, int], set[Parts]] = defaultdict(set)
    single: dict[str, tuple[int, int]] = {}
    for name in mine:
        single[name] = mine[name].numel(), sum_of_bits(mine[name], coarse)
        found[single[name]].add((_local(name),))
    for name in mine:
        layer, local = names.layer_of(name), _local(name)
        for stems in JOINED:
            kind = local.rpartition(".")[2]
            if layer is None or local != f"{stems[0]}.{kind}":
                continue
            whole = [f"layers.{layer}.{stem}.{kind}" for stem in stems]
            if all(part in single for part in whole):
                key = sum(single[p][0] for p in whole), sum(single[p][1] for p in whole)
                found[key].add(tuple(map(_local, whole)))
    return found


def _local(name: str) -> str:
    return name.split(".", 2)[2] if names.layer_of(name) is not None else name


def _votes(
    held: Sequence[str],
    theirs: Mapping[str, Tensor],
    known: Mapping[tuple[int, int], set[Parts]],
    coarse: torch.dtype,
    inside: bool,
) -> Counter[Parts]:
    votes: Counter[Parts] = Counter()
    for name in held:
        x = theirs[name]
        fits = known.get((x.numel(), sum_of_bits(x, coarse)), set())
        here = [parts for parts in fits if _inside(parts) == inside]
        for parts in here:
            votes[parts] += 12 // len(here) if len(here) <= 12 else 1
    return votes


def _inside(parts: Parts) -> bool:
    return parts[0].startswith(("attn", "mlp"))


def _assign(
    found: Matched, groups: Mapping[str, list[str]], votes: Mapping[str, Counter[Parts]]
) -> None:
    """Patterns with the most votes first; of equals, in the order of use and of our names."""
    patterns = list(groups)
    rows = [
        (-count, patterns.index(pattern), _rank(parts), pattern, parts)
        for pattern, counted in votes.items()
        for parts, count in counted.items()
    ]
    taken: set[str] = set()
    for _, _, _, pattern, parts in sorted(rows):
        free = not taken & set(parts) or parts == ("embed.weight",)  # a tied head is one too
        if pattern not in found.parts and free:
            found.parts[pattern] = parts
            taken |= set(parts)


_ORDER = (
    "embed.weight", "pos_embed.weight", "embed_norm.weight", "attn_norm.weight",
    "attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight", "attn.q_norm.weight",
    "attn.k_norm.weight", "attn.o_proj.weight", "attn_out_norm.weight", "mlp_norm.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "mlp_out_norm.weight",
    "norm.weight", "unembed.weight",
)  # fmt: skip


def _rank(parts: Parts) -> int:
    return _ORDER.index(parts[0]) if parts[0] in _ORDER else len(_ORDER)


def _beside_weights(
    found: Matched, groups: Mapping[str, list[str]], mine: Mapping[str, Tensor]
) -> None:
    """A bias is the bias of the module whose weight is known, whatever its values."""
    locals_ = {_local(name) for name in mine}
    for pattern in groups:
        stem, _, kind = pattern.rpartition(".")
        weight = found.parts.get(f"{stem}.weight")
        if kind == "bias" and weight is not None:
            parts = tuple(part.removesuffix("weight") + "bias" for part in weight)
            found.parts.pop(pattern, None)
            if any(part in locals_ for part in parts):
                found.parts[pattern] = parts


def _by_likeness(
    found: Matched,
    groups: Mapping[str, list[str]],
    theirs: Mapping[str, Tensor],
    mine: Mapping[str, Tensor],
    order: Mapping[str, int],
) -> None:
    """What is left: a changed tensor by its values, one that is wholly other by shape and order."""
    taken = {part for parts in found.parts.values() for part in parts}
    free = [name for name in dict.fromkeys(map(_local, mine)) if name not in taken]
    free.sort(key=lambda name: _rank((name,)))
    left = [p for p, held in groups.items() if p not in found.parts and held[0] in order]
    if "unembed.weight" not in mine:  # tied in A; another head is one that B changed
        for pattern in left:
            if _alike(theirs[groups[pattern][0]], mine["embed.weight"]) and "{N}" not in pattern:
                found.parts[pattern] = ("unembed.weight",)
        left = [pattern for pattern in left if pattern not in found.parts]
    for alike in (True, False):
        for pattern in list(left):
            x = theirs[groups[pattern][0]]
            for name in free:
                full = name if _local(name) == name and name in mine else f"layers.0.{name}"
                fits = full in mine and ("{N}" in pattern) == _inside((name,))
                if fits and _same_shape(x, mine[full]) and (not alike or _alike(x, mine[full])):
                    found.parts[pattern] = (name,)
                    free.remove(name)
                    left.remove(pattern)
                    break
    for pattern in left:
        _joined_by_shape(found, pattern, theirs[groups[pattern][0]], mine, free)


def _joined_by_shape(
    found: Matched, pattern: str, x: Tensor, mine: Mapping[str, Tensor], free: Sequence[str]
) -> None:
    for stems in JOINED:
        whole = [f"layers.0.{stem}.weight" for stem in stems]
        parts = tuple(f"{stem}.weight" for stem in stems)
        if all(p in free for p in parts) and sum(mine[w].numel() for w in whole) == x.numel():
            found.parts[pattern] = parts
            return


def _same_shape(x: Tensor, y: Tensor) -> bool:
    if x.ndim == 3:  # heads as an axis of their own
        return x.numel() == y.numel()
    return x.shape == y.shape or (x.ndim == y.ndim == 2 and x.shape == y.T.shape)


def _alike(x: Tensor, y: Tensor) -> bool:
    if x.numel() != y.numel():
        return False
    if x.ndim == 3 and y.ndim == 2:
        apart = (
            x.permute(order).reshape(shape)
            for order in permutations(range(3))
            for shape in {y.shape, y.T.shape}
        )
        return any(_alike(flat, y) for flat in apart)
    options = [y] if x.shape == y.shape else []
    options += [y.T] if x.ndim == y.ndim == 2 and y.T.shape == x.shape else []
    return any(_correlation(x, option) > ALIKE for option in options)


def _correlation(x: Tensor, y: Tensor) -> float:
    a, b = x.double().flatten(), y.double().flatten()
    return float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-30))
