"""Two recordings and no weights: nothing can be replayed, so growth decides.

Rounding errors grow slowly from tensor to tensor; a fault jumps. The difference of the two
recordings, relative to A and in units of the coarser dtype's roundoff, is held against the largest
among its inputs.
"""

from __future__ import annotations

from pellucid import graph
from pellucid.diff.effect import effect
from pellucid.diff.replay.judge import Keep
from pellucid.diff.replay.statistics import Measure, rms, roundoff
from pellucid.diff.report import Fault, Report, TensorVerdict
from pellucid.diff.sides.side import Side
from pellucid.diff.static import Finding
from pellucid.trace import Trace

JUMP = 16.0  # growth over the worst tensor so far that no single operation makes by rounding
ROUNDING = 256.0  # units of roundoff that a long dot product may be off by


def judge_pairs(
    a: Side,
    b: Side,
    seen_a: Trace,
    seen_b: Trace,
    static: list[Finding],
    keep: Keep | None = None,
) -> Report:
    """Report on the names both recordings have; ValueError where there are none."""
    shared = [name for name in seen_a if name in seen_b and graph.known(name)]
    if not any(seen_a[name].is_floating_point() for name in shared):
        raise ValueError(f"{a.label} and {b.label} share no named tensor: nothing was compared")
    worst = 0.0
    rows: list[TensorVerdict] = []
    faults: list[Fault] = []
    for name in shared:
        result = _pair(name, seen_a, seen_b, worst)
        if keep is not None and seen_a[name].shape == seen_b[name].shape:
            keep(name, seen_a[name], seen_b[name])
        rows.append(TensorVerdict(name=name, measure=result))
        if result.verdict == "diverged" and not faults:
            faults.append(Fault(name=name, side="b", measure=result))
        worst = max(worst, result.error_b)
    return Report(
        a=a.label,
        b=b.label,
        dtypes=(a.dtype, b.dtype),
        tokens=seen_a["tokens"].tolist() if "tokens" in seen_a else [],
        static=static,
        tensors=rows,
        faults=faults,
        not_observed=[name for name in seen_a if name not in seen_b],
        effect=effect(seen_a, seen_b, None),
        note="two recordings without weights: judged by growth, no cause can be replayed",
    )


def _pair(name: str, seen_a: Trace, seen_b: Trace, worst: float) -> Measure:
    x, y = seen_a[name], seen_b[name]
    if x.shape != y.shape:
        note = f"shape {tuple(y.shape)}, A has {tuple(x.shape)}"
        return Measure(verdict="diverged", error_a=0.0, error_b=1.0, ratio=float("inf"), note=note)
    if x.dtype == y.dtype and bool((x == y).all()):
        return Measure(verdict="identical", error_a=0.0, error_b=0.0, ratio=0.0)
    if not x.is_floating_point():
        return Measure(verdict="diverged", error_a=0.0, error_b=1.0, ratio=float("inf"))
    looked_at = x.isnan() | (x > -1e4)
    if bool((looked_at & (x.isfinite() != y.isfinite())).any()):
        note = "not finite on one side"
        return Measure(verdict="diverged", error_a=0.0, error_b=1.0, ratio=float("inf"), note=note)
    usable = x.isfinite() & y.isfinite() & looked_at
    if not usable.any():
        return Measure(
            verdict="not-judged", error_a=0.0, error_b=0.0, ratio=0.0, note="not finite on a side"
        )
    size = float(rms(x[usable])) or 1.0
    error = float(rms(x[usable].double() - y[usable].double())) / size
    unit = max(roundoff(x.dtype), roundoff(y.dtype))
    ratio = error / max(JUMP * worst, ROUNDING * unit)
    verdict = "diverged" if ratio > 1 else "within-rounding"
    return Measure(verdict=verdict, error_a=0.0, error_b=error, ratio=ratio)
