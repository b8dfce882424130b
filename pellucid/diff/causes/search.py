"""Why a tensor diverged: not guessed, replayed until one hypothesis gives the observed values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pellucid.diff.causes.anywhere import overflowed
from pellucid.diff.causes.hypothesis import Hypothesis, in_setting, parameters, with_weights
from pellucid.diff.causes.table import hypotheses
from pellucid.diff.replay.bits import Bits, telling, tells
from pellucid.diff.replay.operations import SOURCES, leaf
from pellucid.diff.replay.replay import Replay, rows_seen
from pellucid.diff.replay.statistics import MASKED, Measure, beyond, equal, rms
from pellucid.diff.sides.side import Side
from pellucid.diff.static import Finding

BETTER = 1.3  # by how much a later hypothesis must fit better than an earlier, likelier one
ACCURATE = 0.1  # error of a hypothesis' own arithmetic beyond which it says nothing
MOST_TRIED = 1000  # hypotheses, of which none may fit by chance
ENOUGH = 1000  # values whose error falls by a quarter only if the cause is there
HOPELESS = 1e4  # in units of the last place: no operation is off by so much through rounding


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
    hypothesis: Hypothesis | None = field(default=None, repr=False, compare=False)

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
    bits: Bits | None = None,
) -> tuple[Cause | None, tuple[Trial, ...]]:
    """The hypothesis that gives `observed` within rounding, or None; and all that were tried.

    other  the side that diverged: its own weights and config are the first hypotheses, since what
           the static stages found is the likeliest reason
    bits   of a tensor that only its bits accuse: the hypothesis whose bits B has
    """
    if bits is not None:
        ordered = _ordered(replay, name, observed, other, findings)
        return _by_bits(replay, name, observed, ordered, bits)
    tried: list[Trial] = []
    best: tuple[float, Hypothesis] | None = None
    for hypothesis in _ordered(replay, name, observed, other, findings):
        result = _trial(replay, name, observed, hypothesis)
        fits = result is not None and _explains(result, before)
        tried.append(_told(hypothesis, result, fits))
        if result is None or not fits:
            continue
        if best is None or result.error_b < best[0] / BETTER:
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
    return _found(chosen, evidence, error, tried), tuple(tried)


def _by_bits(
    replay: Replay, name: str, observed: Tensor, ordered: Iterator[Hypothesis], bits: Bits
) -> tuple[Cause | None, tuple[Trial, ...]]:
    """The hypothesis with the most of B's bits, where it has far more of them than A has."""
    wide = Replay(replay.observed, replay.setting.wide(), replay.starts)
    seen = replay.real_tokens(name, observed)
    tried: list[Trial] = []
    before = int((~bits.own & bits.counted).sum())
    best: tuple[int, int, Hypothesis] | None = None
    for hypothesis in ordered:
        try:
            near, exact = (
                replay.real_tokens(name, rows_seen(name, hypothesis.compute(r, name), observed))
                for r in (replay, wide)
            )
            gained, lost, left = telling(bits, seen[..., : near.shape[-1]], near, exact)
        except (RuntimeError, KeyError, IndexError, ValueError):
            tried.append(_told(hypothesis, None, False))
            continue
        error = _difference(exact, observed)
        fits = left + lost <= before / 4 and (bits.alone or tells(gained, lost, MOST_TRIED))
        trial = replace(_told(hypothesis, None, fits), error=error)
        tried.append(trial)
        if fits and (best is None or left + lost < best[0] / BETTER):
            best = (left + lost, gained, hypothesis)
            if not left + lost or hypothesis.cause.startswith("B's own"):
                break
    if best is None:
        return None, tuple(tried)
    left, gained, chosen = best
    evidence = (
        f"{chosen.evidence}: of the values for which it and A's arithmetic differ, {gained:,} have "
        f"its bits; {before:,} values are not A's, {left:,} not its"
    )
    error = next(t.error for t in tried if t.evidence == chosen.evidence and t.fits) or 0.0
    return _found(chosen, evidence, error, tried), tuple(tried)


def _found(chosen: Hypothesis, evidence: str, error: float, tried: Sequence[Trial]) -> Cause:
    count = len(tried)
    return Cause(name=chosen.cause, evidence=evidence, error=error, tried=count, hypothesis=chosen)


def explains_earlier(replay: Replay, name: str, observed: Tensor, cause: Cause) -> str:
    """How the cause of a later tensor explains one that is within rounding by its size, or "".

    A config is wrong in all layers. Where a right implementation only rounds, a change that it does
    not have adds to the squared error; where a quarter of it goes, the change is there.
    """
    if cause.hypothesis is None or observed.numel() < ENOUGH:
        return ""
    wide = Replay(replay.observed, replay.setting.wide(), replay.starts)
    try:
        seen = replay.real_tokens(name, observed)
        exact = replay.real_tokens(name, rows_seen(name, wide.compute(name), observed))
        other = cause.hypothesis.compute(wide, name)
        other = replay.real_tokens(name, rows_seen(name, other, observed))
        before, after = _difference(exact, seen), _difference(other, seen)
    except (RuntimeError, KeyError, IndexError, ValueError):
        return ""
    if not after**2 < 0.75 * before**2:
        return ""
    said = cause.hypothesis.evidence
    return f"{said}: its error falls from {before:.2g} to {after:.2g}"


def _explains(result: Measure, before: Measure) -> bool:
    """Whether the hypothesis gives the observation, by a real fall of the error.

    Its own arithmetic must be accurate (within 10 % of its reference: one that overflows itself
    allows everything), and the error smaller than without it, or in the worst slice half.
    """
    if result.verdict not in ("identical", "within-rounding"):
        return False
    if not result.error_a <= ACCURATE or not math.isfinite(result.error_b):
        return False
    return result.error_b < before.error_b or result.ratio < before.ratio / 2


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
    read = parameters(replay.setting, name)
    if not any(f.kind == "fault" and (f.stage == "constants" or f.name in read) for f in findings):
        yield from overflowed(replay, name, observed)
    yield from _from_findings(replay, name, other, findings)
    yield from _as_far_as_possible(hypotheses(replay, name, observed))


def _as_far_as_possible(found: Iterator[Hypothesis]) -> Iterator[Hypothesis]:
    """The hypotheses up to one that cannot even be written down for these shapes."""
    while True:
        try:
            hypothesis = next(found)
        except (StopIteration, RuntimeError, IndexError, KeyError, ValueError, ZeroDivisionError):
            return
        yield hypothesis


def _from_findings(
    replay: Replay, name: str, other: Side, findings: Sequence[Finding]
) -> Iterator[Hypothesis]:
    """What the weights and constants stages found: all parameters of the operation, the config."""
    exchanged: dict[str, Tensor] = {}
    found: list[Finding] = []
    for parameter in parameters(replay.setting, name):
        here = [f for f in findings if f.stage == "weights" and f.name == parameter]
        mine, theirs = replay.setting.weights(parameter), other.weight(parameter)
        if here and mine is not None:
            exchanged[parameter] = torch.zeros_like(mine) if theirs is None else theirs
            found += here
    if found:
        found.sort(key=lambda finding: finding.kind != "fault")
        evidence = "; ".join(f"{finding.name}: {finding.finding}" for finding in found)
        own = in_setting(lambda s: with_weights(s, exchanged))
        yield Hypothesis(found[0].cause, evidence, own)
    constants = [finding for finding in findings if finding.stage == "constants"]
    if constants and other.config is not None:
        evidence = "; ".join(f"{finding.name}: {finding.finding}" for finding in constants)

        def changed(r: Replay, n: str) -> Tensor:  # also in what was not observed
            setting = replace(r.setting, config=other.config)
            return Replay(r.observed, setting, r.starts).compute(n)

        fields = [finding.name for finding in constants]
        both = "rope.theta" in fields and "rope.type" in fields
        yield Hypothesis(
            "RoPE theta and scaling" if both else constants[0].cause, evidence, changed
        )
        if found:
            both = in_setting(lambda s: replace(with_weights(s, exchanged), config=other.config))
            evidence = "; ".join(f"{f.name}: {f.finding}" for f in (*found, *constants))
            yield Hypothesis(f"{found[0].cause} and {constants[0].cause}", evidence, both)


def _trial(replay: Replay, name: str, observed: Tensor, hypothesis: Hypothesis) -> Measure | None:
    """The hypothesis in the run's arithmetic and in the reference's, with the observation."""
    wide = Replay(replay.observed, replay.setting.wide(), replay.starts)
    try:
        near = rows_seen(name, hypothesis.compute(replay, name), observed)
        if leaf(name) in SOURCES:
            same = bool((observed == near).all())
            return equal() if same else beyond("other values")
        rough = _difference(near, observed)
        limit = min(0.5, HOPELESS * torch.finfo(replay.setting.dtype).eps)
        if limit < rough < math.inf:
            return beyond("far off", error_b=rough)
        exact = rows_seen(name, hypothesis.compute(wide, name), observed)
        if observed.isfinite().all() and not near.isfinite().any():
            return None
        exact, near = _finite_where(observed, exact, near)
        return replay.hold(name, exact, near, observed, observed.dtype)
    except (RuntimeError, KeyError, IndexError, ValueError):
        return None  # the hypothesis does not fit these shapes


def _difference(near: Tensor, observed: Tensor) -> float:
    """Relative RMS difference, scores that both switch off left out; NaN where not finite."""
    near, seen = near.double(), observed[..., : near.shape[-1]].double()
    if near.shape == seen.shape:
        off = (near <= MASKED) & (seen <= MASKED)
        near, seen = torch.where(off, 0.0, near), torch.where(off, 0.0, seen)
    return float(rms(near - seen) / rms(seen))


def _finite_where(observed: Tensor, exact: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """R and its neighbour, taken as observed where both overflow alike."""
    alike = ~observed.isfinite() & ~near.isfinite()
    return torch.where(alike, observed, exact), torch.where(alike, observed, near)
