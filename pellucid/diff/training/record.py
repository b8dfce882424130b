"""Record a training step of any loop, and hold two recorded steps against each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.checkpoints.formats.hf import table
from pellucid.checkpoints.formats.hf_config import read_config
from pellucid.diff.report import Report
from pellucid.diff.sides.live import canonical
from pellucid.diff.sides.transformers_gradients import foreign_pass
from pellucid.diff.training.steps import compare_steps, is_step
from pellucid.models import Config, Decoder
from pellucid.models.description import describe
from pellucid.step_recording import AFTER, CLIPPED, GRADIENT, MEANS, watched_parameters
from pellucid.trace import Trace, trace


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
               ``optimizer.step()``; one forward pass; returns the loss, a mean per token
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
            with trace(model, gradients=True, fused=fused) as shown:
                loss = step()
        else:
            with foreign_pass(model, type(model).__name__) as shown:
                loss = step()
    found = {name: tensor.detach() for name, tensor in shown.items()} | {"loss": loss.detach()}
    if own:
        found |= {GRADIENT + n: x.grad for n, x in shown.items() if x.grad is not None}
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
