"""A name map for a recording without a description: by value where values agree, else by shape.

An implementation that is nearly right has nearly our values under whatever names and axes it uses,
so each of its tensors is held against ours in every layout its shape allows. What then has no
partner is placed by order and shape between its neighbours, if that leaves one choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

from torch import Tensor

from pellucid import graph, names
from pellucid.diff.sides.layouts import Layout, lay_out
from pellucid.trace import Trace

NEAR = 0.1  # relative RMS error below which values agree
BY_SHAPE = 0.5  # confidence of a partner that only order and shape speak for


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """One line of a proposal: confidence is 1 − relative error, or `BY_SHAPE`."""

    foreign: str
    ours: str
    layout: Layout
    confidence: float


def propose_map(recorded: Mapping[str, Tensor], ours: Trace) -> list[Proposed]:
    """Which of our names each recorded tensor seems to hold, in the order of the recording.

    recorded  foreign name -> tensor, in the order the implementation computed them
    ours      a trace of the same tokens by a model that is right, or nearly
    """
    candidates = [n for n in ours if names.step_of(n) == 0 and ours[n].is_floating_point()]
    sizes = _sizes(ours)
    found: dict[str, Proposed] = {}
    for foreign, x in recorded.items():
        if not x.is_floating_point() or not x.numel():
            continue
        best = min(
            (
                row
                for name in candidates
                if name not in found
                for row in _fits(foreign, x, name, ours, sizes)
            ),
            key=lambda row: -row.confidence,
            default=None,
        )
        if best is not None and best.confidence > 1 - NEAR:
            found[best.ours] = best
    _by_order(recorded, ours, candidates, sizes, found)
    place = {name: i for i, name in enumerate(recorded)}
    return sorted(found.values(), key=lambda row: place[row.foreign])


def as_yaml(rows: list[Proposed]) -> str:
    """A proposal as a name map; lines that differ only in the layer become one."""
    lines: dict[str, list[float]] = {}
    for row in rows:
        foreign, ours = _without_layer(row)
        layout = f" ({row.layout})" if str(row.layout) != _plain(row.ours) else ""
        lines.setdefault(f"{foreign}: {ours}{layout}", []).append(row.confidence)
    return "".join(f"{line}  # {min(held):.0%}\n" for line, held in lines.items())


def _without_layer(row: Proposed) -> tuple[str, str]:
    layer = names.layer_of(row.ours)
    if layer is None:
        return row.foreign, row.ours
    general, count = re.subn(rf"(?<!\d){layer}(?!\d)", "{N}", row.foreign, count=1)
    ours = row.ours.replace(f"layers.{layer}.", "layers.{N}.")
    return (general, ours) if count else (row.foreign, row.ours)


def _plain(name: str) -> str:
    return " ".join(graph.dims(name))


def _sizes(ours: Trace) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name in ours:
        if names.step_of(name) == 0 and len(graph.dims(name)) == ours[name].ndim:
            sizes |= dict(zip(graph.dims(name), ours[name].shape, strict=True))
    return sizes


def _fits(
    foreign: str, x: Tensor, name: str, ours: Trace, sizes: Mapping[str, int]
) -> Iterator[Proposed]:
    """Every layout in which x has the shape of our tensor, with the agreement of the values."""
    y = ours[name]
    repeated = 2 if "D/2" in graph.dims(name) else 1
    if x.numel() not in (y.numel(), repeated * y.numel()):
        return
    for layout in _layouts(graph.dims(name), x.ndim):
        try:
            laid = lay_out(x, layout, graph.dims(name), sizes)
        except (ValueError, RuntimeError):
            continue
        if laid.shape == y.shape:
            yield Proposed(
                foreign=foreign, ours=name, layout=layout, confidence=_agreement(laid, y)
            )


def _layouts(dims: tuple[str, ...], ndim: int) -> Iterator[Layout]:
    """Layouts of so many axes that hold `dims`: ours first, then other orders and joined heads."""
    heads = "Hkv" if "Hkv" in dims else "H"
    split = heads in dims and "D" in dims
    for turned in (False, True) if split else (False,):
        for order in permutations(dims):
            axes = tuple((letter,) for letter in order)
            bare = tuple(axis for axis in axes if axis != ("B",))
            joined = tuple(
                (heads, "D") if axis == (heads,) else axis for axis in axes if axis != ("D",)
            )
            doubled = tuple(("2", "D/2") if axis == ("D/2",) else axis for axis in axes)
            choices = [axes, bare]
            if split and order.index("D") == order.index(heads) + 1:
                choices += [joined, tuple(axis for axis in joined if axis != ("B",))]
            if doubled != axes:
                choices += [doubled, (("B",), *doubled), (("B",), *axes)]
            for choice in dict.fromkeys(choices):
                if len(choice) == ndim:
                    yield Layout(axes=choice, interleaved=turned)


def _agreement(x: Tensor, y: Tensor) -> float:
    """1 − relative RMS error over the finite values, at least `BY_SHAPE` / 2."""
    x, y = x.double(), y.double()
    usable = x.isfinite() & y.isfinite() & (y > -1e4)
    size = float(y[usable].pow(2).mean().sqrt()) if usable.any() else 0.0
    if not size:
        return BY_SHAPE / 2
    error = float((x[usable] - y[usable]).pow(2).mean().sqrt()) / size
    return max(1.0 - error, BY_SHAPE / 2)


def _by_order(
    recorded: Mapping[str, Tensor],
    ours: Trace,
    candidates: list[str],
    sizes: Mapping[str, int],
    found: dict[str, Proposed],
) -> None:
    """Place what has no agreeing partner: between its neighbours' partners, by shape."""
    taken = {row.foreign for row in found.values()}
    order = list(recorded)
    for place, foreign in enumerate(order):
        if foreign in taken or not recorded[foreign].is_floating_point():
            continue
        before = [n for n, row in found.items() if order.index(row.foreign) < place]
        after = [n for n, row in found.items() if order.index(row.foreign) > place]
        low = max((candidates.index(n) for n in before), default=-1)
        high = min((candidates.index(n) for n in after), default=len(candidates))
        fitting: dict[str, Proposed] = {}
        for name in candidates[low + 1 : high]:
            if name not in found:
                for row in _fits(foreign, recorded[foreign], name, ours, sizes):
                    fitting.setdefault(name, row)
        if fitting:
            name, row = next(iter(fitting.items()))
            if len(fitting) == 1:
                found[name] = Proposed(
                    foreign=foreign, ours=name, layout=row.layout, confidence=BY_SHAPE
                )
