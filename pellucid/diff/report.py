"""What a diff found, as data: the terminal, JSON and the page all read this."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pellucid import names
from pellucid.diff.causes.search import Cause, Trial
from pellucid.diff.replay.statistics import Measure
from pellucid.diff.sides.side import Side
from pellucid.diff.static import Finding


@dataclass(frozen=True, kw_only=True)
class TensorVerdict:
    """One observed tensor of B and how it stands."""

    name: str
    measure: Measure

    def to_json(self) -> dict[str, Any]:
        """The schema's fields, and where the worst slice is."""
        return {
            "name": self.name,
            "verdict": self.measure.verdict,
            "error_a": finite(self.measure.error_a),
            "error_b": finite(self.measure.error_b),
            "ratio": finite(self.measure.ratio),
            "where": self.measure.where,
            "note": self.measure.note,
        }


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A diverged tensor whose inputs are as they should be, and what reproduces it."""

    name: str
    side: str  # "a" or "b"
    measure: Measure
    cause: Cause | None = None
    tried: tuple[Trial, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The schema's ``first``, the cause, and the replays tried."""
        return {
            "name": self.name,
            "step": names.step_of(self.name),
            "side": self.side,
            "error_a": finite(self.measure.error_a),
            "error_b": finite(self.measure.error_b),
            "ratio": finite(self.measure.ratio),
            "where": self.measure.where,
            "note": self.measure.note,
            "cause": self.cause.to_json() if self.cause else None,
            "tried": [trial.to_json() for trial in self.tried],
        }


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What it does to the next token: KL(A ‖ B) in nats, share of positions with equal top-1."""

    kl_mean: float
    kl_max: float
    top1: float

    def to_json(self) -> dict[str, float | None]:
        """The schema's three numbers."""
        return {
            "kl_mean": finite(self.kl_mean),
            "kl_max": finite(self.kl_max),
            "top1": finite(self.top1),
        }


@dataclass(frozen=True, kw_only=True)
class SideFacts:
    """What was compared: None for what a side cannot say (a recording, a foreign engine).

    parameters  how many weight tensors it holds
    """

    label: str
    dtype: str
    dialect: str | None
    family: str | None
    n_layers: int | None
    width: int | None
    parameters: int | None
    recorded: bool
    explained: str

    @classmethod
    def of(cls, side: Side) -> SideFacts:
        """The facts of a side."""
        return cls(
            label=side.label,
            dtype=str(side.dtype).removeprefix("torch."),
            dialect=side.dialect.name if side.dialect else None,
            family=getattr(side.config, "family", None),
            n_layers=getattr(side.config, "n_layers", None),
            width=getattr(side.config, "width", None),
            parameters=None if side.weights is None else len(side.weights),
            recorded=side.recorded is not None,
            explained=side.explained,
        )


@dataclass(kw_only=True)
class Report:
    """The whole comparison. `verdict` and `exit_status` follow from the parts.

    encoded  whether both sides turned the prompt into tokens, so that these could be compared
    """

    a: str
    b: str
    dtypes: tuple[torch.dtype, torch.dtype]
    tokens: list[list[int]]
    static: list[Finding] = field(default_factory=list)
    tensors: list[TensorVerdict] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    not_observed: list[str] = field(default_factory=list)
    effect: Effect | None = None
    note: str = ""
    sides: tuple[SideFacts, ...] = ()
    encoded: bool = False

    @property
    def first(self) -> Fault | None:
        """The earliest divergence."""
        return self.faults[0] if self.faults else None

    @property
    def cause(self) -> Cause | None:
        """Cause of the first divergence."""
        return self.first.cause if self.first else None

    @property
    def verdict(self) -> str:
        """identical, within-rounding, explained or diverged; the worst of all parts decides."""
        if self.faults or any(finding.kind == "fault" for finding in self.static):
            return "diverged"
        held = {row.measure.verdict for row in self.tensors}
        if self.static or "explained" in held:
            return "explained"
        return "within-rounding" if held - {"identical"} else "identical"

    @property
    def exit_status(self) -> int:
        """As diff(1): 0 the same, 1 diverged."""
        return 1 if self.verdict == "diverged" else 0

    def __repr__(self) -> str:
        """The summary; ``print(report)`` gives the whole report."""
        return f"{type(self).__name__}({self.summary()})"

    def __str__(self) -> str:
        """The report as the command line prints it."""
        import pellucid  # the front door: what shows a report stands above it

        return pellucid.report_as_text(self)

    def _repr_html_(self) -> str:
        """The report as a page, which notebooks show."""
        import pellucid

        return pellucid.report_as_html(self)

    def summary(self) -> str:
        """One line: the verdict, the first divergence and its cause."""
        if self.first is None:
            faults = [finding for finding in self.static if finding.kind == "fault"]
            found = f": {faults[0].name}, {faults[0].finding}" if faults else ""
            return f"{self.a} and {self.b}: {self.verdict}{found}"
        where = f" at {self.first.measure.where}" if self.first.measure.where else ""
        why = f"{self.cause.name} ({self.cause.evidence})" if self.cause else "no known cause fits"
        held = self.first.measure
        return (
            f"{self.a} and {self.b} diverge first at {self.first.name}{where}: "
            f"error {held.error_b:.2g} against {held.error_a:.2g}; {why}"
        )

    def to_json(self) -> dict[str, Any]:
        """The object that ``pellucid diff --json`` prints, with the sides named."""
        return {
            "a": self.a,
            "b": self.b,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.dtypes],
            "tokens": self.tokens,
            "verdict": self.verdict,
            "static": [finding.to_json() for finding in self.static],
            "first": self.first.to_json() if self.first else None,
            "cause": self.cause.to_json() if self.cause else None,
            "faults": [fault.to_json() for fault in self.faults],
            "tensors": [row.to_json() for row in self.tensors],
            "not_observed": self.not_observed,
            "effect": self.effect.to_json() if self.effect else None,
            "note": self.note,
            "sides": [asdict(side) for side in self.sides],
            "encoded": self.encoded,
        }


def finite(number: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return number if math.isfinite(number) else None
