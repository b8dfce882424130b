"""What a hypothesis is, and the ways to write one down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.diff.relayout_candidates import candidates
from pellucid.diff.replay.operations import Setting, apply, cast, leaf
from pellucid.diff.replay.replay import Replay

_NORMS = {
    "embed_normed",
    "attn_norm",
    "mlp_norm",
    "final_norm",
    "attn.q_normed",
    "attn.k_normed",
}
Wrong = Callable[[Replay, str], Tensor]


@dataclass(frozen=True)
class Hypothesis:
    """A cause by name, what it would mean here, and the tensor it would give."""

    cause: str
    evidence: str
    compute: Wrong


def parameters(setting: Setting, name: str) -> tuple[str, ...]:
    """Full names of the parameters an operation reads."""
    module = graph.module_of(setting.config, name)
    if not module:
        return ()
    return tuple(
        full for full in (f"{module}.weight", f"{module}.bias") if setting.weights(full) is not None
    )


def is_norm(config: Any, name: str) -> bool:
    """Whether the operation of a tensor normalises its input."""
    if leaf(name) in ("attn_out", "mlp_out"):
        return config.norm_places != "before"
    return leaf(name) in _NORMS


def with_weights(setting: Setting, changed: Mapping[str, Tensor]) -> Setting:
    """The setting with some parameters exchanged."""
    plain = setting.weights
    return replace(
        setting, weights=lambda asked: changed[asked] if asked in changed else plain(asked)
    )


def in_setting(change: Callable[[Setting], Setting]) -> Wrong:
    """The right operation under another config, dialect or weights."""

    def compute(replay: Replay, name: str) -> Tensor:
        return apply(change(replay.setting), name, replay.arguments(name))

    return compute


def given(function: Callable[..., Tensor]) -> Wrong:
    """A wrong operation on the right inputs: function(setting, *inputs)."""

    def compute(replay: Replay, name: str) -> Tensor:
        setting = replace(replay.setting, layer=names.layer_of(name))
        values = (cast(value, setting, leaf(name)) for value in replay.arguments(name))
        return function(setting, *values)

    return compute


def from_sibling(source: str, function: Callable[..., Tensor]) -> Wrong:
    """A wrong operation on other inputs: function(setting, tensor named `source` of the block)."""

    def compute(replay: Replay, name: str) -> Tensor:
        setting = replace(replay.setting, layer=names.layer_of(name))
        return function(setting, replay.value(sibling(name, source)).to(setting.dtype))

    return compute


def sibling(name: str, what: str) -> str:
    """Another tensor of the same step and block: ("step.1.layers.2.mlp.act", "mlp.up")."""
    step, layer = names.step_of(name), names.layer_of(name)
    block = "" if layer is None or graph.known(what) else f"layers.{layer}."
    return (f"step.{step}." if step else "") + block + what


def other_weights(replay: Replay, name: str) -> Iterator[Hypothesis]:
    """The right operation on A's weights laid out, joined, rounded or taken wrongly.

    What was done to a weight was mostly done to its bias too, so that is tried first.
    """
    setting = replay.setting
    weight, bias = (
        next((p for p in parameters(setting, name) if p.endswith(kind)), None)
        for kind in (".weight", ".bias")
    )
    of_bias: dict[tuple[str, str], Tensor] = {}
    if bias is not None:
        plain = setting.parameter_named(bias)
        of_bias = {("missing bias", f"without {bias}"): torch.zeros_like(plain)}
        for cause, evidence, tensor in candidates(bias, setting.weights, setting.config):
            of_bias[cause, evidence] = tensor
    if weight is not None:
        for cause, evidence, tensor in candidates(weight, setting.weights, setting.config):
            beside = of_bias.get((cause, evidence))
            if bias is not None and beside is not None:
                yield _exchanged(cause, evidence, {weight: tensor, bias: beside})
            yield _exchanged(cause, evidence, {weight: tensor})
    if bias is not None:
        for (cause, evidence), tensor in of_bias.items():
            yield _exchanged(cause, evidence, {bias: tensor})


def _exchanged(cause: str, evidence: str, changed: dict[str, Tensor]) -> Hypothesis:
    stated = f"{' and '.join(changed)}: {evidence}"
    return Hypothesis(cause, stated, in_setting(lambda s: with_weights(s, changed)))


def mask_of(config: Any, name: str) -> str:
    """The mask that a layer's tensor depends on: the whole one, or that of layers with a window."""
    layer = names.layer_of(name)
    windowed = layer is not None and config.layer(layer).window
    return of_model(name, "window_mask" if windowed else "mask")


def of_model(name: str, what: str) -> str:
    """A tensor of the whole model at the step of `name`: ("step.1.logits", "mask")."""
    step = names.step_of(name)
    return f"step.{step}.{what}" if step else what
