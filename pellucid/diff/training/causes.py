"""Why a training step went apart: known mistakes, replayed until one gives the recorded numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.diff.causes.search import Cause
from pellucid.diff.replay.statistics import roundoff
from pellucid.diff.training.replay import (
    Loss,
    adamw_step,
    config_of,
    found,
    group_of,
    mean_loss,
    parameters_of,
    replay,
)
from pellucid.models.description import describe
from pellucid.step_recording import AFTER, GRADIENT, IGNORED, SETTINGS
from pellucid.trace import Trace

FITS = 1e-3  # relative error up to which a replayed mistake counts as what happened
BETTER = 10.0  # and by how much it must be nearer than the step without it


def loss_cause(a: Trace, seen: Trace) -> Cause | None:
    """The mistake in a loss that gives the recorded one from the same logits."""
    observed, right = float(seen["loss"]), float(a["loss"])
    tried = list(_losses())
    fits = max(FITS / 10, 4 * roundoff(seen["loss"].dtype))
    for name, loss in tried:
        value = float(replay(seen, a, torch.float64, loss=loss)["loss"])
        error = abs(value - observed) / abs(observed) if observed else float("inf")
        if error < fits and error * BETTER < abs(right - observed) / abs(observed):
            evidence = f"gives {value:.6g}, recorded is {observed:.6g}, A has {right:.6g}"
            return Cause(name=name, evidence=evidence, error=error, tried=len(tried))
    return None


def _losses() -> Iterator[tuple[str, Loss]]:
    def shifted(logits: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(logits[:, :-1], targets[:, 1:])

    def unshifted(logits: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(logits[:, 1:], targets[:, :-1])

    def over_everything(logits: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(logits, targets) * (targets != IGNORED).double().mean()

    def added(logits: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(logits, targets) * (targets != IGNORED).sum()

    def by_row(logits: Tensor, targets: Tensor) -> Tensor:
        rows = range(len(targets))
        return torch.stack([mean_loss(logits[n, None], targets[n, None]) for n in rows]).mean()

    def padding_counted(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=0))

    yield "labels shifted once too often", shifted
    yield "labels not shifted", unshifted
    yield "loss averaged over targets that do not count", over_everything
    yield "loss added up, not averaged", added
    yield "mean of the rows' means", by_row
    yield "targets to ignore counted as token 0", padding_counted


def gradient_cause(a: Trace, seen: Trace) -> Cause | None:
    """What was done to the gradients of the parameters, or None."""
    if seen.meta.get("stale"):
        left = seen.meta["stale"]
        evidence = f"{len(left)} parameters had a gradient before the first backward pass"
        return Cause(name="gradient not zeroed", evidence=evidence, error=0.0, tried=1)
    exact = replay(seen, a, torch.float64)
    names = [n for n in parameters_of(config_of(seen)) if GRADIENT + n in seen]
    pairs = [(exact[GRADIENT + n], seen[GRADIENT + n].double()) for n in names]
    scale, error = _scaled(pairs)
    if error < FITS and abs(scale - 1) > 10 * error:
        evidence = f"every gradient is {scale:.4g} times what the loss has"
        return Cause(name="gradient scaled", evidence=evidence, error=error, tried=2)
    return _tied_cause(a, seen)


def _tied_cause(a: Trace, seen: Trace) -> Cause | None:
    """The matrix that is embedding and head gets two gradients: which of them is there?"""
    config = config_of(seen)
    observed = found(seen, GRADIENT + "embed.weight")
    if not config.tied or observed is None:
        return None
    meta = seen.meta | {"config": describe(replace(config, tied=False))}
    apart = Trace({**seen, "unembed.weight": seen["embed.weight"]}, meta)
    exact = replay(apart, a, torch.float64)
    for there, missing in (("embed", "head"), ("unembed", "embedding")):
        wanted = exact[f"{GRADIENT}{there}.weight"]
        error = _error(wanted, observed.double())
        if error < FITS:
            evidence = f"only the other of the two gradients of embed.weight is there ({error:.1g})"
            return Cause(
                name=f"the tied {missing}'s gradient dropped",
                evidence=evidence,
                error=error,
                tried=4,
            )
    return None


def update_cause(a: Trace, seen: Trace, wrong: list[str]) -> Cause | None:
    """The mistake in the optimiser that gives the recorded parameters, or None."""
    names = [name.removeprefix(AFTER) for name in wrong]
    unchanged = _update_error(a, seen, names, {})
    tried = list(_mistakes(a, seen, names))
    for name, evidence, change in tried:
        error = _update_error(a, seen, names, change)
        if error < FITS and error * BETTER < unchanged:
            told = f"{evidence}; off by {error:.1g} of the update, without it by {unchanged:.1g}"
            return Cause(name=name, evidence=told, error=error, tried=len(tried))
    pairs = [
        (exact - seen[n].double(), seen[AFTER + n].double() - seen[n].double())
        for n in names
        if (exact := adamw_step(a, seen, n, torch.float64)) is not None
    ]
    scale, error = _scaled(pairs)
    if error < FITS and abs(scale - 1) > 10 * error:
        rate = group_of(a, names[0])["lr"]
        evidence = (
            f"every update is {scale:.4g} times A's: a rate of {rate * scale:.4g}, not {rate:.4g}"
        )
        return Cause(
            name="another learning rate", evidence=evidence, error=error, tried=len(tried) + 1
        )
    return None


def _mistakes(a: Trace, seen: Trace, names: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(cause, evidence, what to change in the step) of every known mistake that may apply."""
    mine, theirs = group_of(a, names[0]), group_of(seen, names[0])
    for key in SETTINGS:
        if key in mine and key in theirs and mine[key] != theirs[key]:
            said = f"{key} is {theirs[key]}, not {mine[key]}"
            yield _NAMES[key], said, {key: theirs[key]}
    decay = max(float(group.get("weight_decay", 0.0)) for group in a.meta["groups"])
    beta1, beta2 = mine["betas"]
    yield "betas swapped", f"{beta2}, {beta1}", {"betas": (beta2, beta1)}
    yield "bias correction missing", "the means as they are", {"corrected": False}
    yield "decay added to the gradient", "L2, not decoupled", {"coupled": True}
    yield "eps inside the square root", f"eps {mine['eps']:g}", {"eps_inside": True}
    yield "eps before the bias correction", f"eps {mine['eps']:g}", {"eps_first": True}
    yield "decays what must not decay", f"weight_decay {decay:g}", {"weight_decay": decay}
    yield "does not decay", "weight_decay 0", {"weight_decay": 0.0}


_NAMES = {
    "lr": "another learning rate",
    "betas": "other betas",
    "eps": "another eps",
    "weight_decay": "another weight decay",
}


def _update_error(a: Trace, seen: Trace, names: list[str], change: dict[str, Any]) -> float:
    """RMS of the difference to the replayed update / RMS of the update, over all of `names`."""
    squares = torch.zeros(2, dtype=torch.float64)
    for name in names:
        exact = adamw_step(a, seen, name, torch.float64, **change)
        if exact is None:
            return float("inf")
        after, before = seen[AFTER + name].double(), seen[name].double()
        parts = (after - exact).square().sum(), (after - before).square().sum()
        squares += torch.stack(parts)
    return float((squares[0] / squares[1]).sqrt()) if squares[1] else float("inf")


def _scaled(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The number that makes the first of each pair the second, and how well, by least squares."""
    product = sum(float((x * y).sum()) for x, y in pairs)
    size = sum(float(x.square().sum()) for x, _ in pairs)
    if not size or not product:
        return 1.0, float("inf")
    scale = product / size
    error = sum(float((scale * x - y).square().sum()) for x, y in pairs)
    return scale, (error / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5


def _error(exact: Tensor, observed: Tensor) -> float:
    return float((exact - observed).norm() / observed.norm().clamp(min=1e-300))
