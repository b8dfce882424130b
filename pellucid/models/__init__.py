"""The decoder, what it is made of, and how to build one from its config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pellucid.models.cache import Cache
from pellucid.models.config import GPTConfig, Layer, LlamaConfig, ModelConfig
from pellucid.models.decoder import Decoder
from pellucid.models.rope_scaling import RopeConfig

Config = ModelConfig
Model = Decoder

__all__ = [
    "Cache",
    "Config",
    "Decoder",
    "GPTConfig",
    "Layer",
    "LlamaConfig",
    "Model",
    "ModelConfig",
    "RopeConfig",
    "build",
    "empty_model",
    "evaluating",
    "initialise",
]


def build(config: Config, dialect: str = "hf") -> Model:
    """The model of a config; under ``torch.device("meta")`` it takes no memory."""
    return Decoder(config, dialect)


def empty_model(config: Config, dialect: str = "hf") -> Model:
    """The model of a config on the meta device: every shape, no memory, no values."""
    with torch.device("meta"), _WithoutInitialisation():
        return build(config, dialect)


class _WithoutInitialisation(TorchFunctionMode):
    """Leaves out torch's random initialisation of modules.

    On the meta device there is nothing to initialise, and asking for it makes torch import its
    symbolic shape machinery, which takes about a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def evaluating(*models: Model) -> Iterator[None]:
    """Evaluation mode without gradients; each model's own mode is put back."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)


@torch.no_grad()
def initialise(model: Model, generator: torch.Generator | None = None) -> None:
    """Random weights to train from: normal with std 0.02; what adds to the stream, scaled down.

    The scale 1/sqrt(2·layers) keeps the residual stream's size over depth (GPT-2, section 2.3).
    """
    residual = 0.02 / (2 * model.config.n_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:  # the weight of a norm, or what it has beyond 1
            nn.init.constant_(parameter, 0.0 if model.config.norm_offset else 1.0)
        else:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=residual if adds else 0.02, generator=generator)
