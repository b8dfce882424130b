"""A training step computed again from its recording: forward and backward, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.models import Config, Model, empty_model
from pellucid.models.description import described_config
from pellucid.step_recording import CLIPPED, GRADIENT, IGNORED, MEANS
from pellucid.trace import Trace, trace

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (B, T, V), targets (B, T) -> scalar


def found(seen: Trace, name: str) -> Tensor | None:
    """A tensor, or None; `Trace.get` would look for similar names each time."""
    if name not in seen:
        return None
    return seen[name]


def config_of(seen: Trace) -> Config:
    """The model's config, as the recording states it."""
    stated = seen.meta.get("config")
    if not isinstance(stated, dict):
        raise ValueError("a recorded step states no config of the model it is of")
    config = described_config(stated)
    dropped = config.embed_dropout or config.attn_dropout or config.resid_dropout
    if dropped and seen.meta.get("training", True):
        raise ValueError("a step with dropout cannot be computed again: record it without")
    return config


def parameters_of(config: Config) -> list[str]:
    """Names of the parameters, in the order of the model."""
    return list(_parameters(config))


@lru_cache(maxsize=8)
def _parameters(config: Config) -> tuple[str, ...]:
    return tuple(name for name, _ in empty_model(config).named_parameters())


def group_of(seen: Trace, name: str) -> dict[str, Any]:
    """AdamW's settings for a parameter; empty where nothing states them."""
    for group in seen.meta.get("groups", []):
        if name in group["names"]:
            return group
    return {}


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, the mean over the targets that count."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED)


def model_of(seen: Trace, dtype: torch.dtype) -> Model:
    """The model with the weights before the step, in a dtype."""
    config = config_of(seen)
    model = empty_model(config, str(seen.meta.get("dialect") or "hf"))
    weights = {name: seen[name].detach().to(dtype, copy=True) for name in parameters_of(config)}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_()


def replay(
    seen: Trace, a: Trace, dtype: torch.dtype, *, fused: bool = False, loss: Loss = mean_loss
) -> Trace:
    """Forward pass, loss and gradients of the side's weights on A's batch, named as in a recording.

    In the order in which they come about. `fused`: attention in one kernel, as training has it.
    """
    model = model_of(seen, dtype)
    starts = found(a, "batch.starts")
    cast = None if dtype == torch.float64 else autocast_of(seen)
    with (
        torch.enable_grad(),
        trace(model, gradients=True, fused=fused) as pass_,
        torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None),
    ):
        logits = model(a["batch.inputs"], starts=starts)
        total = loss(logits, a["batch.targets"])
    total.backward()
    again = Trace({name: tensor.detach() for name, tensor in pass_.items()})
    again["loss"] = total.detach()
    for name, tensor in reversed(list(pass_.items())):
        if tensor.grad is not None:
            again[GRADIENT + name] = tensor.grad
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None:
            again[GRADIENT + name] = parameter.grad
    return again


def autocast_of(seen: Trace) -> torch.dtype | None:
    """In what matrices were multiplied, where that is not the dtype of the weights."""
    product = found(seen, "layers.0.attn.q")
    if product is None or product.dtype == seen["embed.weight"].dtype:
        return None
    return product.dtype


def taken(seen: Trace, name: str) -> Tensor:
    """The gradient of a parameter that the optimiser took in."""
    return seen[CLIPPED + name] if CLIPPED + name in seen else seen[GRADIENT + name]


def norm(seen: Trace, prefix: str = GRADIENT) -> float:
    """Length of the whole gradient as it arrived, or as it was taken in (`CLIPPED`)."""
    squares = 0.0
    for name in parameters_of(config_of(seen)):
        if GRADIENT + name in seen or CLIPPED + name in seen:
            gradient = taken(seen, name) if prefix == CLIPPED else found(seen, GRADIENT + name)
            squares += 0.0 if gradient is None else float(gradient.double().square().sum())
    return math.sqrt(squares)


def clip_factor(a: Trace, seen: Trace) -> float:
    """By how much the side's gradient is to be shortened, going by what A did to its own."""
    if not any(CLIPPED + name in a for name in parameters_of(config_of(a))):
        return 1.0
    own = norm(seen)
    return min(1.0, norm(a, CLIPPED) / own) if own else 1.0


def adamw_step(
    a: Trace, seen: Trace, name: str, dtype: torch.dtype, **change: Any
) -> Tensor | None:
    """A parameter after AdamW (Loshchilov & Hutter, 2019) with A's settings on the side's numbers.

    None where A states no settings, or the side's means before the step are not known. `change`
    overrules a setting, or is one of the known mistakes: ``corrected=False``, ``coupled=True``,
    ``eps_inside=True``, ``eps_first=True`` (before the squares are corrected), ``gradient=…``.
    """
    group, done = {**group_of(a, name), **change}, int(seen.meta.get("optimizer_steps", 0))
    means = [found(seen, f"{mean}.{name}") for mean in MEANS]
    if "lr" not in group or "betas" not in group or (done and None in means):
        return None
    p = seen[name].to(dtype)
    gradient = group.get("gradient")
    g = (taken(seen, name) if gradient is None else gradient).to(dtype)
    m, v = (torch.zeros_like(p) if x is None else x.to(dtype) for x in means)
    rate, decay, (beta1, beta2) = group["lr"], group.get("weight_decay", 0.0), group["betas"]
    if group.get("coupled"):
        g = g + decay * p
    else:
        p = p * (1 - rate * decay)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    first, second = 1.0, 1.0
    if group.get("corrected", True):
        first, second = 1 - beta1 ** (done + 1), 1 - beta2 ** (done + 1)
    eps = group.get("eps", 1e-8)
    if group.get("eps_inside"):
        return p - rate / first * m / (v / second + eps).sqrt()
    if group.get("eps_first"):
        return p - rate / first * m / (v.sqrt() + eps) * math.sqrt(second)
    return p - rate / first * m / (v.sqrt() / math.sqrt(second) + eps)
