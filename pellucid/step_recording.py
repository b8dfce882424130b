"""One optimiser step as a recording: a `Trace` with gradients, parameters before it and after it.

    layers.0.attn.q             activation of the forward pass
    loss                        mean over the targets that count, nats per token
    grad.layers.0.attn.q        gradient of the loss at that activation
    embed.weight                parameter before the step
    grad.embed.weight           gradient of the loss at it
    clipped.embed.weight        what the optimiser took in, where that is not the gradient itself
    exp_avg.embed.weight        AdamW's two means before the step; absent before the first
    exp_avg_sq.embed.weight
    after.embed.weight          parameter after the step
    batch.inputs, .targets      (B, T) token ids of the whole batch; batch.starts where rows hold
                                several texts

The metadata say the rest: ``recording: "training step"``, the optimiser's steps before this one,
its settings, the model's config. `pellucid diff` holds two such files against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

KIND = "training step"  # what a file's metadata say under "recording"
GRADIENT, CLIPPED, AFTER = "grad.", "clipped.", "after."
MEANS = ("exp_avg", "exp_avg_sq")
SETTINGS = ("lr", "betas", "eps", "weight_decay")
IGNORED = -100  # a target that does not count, torch's own number for it


def settings_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """The optimiser's groups with names for parameters: {"names", "lr", "betas", …} each."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [
        {
            "names": [names[id(p)] for p in group["params"] if id(p) in names],
            **{key: _plain(group[key]) for key in SETTINGS if key in group},
        }
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, tuple | list) else float(value)


def means_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of AdamW's two means, as far as there are any."""
    return {
        f"{mean}.{name}": optimizer.state[parameter][mean].detach().clone()
        for name, parameter in parameters.items()
        for mean in MEANS
        if mean in optimizer.state.get(parameter, {})
    }


def steps_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> int:
    """How many steps the optimiser has taken."""
    counts = [
        optimizer.state.get(parameter, {}).get("step", 0) for parameter in parameters.values()
    ]
    return max((int(count) for count in counts), default=0)


@contextmanager
def watched_parameters(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """(tensors, metadata) of one backward pass and one ``optimizer.step()`` inside the context.

    The gradient is copied when it arrives, what the optimiser takes in when it is asked to step, so
    whatever a loop does in between (clipping) can be told apart. ``meta["stale"]`` lists parameters
    that still had a gradient when the first one of this step arrived. ValueError at the end where
    the optimiser was not asked to step.
    """
    tensors: dict[str, Tensor] = {n: p.detach().clone() for n, p in parameters.items()}
    tensors |= means_of(optimizer, parameters)
    meta: dict[str, Any] = {
        "recording": KIND,
        "optimizer_steps": steps_of(optimizer, parameters),
        "stale": [],
    }
    arrived: set[str] = set()

    def arriving(name: str, parameter: Tensor) -> None:
        if name not in arrived and parameter.grad is not None and parameter.grad.any():
            meta["stale"].append(name)
        arrived.add(name)

    def taken(*_: Any) -> None:
        meta["groups"] = settings_of(optimizer, parameters)
        for name, parameter in parameters.items():
            raw = tensors.get(GRADIENT + name)
            if parameter.grad is not None and (raw is None or not torch.equal(raw, parameter.grad)):
                tensors[CLIPPED + name] = parameter.grad.detach().clone()

    def done(*_: Any) -> None:
        for name, parameter in parameters.items():
            tensors[AFTER + name] = parameter.detach().clone()

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                continue

            def keep(p: Tensor, name: str = name) -> None:
                assert p.grad is not None, "the hook comes after the gradient"
                tensors[GRADIENT + name] = p.grad.detach().clone()

            def before(_: Tensor, name: str = name, parameter: Tensor = parameter) -> None:
                arriving(name, parameter)

            stack.callback(parameter.register_hook(before).remove)
            stack.callback(parameter.register_post_accumulate_grad_hook(keep).remove)
        stack.callback(optimizer.register_step_pre_hook(taken).remove)
        stack.callback(optimizer.register_step_post_hook(done).remove)
        yield tensors, meta
    if "groups" not in meta:
        raise ValueError("the step that was to be recorded never called optimizer.step()")
