"""Record a training step of any loop, and hold two recorded steps against each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pellucid import graph
from pellucid.checkpoints.formats.hf import table
from pellucid.checkpoints.formats.hf_config import read_config
from pellucid.diff.report import Report
from pellucid.diff.sides.live import canonical
from pellucid.diff.sides.transformers_gradients import foreign_pass
from pellucid.diff.training.steps import compare_steps, is_step
from pellucid.models import Config, Decoder
from pellucid.models.description import describe
from pellucid.step_recording import AFTER, CLIPPED, GRADIENT, MEANS, watched_parameters
from pellucid.trace import Trace, set_step, trace


def record_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], Tensor],
    *,
    inputs: Tensor,
    targets: Tensor,
    starts: Tensor | None = None,
    fused: bool = True,
) -> Trace:
    """Run `step` and record it: activations, loss, gradients, and parameters before and after.

    model      one of ours, or a GPT-2 or Llama of transformers
    step       does one whole step of your loop as it is: forward, backward, clipping,
               ``optimizer.step()``; returns the loss, a mean per token. Where it takes the batch in
               several forward passes (gradient accumulation), activations are of the first
    inputs, targets, starts  (B, T) the batch; targets are the next tokens, -100 where none counts
    fused      of our model: the attention kernel of training; False shows the pattern as well

    The result can be saved, and compared with `diff_steps`. ValueError where `step` never calls
    ``optimizer.step()``, or the model is none of these.
    """
    own = isinstance(model, Decoder)
    parameters = {n: p for n, p in model.named_parameters() if isinstance(p, nn.Parameter)}
    shown: Mapping[str, Tensor]
    with watched_parameters(parameters, optimizer) as (tensors, meta):
        if own:
            with trace(model, gradients=True, fused=fused) as shown, _passes(model) as rows:
                loss = step()
            shown = _first_pass(shown, inputs)
            meta["passes"] = rows
        else:
            with foreign_pass(model, type(model).__name__) as shown:
                loss = step()
    found = {name: tensor.detach() for name, tensor in shown.items()} | {"loss": loss.detach()}
    if own:
        several = (
            len(meta["passes"]) > 1
        )  # of what has no rows, each pass has a part of the gradient
        found |= {
            GRADIENT + n: x.grad
            for n, x in shown.items()
            if x.grad is not None and (graph.has_batch(n) or not several)
        }
        config, dialect = model.config, model.dialect.name
    else:
        config = read_config(json.loads(model.config.to_json_string()), type(model).__name__)
        dialect = "hf"
        tensors = _renamed(config, tensors)
        meta["groups"] = _renamed_groups(config, meta["groups"])
    found |= tensors | {"batch.inputs": inputs, "batch.targets": targets}
    found |= {} if starts is None else {"batch.starts": starts}
    meta |= {"config": describe(config), "dialect": dialect}
    meta |= {"training": model.training}
    return Trace({name: tensor.detach().cpu() for name, tensor in found.items()}, meta)


@contextmanager
def _passes(model: Decoder) -> Iterator[list[int]]:
    """How many rows each forward pass inside the context has; each is recorded as another step."""
    rows: list[int] = []

    def begins(module: nn.Module, given: tuple[Any, ...]) -> None:
        set_step(len(rows))
        rows.append(len(given[0]))

    handle = model.register_forward_pre_hook(begins)
    try:
        yield rows
    finally:
        handle.remove()


def _first_pass(shown: Mapping[str, Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """The tensors of the first pass, or none where its rows are not as long as the batch's."""
    first = {name: x for name, x in shown.items() if not name.startswith("step.")}
    whole = first["tokens"].shape[1] == inputs.shape[1] if "tokens" in first else True
    return first if whole else {}


def _renamed(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is like a parameter, under our names and in our layout."""
    prefixes = ("", GRADIENT, CLIPPED, AFTER, *(f"{mean}." for mean in MEANS))
    found: dict[str, Tensor] = {}
    for prefix in prefixes:
        marked = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        held = {e.stored for e in table(config) if e.parameters} & marked.keys()
        if not held:
            continue
        if held != {e.stored for e in table(config) if e.parameters}:  # some are frozen
            some = next(iter({e.stored for e in table(config) if e.parameters} - held))
            raise ValueError(f"{some} has no {prefix.rstrip('.') or 'value'}: is it frozen?")
        found |= {prefix + n: x for n, x in canonical(config, marked, "the model").items()}
    return found


def _renamed_groups(config: Config, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimiser's groups with our names for theirs."""
    ours = {entry.stored: entry.parameters for entry in table(config)}
    return [
        {**group, "names": [n for stored in group["names"] for n in ours.get(stored, ())]}
        for group in groups
    ]


def diff_steps(a: Trace | str | Path, b: Trace | str | Path) -> Report:
    """Compare two recorded training steps of one model: A's batch and settings are what was meant.

    Traces, or files of them. The report names the first divergence on the way from the batch to the
    parameters after the step, and what reproduces it. ValueError where a side is no such recording.
    """
    sides = [source if isinstance(source, Trace) else Trace.load(source) for source in (a, b)]
    labels = [
        f"{letter} (trace)" if isinstance(source, Trace) else str(source)
        for letter, source in zip("AB", (a, b), strict=True)
    ]
    return compare_steps(sides[0], sides[1], (labels[0], labels[1]))


def are_steps(*sides: Any) -> bool:
    """Whether all sides are recordings of a training step, judging by their metadata."""
    return all(_is_step(side) for side in sides)


def _is_step(side: Any) -> bool:
    if isinstance(side, Trace):
        return is_step(side)
    if not str(side).endswith(".safetensors") or not Path(side).is_file():
        return False
    return is_step(Trace.load(side))
