"""Why a tensor diverged: not guessed, replayed until one hypothesis gives the observed values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pellucid import names
from pellucid.compare.ops import leaf
from pellucid.compare.replay import Replay
from pellucid.compare.sides import Side
from pellucid.compare.static import Finding
from pellucid.compare.statistics import Measure, measure
from pellucid.compare.wrong import hypotheses
from pellucid.compare.wrong.base import Hypothesis, in_setting, parameters, with_weight

_BESIDE = ("attn.k_rotated", "attn.k", "attn.v")  # replayed with keys of all steps


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One hypothesis replayed: how far its values are from those observed, and whether it fits."""

    cause: str
    evidence: str
    error: float | None  # None: does not apply to these shapes
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """All four fields; an infinite error has no number in JSON."""
        known = self.error is not None and math.isfinite(self.error)
        return {
            "cause": self.cause,
            "evidence": self.evidence,
            "error": self.error if known else None,
            "fits": self.fits,
        }


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What reproduces the observed values, and how well: error before and after, tried in all."""

    name: str
    evidence: str
    error: float
    tried: int

    def to_json(self) -> dict[str, str]:
        """The schema's two fields."""
        return {"name": self.name, "evidence": self.evidence}


def find_cause(
    replay: Replay,
    name: str,
    observed: Tensor,
    before: Measure,
    other: Side,
    findings: Sequence[Finding],
) -> tuple[Cause | None, tuple[Trial, ...]]:
    """The hypothesis that gives `observed` within rounding, or None; and all that were tried.

    `other` is the side that diverged: its own weights and config are the first hypotheses, since
    what the static stages found is the likeliest reason.
    """
    tried: list[Trial] = []
    best: tuple[float, Hypothesis] | None = None
    for hypothesis in _ordered(replay, name, observed, other, findings):
        result = _trial(replay, name, observed, hypothesis)
        fits = result is not None and result.verdict in ("identical", "within-rounding")
        tried.append(_told(hypothesis, result, fits))
        if result is None or not fits:
            continue
        if best is None or result.error_b < best[0] / 4:
            best = (result.error_b, hypothesis)
        if result.verdict == "identical" or hypothesis.cause.startswith("B's own"):
            break
    if best is None:
        return None, tuple(tried)
    error, chosen = best
    evidence = (
        f"{chosen.evidence}: replayed, the error of {name} falls from {before.error_b:.2g} "
        f"to {error:.2g}"
    )
    cause = Cause(name=chosen.cause, evidence=evidence, error=error, tried=len(tried))
    return cause, tuple(tried)


def _told(hypothesis: Hypothesis, result: Measure | None, fits: bool) -> Trial:
    return Trial(
        cause=hypothesis.cause,
        evidence=hypothesis.evidence,
        error=None if result is None else result.error_b,
        fits=fits,
    )


def _ordered(
    replay: Replay, name: str, observed: Tensor, other: Side, findings: Sequence[Finding]
) -> Iterator[Hypothesis]:
    yield from _from_findings(replay, name, other, findings)
    yield from hypotheses(replay, name, observed)


def _from_findings(
    replay: Replay, name: str, other: Side, findings: Sequence[Finding]
) -> Iterator[Hypothesis]:
    """The differences that the weights and constants stages found, one by one."""
    for finding in findings:
        if finding.stage == "weights" and finding.name in parameters(replay.setting, name):
            theirs = other.weight(finding.name)
            if theirs is not None and theirs.shape == _shape(replay, finding.name):
                exchanged = in_setting(
                    lambda s, n=finding.name, t=theirs: with_weight(s, n, t.to(s.dtype))
                )
                yield Hypothesis(finding.cause, f"{finding.name}: {finding.finding}", exchanged)
        if finding.stage == "constants" and other.config is not None:
            changed = in_setting(lambda s: replace(s, config=other.config))
            yield Hypothesis(finding.cause, f"{finding.name}: {finding.finding}", changed)


def _shape(replay: Replay, name: str) -> torch.Size | None:
    tensor = replay.setting.weights(name)
    return None if tensor is None else tensor.shape


def _trial(replay: Replay, name: str, observed: Tensor, hypothesis: Hypothesis) -> Measure | None:
    """The hypothesis in the run's arithmetic and in the reference's, with the observation."""
    wide = Replay(replay.observed, replay.setting.wide(), replay.left_padding)
    try:
        near = hypothesis.compute(replay, name)
        exact = hypothesis.compute(wide, name)
    except (RuntimeError, KeyError, IndexError):
        return None  # the hypothesis does not fit these shapes
    if leaf(name) in ("positions", "mask"):
        same = observed.shape == near.shape and torch.equal(observed, near.to(observed.dtype))
        verdict = "identical" if same else "diverged"
        return Measure(verdict=verdict, error_a=0.0, error_b=0.0 if same else 1.0, ratio=0.0)
    observed = observed[..., : near.shape[-1]]
    if near.shape != observed.shape or not near.isfinite().any():
        return None
    unit = replay.explained_error(name, observed.dtype)
    return measure(exact, near, observed, names.dims(name), unit)
