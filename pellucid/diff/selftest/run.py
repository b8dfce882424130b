"""Run every seeded fault on every subject and hold what the diff says against what is true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.diff.replay.statistics import roundoff
from pellucid.diff.report import Report
from pellucid.diff.selftest.catalogue import CONTROLS, FAULTS, encoded
from pellucid.diff.selftest.engine import Engine
from pellucid.diff.selftest.fault import Fault
from pellucid.diff.selftest.subjects import TEXT, Subject, random_gpt2, random_llama
from pellucid.diff.sides.side import Side, from_model
from pellucid.diff.stages import compare
from pellucid.models import build

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault on one model: what a perfect tool says, and what the diff said.

    shown   whether B's weights and config were visible, or only its tensors
    effect  relative error that the fault makes in its first tensor, from the float32 run
    """

    fault: str
    model: str
    dtype: str
    shown: bool
    control: bool
    verdict: str
    verdicts: tuple[str, ...]
    first: str
    found_first: str
    static: str
    found_static: tuple[str, ...]
    cause: str
    found_cause: str
    effect: float | None

    @property
    def detected(self) -> bool:
        """The diff says that something is wrong."""
        return self.verdict == "diverged"

    @property
    def located(self) -> bool:
        """The first tensor is the right one."""
        return self.found_first == self.first

    @property
    def misplaced(self) -> bool:
        """The first tensor is a wrong one."""
        return bool(self.found_first) and not self.located

    @property
    def named(self) -> bool:
        """The cause is the right one."""
        return self.located and self.found_cause == self.cause

    @property
    def static_right(self) -> bool:
        """The stages before the forward say what there is to say, and nothing else."""
        if not self.shown or self.control:
            return True
        return self.static in self.found_static if self.static else not self.found_static

    @property
    def below_rounding(self) -> bool:
        """The fault changes its tensor by less than one rounding of the dtype."""
        unit = roundoff(getattr(torch, self.dtype))
        return self.effect is not None and self.effect < unit

    @property
    def right(self) -> bool:
        """What a perfect tool says, as far as rounding lets it."""
        if self.control:
            return self.verdict in self.verdicts
        if self.located:
            return self.named and self.static_right
        hidden = not self.found_first and self.below_rounding
        return hidden and self.static_right and (self.detected or not (self.shown and self.static))


@dataclass(frozen=True)
class Table:
    """All rows, and the shares that the project promises."""

    rows: Sequence[Row]

    def summary(self) -> dict[str, float]:
        """Shares between 0 and 1; "fired" and "misplaced" count rows."""
        faults = [row for row in self.rows if not row.control]
        numbers: dict[str, float] = {}
        for dtype in dict.fromkeys(row.dtype for row in self.rows):
            here = [row for row in faults if row.dtype == dtype]
            located = [row for row in here if row.located]
            numbers[f"{dtype} faults"] = len(here)
            numbers[f"{dtype} detected"] = _share(row.detected for row in here)
            numbers[f"{dtype} located"] = _share(row.located for row in here)
            numbers[f"{dtype} misplaced"] = sum(row.misplaced for row in here)
            numbers[f"{dtype} cause right"] = _share(row.named for row in located)
            numbers[f"{dtype} static right"] = _share(row.static_right for row in here if row.shown)
        controls = [row for row in self.rows if row.control]
        numbers["controls"] = len(controls)
        numbers["controls fired"] = sum(not row.right for row in controls)
        return numbers


def _share(marks: Iterable[bool]) -> float:
    held = list(marks)
    return sum(held) / len(held) if held else 1.0


def run_benchmark(
    subjects: Sequence[Subject] | None = None,
    dtypes: Sequence[str] = DTYPES,
    faults: Sequence[Fault] = FAULTS,
    controls: Sequence[Fault] = CONTROLS,
    progress: Callable[[str], None] = lambda what: None,
) -> Table:
    """Every fault and control on every subject it applies to, in each dtype.

    Faults of weights and config, and controls, run twice: with B's weights and config to look at,
    and with nothing but the tensors that B computed. Without `subjects`, two random models, a
    Llama and a GPT-2.
    """
    rows: list[Row] = []
    for subject in subjects or (random_llama(), random_gpt2()):
        for fault in (*faults, *controls):
            if not applies(fault, subject):
                continue
            effects: dict[bool, float] = {}
            for dtype in dtypes:
                if dtype in (fault.side_dtype, *fault.not_in):
                    continue
                for shown in _views(fault, fault in controls):
                    progress(f"{subject.name}, {dtype}: {fault.name}")
                    report = run_fault(fault, subject, dtype, shown)
                    if (
                        dtype == "float32"
                        and report.first
                        and report.first.name == fault.first_of(subject.config)
                    ):
                        effects[shown] = report.first.measure.error_b
                    control = fault in controls
                    rows.append(_row(fault, subject, dtype, shown, control, report, effects))
    return Table(rows)


def run_healthy(
    subjects: Sequence[Subject],
    dtypes: Sequence[str] = DTYPES,
    runs: int = 20,
    progress: Callable[[str], None] = lambda what: None,
) -> Table:
    """Controls on random prompts: 1 to 60 tokens, 0 to 3 decoding steps, alone or padded.

    Every row must read as healthy; `runs` are made of each subject and dtype.
    """
    rows: list[Row] = []
    controls = [c for c in CONTROLS if not (c.side_dtype or c.visible_only)]
    for subject in subjects:
        fitting = [control for control in controls if applies(control, subject)]
        for dtype in dtypes:
            for seed in range(runs):
                control = fitting[seed % len(fitting)]
                progress(f"{subject.name}, {dtype}: {control.name}, {seed + 1} of {runs}")
                random = torch.Generator().manual_seed(seed)
                lengths = torch.randint(1, 61, (1 + 2 * (seed % 3 == 2),), generator=random)
                vocabulary = subject.config.vocab_size
                prompt = [
                    torch.randint(vocabulary, (n,), generator=random).tolist()
                    for n in lengths.tolist()
                ]
                steps = int(torch.randint(4, (1,), generator=random))
                drawn = replace(control, steps=steps)
                report = run_fault(drawn, subject, dtype, shown=False, rows=prompt)
                rows.append(_row(drawn, subject, dtype, False, True, report, {}))
    return Table(rows)


def _views(fault: Fault, control: bool) -> tuple[bool, ...]:
    """Whether to show B's weights and config: where they can tell, and where they do not."""
    if fault.visible_only or fault.encode:
        return (True,)
    return (True, False) if fault.static or control else (False,)


def applies(fault: Fault, subject: Subject) -> bool:
    """Whether a model can have a fault: its features, its layers, its tokenizer."""
    config = subject.config
    if not fault.applies(config):
        return False
    first = names.without_step(fault.first_of(config))
    if first and first != "tokens" and first not in graph.expand(config):
        return False  # a fault of the second layer, and there is one
    return fault.encode is None or subject.tokenizer is not None


def run_fault(
    fault: Fault,
    subject: Subject,
    dtype: str,
    shown: bool,
    rows: list[list[int]] | None = None,
) -> Report:
    """The diff of a healthy model of ours against the port with one fault.

    shown  whether B's weights and config can be looked at
    rows   token ids to run instead of the fault's own
    """
    held = getattr(torch, dtype)
    config, weights = subject.config, {n: x.to(held) for n, x in subject.weights.items()}
    if fault.with_config:
        config = fault.with_config(config)
    if fault.with_weights:
        fault.with_weights(weights, config)
    model = build(config)
    model.load_state_dict(weights, assign=True)
    tokenizer = subject.tokenizer
    a = from_model(
        model.eval(),
        "healthy",
        encode=(lambda text: encoded(tokenizer, text)) if tokenizer else None,
        bos_id=tokenizer.bos_id if tokenizer else None,
        specials=tokenizer.specials if tokenizer else None,
    )
    b = _port(fault, subject, config, weights, shown)
    if fault.encode:
        return compare(a, b, _text(tokenizer), steps=fault.steps)
    return compare(a, b, rows or subject.rows(fault.rows), steps=fault.steps)


def _text(tokenizer: Any) -> str:
    return TEXT[:120] + "".join(tokenizer.specials) + TEXT[120:]


def _port(
    fault: Fault, subject: Subject, config: Any, weights: dict[str, Tensor], shown: bool
) -> Side:
    """The port, broken as the fault says; without `shown` it hides its weights and config."""
    weights = dict(weights)
    if fault.config:
        config = fault.config(config)
    if fault.weights:
        fault.weights(weights, config)
    dtype = weights["embed.weight"].dtype
    if fault.side_dtype:
        dtype = getattr(torch, fault.side_dtype)
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    engine = Engine(config, weights, dtype, fault.port, copies=fault.copies, hides=fault.hides)
    tokenizer, encode = subject.tokenizer, fault.encode or encoded
    side = Side(
        label="port",
        dtype=dtype,
        config=config,
        weights=weights,
        run=engine.run,
        encode=(lambda text: encode(tokenizer, text)) if tokenizer else None,
        bos_id=tokenizer.bos_id if tokenizer else None,
        specials=tokenizer.specials if tokenizer else None,
    )
    return side if shown else replace(side, config=None, weights=None)


def _row(
    fault: Fault,
    subject: Subject,
    dtype: str,
    shown: bool,
    control: bool,
    report: Report,
    effects: dict[bool, float],
) -> Row:
    static = tuple(finding.cause for finding in report.static if finding.kind == "fault")
    tokens = [finding for finding in report.static if finding.stage == "tokens"]
    found_first = report.first.name if report.first else ""
    found_cause = report.cause.name if report.cause else ""
    if tokens:
        found_first, found_cause = tokens[0].name, tokens[0].cause
    return Row(
        fault=fault.name,
        model=subject.name,
        dtype=dtype,
        shown=shown,
        control=control,
        verdict=report.verdict,
        verdicts=fault.verdicts,
        first=fault.first_of(subject.config),
        found_first=found_first,
        static=fault.static or "",
        found_static=tuple(dict.fromkeys(static)),
        cause=fault.cause,
        found_cause=found_cause,
        effect=effects.get(shown),
    )
