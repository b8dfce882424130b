"""Two recordings of a training step held against each other: forward, gradients, and the update.

Each side is judged by what it should have computed from its own weights, its own gradients and its
own means of AdamW, in float64 (R) and once more in the run's own precision, which says how much of
a difference is rounding. So a fault in one stage does not hide one in the next:

    batch, weights, settings     must be the same on both sides
    forward → loss → gradients   R: our model on the side's weights and A's batch
    clipped                      R: the side's gradients, as long as A's optimiser gets them
    after                        R: AdamW with A's settings on the side's clipped gradients
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pellucid import graph
from pellucid.diff.causes.search import Cause
from pellucid.diff.effect import effect
from pellucid.diff.replay.statistics import Measure, beyond, explained_error, measure, not_judged
from pellucid.diff.report import Fault, Report, SideFacts, TensorVerdict
from pellucid.diff.static import Finding
from pellucid.diff.training.causes import clip_cause, gradient_cause, loss_cause, update_cause
from pellucid.diff.training.replay import (
    adamw_step,
    autocast_of,
    clip_factor,
    config_of,
    found,
    group_of,
    parameters_of,
    replay,
    taken,
)
from pellucid.models.description import describe
from pellucid.step_recording import AFTER, CLIPPED, GRADIENT, KIND, SETTINGS
from pellucid.trace import Trace

_TRACED_INPUTS = ("tokens", "positions", "mask", "rope.cos", "rope.sin")


class StepReport(Report):
    """A report on one step, whose verdict is on what was done in it, not on the weights before."""

    @property
    def verdict(self) -> str:
        """identical, within-rounding or diverged."""
        held = super().verdict
        return "within-rounding" if held == "explained" else held


def is_step(seen: Trace) -> bool:
    """Whether a recording is one of a training step."""
    return seen.meta.get("recording") == KIND


def compare_steps(a: Trace, b: Trace, labels: tuple[str, str] = ("A", "B")) -> Report:
    """The report on two recorded steps of one model; A's batch and settings are what was meant.

    ValueError where a side is no recorded step, holds no batch, or not all parameters.
    """
    for seen, label in zip((a, b), labels, strict=True):
        _demand_whole(seen, label)
    if parameters_of(config_of(a)) != parameters_of(config_of(b)):
        raise ValueError(f"{labels[0]} and {labels[1]} are steps of models with other parameters")
    report = StepReport(
        a=labels[0],
        b=labels[1],
        dtypes=(_dtype(a), _dtype(b)),
        tokens=a["batch.inputs"].tolist(),
        effect=effect(a, b, None),
        static=[*_batch(a, b), *_weights(a, b), *_settings(a, b)],
        sides=(_facts(a, labels[0]), _facts(b, labels[1])),
    )
    for side, seen in (("a", a), ("b", b)):
        rows = list(_judged(a, seen))
        _add_faults(report, side, a, seen, rows)
        if side == "b":
            report.tensors = [
                TensorVerdict(name=name, measure=_between(a, b, name, held)) for name, held in rows
            ]
            there = set(seen)
            report.not_observed = [n for n in a if n not in there and not _optional(n)]
    return report


def _between(a: Trace, b: Trace, name: str, held: Measure) -> Measure:
    """The verdict on B, which is identical where A has the same bits, not where a replay has."""
    if held.verdict not in ("identical", "within-rounding") or name not in a:
        return held
    same = a[name].shape == b[name].shape and bool(torch.equal(a[name], b[name]))
    return replace(held, verdict="identical" if same else "within-rounding")


def _demand_whole(seen: Trace, label: str) -> None:
    if not is_step(seen):
        raise ValueError(f"{label} is no recorded training step: record one with record_step")
    missing = [n for n in ("batch.inputs", "batch.targets", "loss") if n not in seen]
    missing += [n for n in parameters_of(config_of(seen)) if n not in seen or AFTER + n not in seen]
    if missing:
        raise ValueError(
            f"{label} does not hold {missing[0]}: a step is compared with its whole batch and all "
            "parameters before and after it (train --trace-tensors without --only)"
        )


def _optional(name: str) -> bool:
    return name.startswith(CLIPPED) or name in _TRACED_INPUTS


# ── Before anything is computed ──────────────────────────────────────────────────────────────────


def _batch(a: Trace, b: Trace) -> Iterator[Finding]:
    for name in ("batch.inputs", "batch.targets"):
        if torch.equal(a[name], b[name]):
            continue
        said = f"shape {tuple(b[name].shape)}, A has {tuple(a[name].shape)}"
        if a[name].shape == b[name].shape:
            wrong = a[name] != b[name]
            row, token = wrong.nonzero()[0].tolist()
            said = f"{int(wrong.sum()):,} differ, the first in row {row} at token {token}"
        yield Finding(stage="tokens", name=name, finding=said, cause="another batch")


def _weights(a: Trace, b: Trace) -> Iterator[Finding]:
    """Weights that differ before the step: no fault after the first, rounding alone does it."""
    later = bool(a.meta.get("optimizer_steps"))
    cause = "earlier steps went apart, each side is judged on its own" if later else "other weights"
    for name in parameters_of(config_of(a)):
        if a[name].shape != b[name].shape:
            said = f"shape {tuple(b[name].shape)}, A has {tuple(a[name].shape)}"
            yield Finding(stage="weights", name=name, finding=said, cause="other weights")
        elif not torch.equal(a[name], b[name]):
            most = float((a[name].double() - b[name].double()).abs().max())
            said = f"differs by up to {most:.2g} before the step"
            kind = "explained" if later else "fault"
            yield Finding(stage="weights", name=name, finding=said, cause=cause, kind=kind)


def _settings(a: Trace, b: Trace) -> Iterator[Finding]:
    for key in SETTINGS:
        for name in parameters_of(config_of(a)):
            mine, theirs = group_of(a, name).get(key), group_of(b, name).get(key)
            if mine is not None and theirs is not None and mine != theirs:
                said = f"{theirs} against {mine} of A, for {name}"
                yield Finding(stage="constants", name=key, finding=said, cause=f"another {key}")
                break
    ours, others = describe(config_of(a)), describe(config_of(b))
    for key in ours:
        if ours[key] != others[key]:
            said = f"{others[key]} against {ours[key]} of A"
            yield Finding(stage="constants", name=key, finding=said, cause="another config")
    mine, theirs = a.meta.get("optimizer_steps"), b.meta.get("optimizer_steps")
    if mine != theirs:
        said = f"A's optimiser had taken {mine} steps, B's {theirs}"
        yield Finding(stage="constants", name="steps", finding=said, cause="another step")


def _dtype(seen: Trace) -> torch.dtype:
    return seen["embed.weight"].dtype


def _facts(seen: Trace, label: str) -> SideFacts:
    config = config_of(seen)
    return SideFacts(
        label=label,
        dtype=str(_dtype(seen)).removeprefix("torch."),
        dialect=seen.meta.get("dialect"),
        family=config.family,
        n_layers=config.n_layers,
        width=config.width,
        parameters=len(parameters_of(config)),
        recorded=True,
        explained="",
    )


# ── What was computed ────────────────────────────────────────────────────────────────────────────


def _judged(a: Trace, seen: Trace) -> Iterator[tuple[str, Measure]]:
    """(name, verdict) of everything one side recorded, in the order in which it comes about."""
    exact = replay(seen, a, torch.float64)
    again = cache(lambda fused: replay(seen, a, _dtype(seen), fused=fused))
    unit, parameters = _unit(a), set(parameters_of(config_of(a)))
    for name in exact:
        if name not in seen and name in a and name.removeprefix(GRADIENT) in parameters:
            yield name, beyond("no gradient arrived")
        if name in seen and name not in _TRACED_INPUTS:
            yield name, _held(name, exact, again, seen, unit)
    yield from _judged_clip(a, seen)
    yield from _judged_update(a, seen)


def _unit(a: Trace) -> float:
    """What rounding may add up to along a chain of operations, each like a random number."""
    config, dtype = config_of(a), autocast_of(a) or _dtype(a)
    inner = max(config.width, config.hidden_width, a["batch.inputs"].numel())
    return explained_error(dtype, inner) * (4 * config.n_layers) ** 0.5


def _held(
    name: str, exact: Trace, again: Callable[[bool], Trace], seen: Trace, unit: float
) -> Measure:
    """The kinder verdict of two, for two ways of attention; `again` replays with or without fused.

    The second is asked only where the first does not explain what was observed.
    """
    observed, plain = seen[name], name.removeprefix(GRADIENT)
    whole = not (graph.known(plain) and graph.has_batch(plain))

    def part(tensor: Tensor) -> Tensor:
        return tensor if whole else tensor[: len(observed)]  # the rows of one pass

    r = part(exact[name])
    if observed.shape != r.shape:
        return beyond(f"shape {tuple(observed.shape)}, expected {tuple(r.shape)}")
    masked = name.endswith("masked_scores") and not name.startswith(GRADIENT)
    best = not_judged("our own arithmetic does not have it")
    for fused in (True, False):
        near = found(again(fused), name)
        if near is None:
            continue
        held = _measure(name, r, part(near).to(r), observed.to(r), unit, masked)
        if best.verdict == "not-judged" or held.ratio < best.ratio:
            best = held
        if best.verdict != "diverged":
            break
    return best


def _measure(
    name: str, r: Tensor, near: Tensor, observed: Tensor, unit: float, masked: bool = False
) -> Measure:
    """`measure`, with a vector or a number as the only row of a matrix."""
    if r.ndim < 2:
        r, near, observed = (x.reshape(1, -1) for x in (r, near, observed))
        return measure(r, near, observed, ("B", "column"), unit)
    return measure(r, near, observed, _dims(name, r), unit, masked=masked)


def _dims(name: str, tensor: Tensor) -> tuple[str, ...]:
    plain = name.removeprefix(GRADIENT)
    if graph.known(plain) and len(graph.dims(plain)) == tensor.ndim:
        return graph.dims(plain)
    return ("row", "column")[: tensor.ndim]


def _judged_clip(a: Trace, seen: Trace) -> Iterator[tuple[str, Measure]]:
    factor = clip_factor(a, seen)
    for name in reversed(parameters_of(config_of(a))):
        raw = found(seen, GRADIENT + name)
        if raw is None or (factor == 1 and CLIPPED + name not in seen):
            continue
        exact, near = raw.double() * factor, (raw * factor).double()
        unit = 16 * explained_error(raw.dtype, 1)  # of the length of the whole gradient
        yield CLIPPED + name, _measure(name, exact, near, taken(seen, name).double(), unit)


def _judged_update(a: Trace, seen: Trace) -> Iterator[tuple[str, Measure]]:
    for name in parameters_of(config_of(a)):
        if GRADIENT + name not in seen and CLIPPED + name not in seen:
            continue
        before = seen[name].double()
        exact = adamw_step(a, seen, name, torch.float64)
        near = adamw_step(a, seen, name, seen[name].dtype)
        if exact is None or near is None:
            yield AFTER + name, not_judged("AdamW's means before this step were not recorded")
            continue
        moved = (exact - before, near.double() - before, seen[AFTER + name].double() - before)
        # The parameter is stored again, which rounds by its own size, not the update's.
        sizes = before.abs().max() / moved[0].square().mean().sqrt().clamp(min=1e-300)
        unit = explained_error(seen[name].dtype, 16) * max(1.0, float(sizes))
        r, own, observed = moved
        yield AFTER + name, _measure(name, r, own, observed, unit)


# ── Faults and causes ────────────────────────────────────────────────────────────────────────────


def _add_faults(
    report: Report, side: str, a: Trace, seen: Trace, rows: list[tuple[str, Measure]]
) -> None:
    """The first divergence of each of the three stages that are judged on inputs of their own."""
    for stage in (_is_pass, _is_clip, _is_update):
        wrong = [(name, held) for name, held in rows if stage(name) and held.verdict == "diverged"]
        if wrong:
            name, held = wrong[0]
            cause = _cause(a, seen, [each for each, _ in wrong], stage)
            report.faults.append(Fault(name=name, side=side, measure=held, cause=cause))


def _is_clip(name: str) -> bool:
    return name.startswith(CLIPPED)


def _is_update(name: str) -> bool:
    return name.startswith(AFTER)


def _is_pass(name: str) -> bool:
    return not (_is_clip(name) or _is_update(name))


def _cause(a: Trace, seen: Trace, wrong: list[str], stage: Any) -> Cause | None:
    if stage is _is_clip:
        return clip_cause(a, seen, clip_factor(a, seen))
    if stage is _is_update:
        return update_cause(a, seen, wrong)
    if wrong[0] == "loss":
        return loss_cause(a, seen)
    return gradient_cause(a, seen) if wrong[0].startswith(GRADIENT) else None
