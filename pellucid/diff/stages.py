"""The staged comparison: tokens, weights, constants, forward, cause, effect.

Every observed tensor is replayed from the side's own inputs (`ops`, `replay`), so an error does not
pile up with depth and one fault does not hide the next. R is side A's arithmetic at higher
precision; "within rounding" means as far from R as A's own arithmetic is on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.diff.effect import effect
from pellucid.diff.replay.judge import Judge, Keep
from pellucid.diff.replay.operations import SOURCES, Setting, leaf
from pellucid.diff.replay.pairwise import judge_pairs
from pellucid.diff.replay.statistics import Measure, beyond
from pellucid.diff.report import Fault, Report, SideFacts, TensorVerdict
from pellucid.diff.sides.side import Batch, Side, recorded_rows
from pellucid.diff.static import (
    Finding,
    constant_findings,
    shape_mismatch,
    token_findings,
    weight_findings,
)
from pellucid.prompts import padded
from pellucid.trace import Trace

MOST_FAULTS = 16  # causes are searched for so many diverged tensors, in order
Progress = Callable[[str], None]


def compare(
    a: Side,
    b: Side,
    prompt: str | Batch | None = None,
    *,
    steps: int = 0,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Report:
    """Hold two implementations of one model against each other.

    prompt  text, or rows of token ids (padded on the left); a trace file brings its own
    steps   decoding steps with the KV cache after the prompt, along A's greedy tokens
    keep    is given each judged tensor of B while it is at hand: name, R (between two recordings
            without weights: A), what was observed

    ValueError where there is nothing that can be compared, or the two are not one model.
    """
    mismatch = shape_mismatch(a, b)
    if mismatch:
        raise ValueError(mismatch)
    progress = progress or (lambda stage: None)
    progress("tokens")
    rows, static = _tokens(a, b, prompt)
    progress("weights")
    static += weight_findings(a, b)
    static += list(constant_findings(a, b, max(map(len, rows)) + steps))
    progress("forward")
    seen_a = a.observe(rows, steps)
    seen_b = b.observe(continued(rows, seen_a), steps) if steps else b.observe(rows, steps)
    _demand_overlap(a, b, seen_a, seen_b)
    owner = a if a.config is not None and a.weights is not None else b
    if owner.config is None or owner.weights is None:
        report = judge_pairs(a, b, seen_a, seen_b, static, keep)
    else:
        report = _forward(a, b, owner, rows, static, seen_a, seen_b, progress, keep)
    report.sides = SideFacts.of(a), SideFacts.of(b)
    if prompt is None or isinstance(prompt, str):
        report.encoded = all(_encoded(side, prompt) is not None for side in (a, b))
    return report


def continued(rows: Batch, seen: Trace) -> Batch:
    """Rows for B of a run over decoding steps; the tokens A chose travel in the trace."""
    chosen = [seen[name] for name in seen if names.step_of(name) and leaf(name) == "tokens"]
    return Continuation(rows, torch.cat(chosen, dim=1).tolist() if chosen else [])


class Continuation(list[Any]):
    """Rows, and the tokens that follow each of them one decoding step at a time."""

    def __init__(self, rows: Batch, following: list[list[int]]) -> None:
        super().__init__(list(row) for row in rows)
        self.following = following


def _tokens(a: Side, b: Side, prompt: str | Batch | None) -> tuple[Batch, list[Finding]]:
    """Rows to run, and what differs between the two tokenizers."""
    if prompt is None or isinstance(prompt, str):
        encoded = [_encoded(side, prompt) for side in (a, b)]
        ids_a, ids_b = encoded[0] or encoded[1], encoded[1] or encoded[0]
        if ids_a is None or ids_b is None:
            raise ValueError("neither side has a tokenizer or a recorded prompt: give token ids")
        if a.recorded is not None and b.recorded is not None and ids_a != ids_b:
            b.observe(ids_a, 0)  # says which tokens each of the two traces holds
        found = token_findings(ids_a[0], ids_b[0], a, b) if len(ids_a) == len(ids_b) == 1 else []
        return (ids_b if b.recorded is not None else ids_a), found
    return [list(row) for row in prompt], []


def _encoded(side: Side, prompt: str | None) -> Batch | None:
    if side.recorded is not None:
        return recorded_rows(side.recorded)
    if prompt is None or side.encode is None:
        return None
    return [side.encode(prompt)]


def _demand_overlap(a: Side, b: Side, seen_a: Trace, seen_b: Trace) -> None:
    if not any(graph.known(name) and leaf(name) not in SOURCES for name in seen_b):
        raise ValueError(f"{b.label} gave no tensor with a known name: nothing was compared")
    if not any(graph.known(name) and leaf(name) not in SOURCES for name in seen_a):
        raise ValueError(f"{a.label} gave no tensor with a known name: nothing was compared")


def _forward(
    a: Side,
    b: Side,
    owner: Side,
    rows: Batch,
    static: list[Finding],
    seen_a: Trace,
    seen_b: Trace,
    progress: Progress,
    keep: Keep | None,
) -> Report:
    assert owner.config is not None, "the owner of the arithmetic has a config"
    expected, padding = padded(rows)
    dialect = owner.dialect or b.dialect
    assert dialect is not None, "a side with weights says whose rounding it has"
    setting = Setting(config=owner.config, dialect=dialect, weights=owner.weight, dtype=owner.dtype)
    by_a, by_b = (declared_setting(a, setting, ()), declared_setting(b, setting, static))
    judges = {
        "b": Judge(b, seen_b, setting, padding, expected, declared=by_b, keep=keep, static=static),
        "a": Judge(a, seen_a, setting, padding, expected, declared=by_a),
    }
    order = _ordered_names(owner.config, seen_a, seen_b)
    verdicts: list[TensorVerdict] = []
    faults: list[Fault] = []
    for name in order:
        for which, judge in judges.items():
            if name not in judge.observed:
                continue
            result = judge.judge(name)
            if which == "b" and not faults:
                result = _broken_alone(result, seen_a.get(name))
            if which == "b":
                verdicts.append(TensorVerdict(name=name, measure=result))
            if result.verdict == "diverged":
                progress(f"cause of {name}")
                searched = len(faults) < MOST_FAULTS
                cause, tried = judge.cause(name, result, static) if searched else (None, ())
                faults.append(
                    Fault(name=name, side=which, measure=result, cause=cause, tried=tried)
                )
    _earlier(judges["b"], verdicts, faults)
    return Report(
        a=a.label,
        b=b.label,
        dtypes=(a.dtype, b.dtype),
        tokens=[list(row) for row in rows],
        static=static,
        tensors=verdicts,
        faults=faults,
        not_observed=[name for name in order if name not in judges["b"].observed],
        effect=effect(seen_a, seen_b, padding),
    )


def _earlier(judge: Judge, verdicts: list[TensorVerdict], faults: list[Fault]) -> None:
    """Put the first fault where it begins: its cause may explain the same tensor of a layer before.

    There it can be smaller than one rounding.
    """
    if not faults or faults[0].side != "b" or faults[0].cause is None:
        return
    later, cause = faults[0], faults[0].cause
    for place, verdict in enumerate(verdicts):
        if verdict.name == later.name:
            return
        if leaf(verdict.name) != leaf(later.name):
            continue
        found = judge.caused_too(verdict.name, verdict.measure, cause)
        if found is not None:
            measure, cause = found
            verdicts[place] = TensorVerdict(name=verdict.name, measure=measure)
            faults.insert(0, Fault(name=verdict.name, side="b", measure=measure, cause=cause))
            return


def _broken_alone(result: Measure, mine: Tensor | None) -> Measure:
    """What could not be judged for want of numbers, as a divergence where A does have numbers."""
    if result.verdict != "not-judged" or "not finite" not in result.note or mine is None:
        return result
    return beyond("not finite, where A's is") if bool(mine.isfinite().all()) else result


def declared_setting(side: Side, setting: Setting, static: Sequence[Finding]) -> Setting | None:
    """The arithmetic a side says it has, where that is not the setting's.

    Weights that the static stage explains (quantised, rounded, stored in another dtype) are taken
    as the side holds them.
    """
    explained = {
        finding.name
        for finding in static
        if finding.stage == "weights" and finding.kind == "explained"
    }

    def weights(name: str) -> Tensor | None:
        mine, theirs = setting.weights(name), side.weight(name) if name in explained else None
        return mine if theirs is None or mine is None or theirs.shape != mine.shape else theirs

    declared = replace(
        setting,
        dtype=side.dtype,
        dialect=side.dialect or setting.dialect,
        weights=weights if explained else setting.weights,
    )
    return None if declared == setting else declared


def _ordered_names(config: Any, seen_a: Trace, seen_b: Trace) -> list[str]:
    steps = {names.step_of(name) for seen in (seen_a, seen_b) for name in seen}
    plain = list(graph.expand(config))
    return [f"step.{step}.{name}" if step else name for step in sorted(steps) for name in plain]
