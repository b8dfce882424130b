"""See training with the same names: what chosen tensors do at every N-th step, over a whole run.

    RUN/trace.csv                        a line for every watched tensor at every watched step
    RUN/trace.png                        the same as lines over the steps
    RUN/traces/step-00000100.safetensors whole tensors, where asked for (see `training_step`)

A watched step computes what it would have computed: the forward pass of its first rows is traced
with the attention kernel that training uses, and everything else is read when it is there anyway.
Blocks that are compiled run as they are written for that one pass, which may round differently.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from pellucid import graph
from pellucid import step_recording as training_step
from pellucid.models import Model
from pellucid.models.description import describe
from pellucid.trace import Trace, trace
from pellucid.train.data.batches import IGNORED, Batch
from pellucid.train.objective import document_starts

TABLE, FOLDER = "trace.csv", "traces"
COLUMNS = (
    "step", "name", "kind", "mean", "std", "rms", "min", "max", "zeros", "gradient_norm",
    "update_ratio",
)  # fmt: skip
_ONLY_NAMED = ("attn.scores", "attn.masked_scores", "attn.pattern")  # inside the fused kernel


def watchable(model: Model, *, logits: bool) -> tuple[list[str], list[str]]:
    """Names that a training step has: (activations, parameters).

    `logits`: whether the loss makes all logits at once; else no such tensor ever exists.
    """
    fused = model.dialect.fusible
    activations = [
        name
        for name in graph.expand(model.config)
        if (logits or name != "logits") and not (fused and name.endswith(_ONLY_NAMED))
    ]
    return activations, [name for name, _ in model.named_parameters()]


def check_only(model: Model, only: list[str], *, logits: bool) -> None:
    """ValueError for a glob that no tensor of a training step has the name of."""
    known = [name for group in watchable(model, logits=logits) for name in group]
    for glob in only:
        if any(fnmatchcase(name, glob) for name in known):
            continue
        reason = "names look like layers.0.attn.q and embed.weight"
        if glob.endswith("logits"):
            reason = "the chunked loss never holds logits; --loss plain does"
        elif any(fnmatchcase(name, glob) for name in graph.expand(model.config)):
            reason = "the fused attention kernel of training shows q, k, v and z only"
        raise ValueError(f"--only {glob}: no tensor of a training step is called so ({reason})")


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Statistics of one tensor at one step; NaN where a column says nothing about it.

    zeros          share of values that are exactly 0
    gradient_norm  Euclidean norm of the loss's gradient at it: for an activation of the rows that
                   were traced, for a parameter of the whole batch, before clipping
    update_ratio   RMS of what the step adds to a parameter / RMS of the parameter before
    """

    step: int
    name: str
    kind: str
    mean: float
    std: float
    rms: float
    min: float
    max: float
    zeros: float
    gradient_norm: float = math.nan
    update_ratio: float = math.nan


class Watch:
    """What the loop calls: `over` around every step, which watches the first and each `every`-th.

    folder   the run's; lines of steps after `done` are dropped, so that a resumed run has each once
    only     globs of activations' and parameters' names
    tensors  write whole tensors too
    """

    def __init__(
        self, folder: Path, every: int, only: list[str], *, tensors: bool = False, done: int = 0
    ) -> None:
        if every < 1:
            raise ValueError(f"a trace every {every} steps: expected 1 or more")
        self.every, self.only, self.tensors = every, only, tensors
        self.folder, self.path = folder, folder / TABLE
        kept: list[list[str]] = []
        if done and self.path.exists():
            with self._opened("r") as file:
                kept = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= done]
        with self._opened("w") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept])

    def _opened(self, mode: str) -> IO[str]:
        return self.path.open(mode, newline="", encoding="utf-8")

    def due(self, step: int) -> bool:
        """Whether `step`, counted from 1, is watched."""
        return step == 1 or step % self.every == 0

    def chosen(self, name: str) -> bool:
        """Whether a glob of `only` matches."""
        return any(fnmatchcase(name, glob) for glob in self.only)

    @contextmanager
    def over(
        self, step: int, model: Model, optimizer: torch.optim.Optimizer, batch: Batch, clip: float
    ) -> Iterator[Seen | None]:
        """Around gradients and optimiser of one step; None where it is not watched.

        The loop runs its first pass inside `Seen.first_pass()` and calls `Seen.arrived` when the
        gradient is whole; what was seen is written when the block ends.
        """
        if not self.due(step):
            yield None
            return
        parameters = {n: p for n, p in model.named_parameters() if self.chosen(n)}
        seen = Seen(model, self.only, parameters, batch, clip)
        if self.tensors:
            seen.meta |= {
                "recording": training_step.KIND,
                "optimizer_steps": training_step.steps_of(optimizer, parameters),
                "groups": training_step.settings_of(optimizer, parameters),
                "config": describe(model.config),
                "dialect": model.dialect.name,
                "step": step,
            }
            seen.tensors |= training_step.means_of(optimizer, parameters)
        yield seen
        seen.updated()
        with self._opened("a") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows(_text(row) for row in seen.rows(step))
        if self.tensors:
            (self.folder / FOLDER).mkdir(exist_ok=True)
            seen.recording().save(self.folder / FOLDER / f"step-{step:08}.safetensors")


@dataclass
class Seen:
    """One watched step while it happens: the trace of its first pass, parameters, gradients."""

    model: Model
    only: list[str]
    parameters: Mapping[str, nn.Parameter]
    batch: Batch
    clip: float
    activations: Trace = field(default_factory=Trace)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    loss: float = math.nan

    def __post_init__(self) -> None:
        for name, parameter in self.parameters.items():
            self.tensors[name] = parameter.detach().clone()

    def first_pass(self) -> AbstractContextManager[object]:
        """Around the forward pass that is traced; its backward pass fills in the gradients."""

        @contextmanager
        def traced() -> Iterator[None]:
            with trace(self.model, self.only, gradients=True, fused=True) as seen:
                yield
            self.activations = seen

        return traced()

    def arrived(self, loss: float, norm: float) -> None:
        """The gradient is whole and clipped: `norm` is its length before that."""
        self.loss = loss
        factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                taken = parameter.grad.detach().clone()
                self.tensors[training_step.GRADIENT + name] = taken / factor
                if factor != 1:
                    self.tensors[training_step.CLIPPED + name] = taken
        # The loop divides by the number of inputs, and puts parameters right afterwards.
        inputs, counted = self.batch.inputs.numel(), int((self.batch.targets != IGNORED).sum())
        for name, tensor in self.activations.items():
            if tensor.grad is not None:
                gradient = tensor.grad * (inputs / counted)
                self.tensors[training_step.GRADIENT + name] = gradient

    def updated(self) -> None:
        """The optimiser has stepped."""
        for name, parameter in self.parameters.items():
            self.tensors[training_step.AFTER + name] = parameter.detach().clone()

    def rows(self, step: int) -> Iterator[Watched]:
        """Statistics of everything that was seen."""
        for name, tensor in self.activations.items():
            if tensor.is_floating_point():
                yield self._row(step, name, "activation", tensor.detach())
        for name in self.parameters:
            yield self._row(step, name, "parameter", self.tensors[name])

    def _row(self, step: int, name: str, kind: str, tensor: Tensor) -> Watched:
        gradient = self.tensors.get(training_step.GRADIENT + name)
        after = self.tensors.get(training_step.AFTER + name)
        return Watched(
            step=step,
            name=name,
            kind=kind,
            **statistics(tensor),
            gradient_norm=math.nan if gradient is None else float(gradient.double().norm()),
            update_ratio=math.nan if after is None else update_ratio(tensor, after),
        )

    def recording(self) -> Trace:
        """The step as a recording, everything in the order in which it came about."""
        held = {n: t.detach() for n, t in self.activations.items()}
        held |= {"loss": torch.tensor(self.loss, dtype=torch.float64)} | self.tensors
        held |= {"batch.inputs": self.batch.inputs, "batch.targets": self.batch.targets}
        starts = document_starts(self.batch)
        held |= {} if starts is None else {"batch.starts": starts}
        return Trace(held, self.meta)


def statistics(tensor: Tensor) -> dict[str, float]:
    """mean, std, rms, min, max and the share of zeros of a tensor, computed in float64."""
    x = tensor.double()
    return {
        "mean": float(x.mean()),
        "std": float(x.std(correction=0)),
        "rms": float(x.square().mean().sqrt()),
        "min": float(x.min()),
        "max": float(x.max()),
        "zeros": float((x == 0).double().mean()),
    }


def update_ratio(before: Tensor, after: Tensor) -> float:
    """RMS of the change / RMS of what was there; infinite for a parameter that was 0."""
    size = float(before.double().norm())
    moved = float((after.double() - before.double()).norm())
    return moved / size if size else (math.inf if moved else 0.0)


def _text(row: Watched) -> list[str]:
    """Numbers with 9 digits, which is all a float32 has; NaN as an empty field."""
    numbers = [getattr(row, column) for column in COLUMNS[3:]]
    shown = ["" if math.isnan(number) else f"{number:.9g}" for number in numbers]
    return [str(row.step), row.name, row.kind, *shown]
