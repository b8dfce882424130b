"""Two runs side by side: how far each tensor moved, and where the second one does what no rounding
explains.

The verdict is the one of `pellucid diff`: each tensor of the second run is computed again from that
run's own inputs. So an edit shows at the tensor it changes, and what follows from it is explained;
how far the runs are apart is beside it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from pellucid import graph
from pellucid.diff.replay.operations import SOURCES
from pellucid.diff.replay.replay import Replay
from pellucid.explore.attribution import change_of_predictions
from pellucid.explore.packing import without_batch
from pellucid.explore.runs import ExploredRun


def against(run: ExploredRun, other: ExploredRun, row: int = -1) -> Generator[Any, None, None]:
    """`other` held against `run`: a row per name that both have, in order; yields it last.

    verdict    identical, within-rounding or diverged: other's own operation on its own inputs, in
               the arithmetic of the first run's model; not-judged where the models differ in shape
    largest    largest distance of the two runs; relative to the largest number of the first
    identical  to the bit
    only       names that one of the two has alone: run, other
    python     what makes both runs
    """
    setting = run.loaded.setting()
    same_shape = run.loaded.config == other.loaded.config
    rows = []
    for name in run:
        if name not in other:
            continue
        verdict = _verdict(Replay(other, setting), name, other) if same_shape else "not-judged"
        rows.append({"name": name, "verdict": verdict, **distance(run[name], other[name])})
        yield None
    moved = [entry["name"] for entry in rows if not entry["identical"]]
    diverged = [entry["name"] for entry in rows if entry["verdict"] == "diverged"]
    yield {
        "rows": rows,
        "first": moved[0] if moved else None,
        "first_diverged": diverged[0] if diverged else None,
        "only": [[name for name in one if name not in two] for one, two in _both_ways(run, other)],
        "probabilities": change_of_predictions(run, other, row),
        "python": python(run, other),
    }


def _both_ways(
    run: ExploredRun, other: ExploredRun
) -> tuple[tuple[ExploredRun, ExploredRun], tuple[ExploredRun, ExploredRun]]:
    return (run, other), (other, run)


def python(run: ExploredRun, other: ExploredRun) -> str:
    """Python that makes both runs, as `first` and `second`, and a function `apart` of a name."""
    known: set[str] = set()
    lines = [run.python("first", known)]
    if other.loaded is not run.loaded:
        lines += ["", other.loaded.python()]
    return "\n".join([*lines, other.python("second", known), "", *_APART])


_APART = (
    "def apart(address):",
    "    return second[address].double() - first[address].double()",
)


def difference(run: ExploredRun, other: ExploredRun, address: str) -> Tensor:
    """`other` minus `run` at an address, in float64; −inf where both are masked.

    ValueError where the two have different shapes there.
    """
    one, two = (without_batch(each, address) for each in (run, other))
    if one.shape != two.shape:
        said = " and ".join("×".join(map(str, each.shape)) for each in (one, two))
        raise ValueError(f"{address} has the shapes {said}: nothing to subtract")
    closed = (one < -1e30) & (two < -1e30) if one.is_floating_point() else torch.zeros_like(one) > 0
    return (two.double() - one.double()).masked_fill(closed, -torch.inf)


def _verdict(replay: Replay, name: str, other: ExploredRun) -> str:
    if graph.leaf(name) in SOURCES:
        return "identical"
    seen, near = other[name], replay.compute(name)
    if torch.equal(near, seen):
        return "identical"
    exact = Replay(other, replay.setting.wide()).compute(name)
    return replay.hold(name, exact, near, seen).verdict


def distance(one: Tensor, other: Tensor) -> dict[str, Any]:
    """Largest distance of two tensors, absolute and in units of the first one's largest number.

    None where their shapes differ; masked cells count where only one of them is masked.
    """
    if one.shape != other.shape:
        return {"largest": None, "relative": None, "identical": False}
    same = torch.equal(one, other)
    if same or not one.is_floating_point():
        apart = 0.0 if same else float((one != other).any())
        return {"largest": apart, "relative": apart, "identical": same}
    a, b = one.double(), other.double()
    off = (a < -1e30) & (b < -1e30)
    largest = float((a - b).masked_fill(off, 0).abs().max())
    size = float(a.masked_fill(a < -1e30, 0).abs().max())
    return {"largest": largest, "relative": largest / size if size else None, "identical": False}
