"""Healthy models for the faults to break."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.diff.selftest.catalogue import encoded
from pellucid.models import GPTConfig, LlamaConfig, RopeConfig, build

TEXT = (
    "Once upon a time there was a little girl named Lily, who lived in a house with 3 windows and "
    "127 steps. She loved to play outside in the park. One day, on the 4th of July 1998, she saw a "
    "big red ball in the tall grass. She ran to it, and said: can I have it? Her mother smiled. "
)
SHORT, LONG = 48, 330


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model by its config and float32 weights, and maybe the tokenizer that belongs to it."""

    name: str
    config: Any
    weights: Mapping[str, Tensor]
    tokenizer: Any = None

    def rows(self, kind: str) -> list[list[int]]:
        """Token ids to run: "short", "long" (as far as the context goes), "padded" (three rows).

        "many" is more tokens than the model is wide, so that weights can be solved for.
        """
        length = min(self.config.context_length - 4, LONG)
        ids = self._ids(length)
        if kind == "padded":
            return [ids[:20], ids[3:16], ids[5:24]]
        if kind == "many":
            count = round(3.2 * self.config.width / SHORT) + 1
            return self._random(count, SHORT)
        return [ids if kind == "long" else ids[:SHORT]]

    def _ids(self, length: int) -> list[int]:
        if self.tokenizer is None:
            return self._random(1, length)[0]
        ids = encoded(self.tokenizer, TEXT)
        while len(ids) < length:
            ids += self.tokenizer.encode(TEXT)
        return ids[:length]

    def _random(self, rows: int, length: int) -> list[list[int]]:
        random = torch.Generator().manual_seed(0)
        return torch.randint(self.config.vocab_size, (rows, length), generator=random).tolist()


def from_language_model(lm: Any) -> Subject:
    """A subject from a loaded language model (its `model`, `tokenizer` and `name`)."""
    weights = {name: tensor.float() for name, tensor in lm.model.state_dict().items()}
    return Subject(name=lm.name, config=lm.config, weights=weights, tokenizer=lm.tokenizer)


def random_llama() -> Subject:
    """Three layers with grouped queries; no two sizes alike but the square output projection."""
    config = LlamaConfig(
        vocab_size=150,
        context_length=512,
        width=48,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=12,
        hidden_width=96,
        rope=RopeConfig(theta=10000.0),
    )
    return Subject(name="random-llama", config=config, weights=_drawn(config))


def random_gpt2() -> Subject:
    """Three layers of a GPT-2 with biases everywhere and a tied head."""
    config = GPTConfig(
        vocab_size=150, context_length=512, width=48, n_layers=3, n_heads=4, hidden_width=96
    )
    return Subject(name="random-gpt2", config=config, weights=_drawn(config))


def _drawn(config: Any) -> dict[str, Tensor]:
    """Weights whose activations, norms and attention patterns have the sizes of a trained model."""
    random = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build(config).state_dict().items()}
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=random)
        if len(shape) == 1 and name.endswith("norm.weight"):
            weights[name] = 1 + values.abs() / 3
        elif len(shape) == 1:
            weights[name] = values / 10
        elif "embed" in name:
            weights[name] = values * 0.3
        else:  # sharper queries and keys make patterns that look somewhere
            gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            weights[name] = values * gain * shape[1] ** -0.5
    return weights
