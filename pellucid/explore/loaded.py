"""A model that is looked into, with what is known about it once: weights, fingerprint, code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import pellucid
from pellucid import graph, names
from pellucid.diff.replay.operations import Setting
from pellucid.explore.predictions import text_of
from pellucid.language_model import LanguageModel
from pellucid.models.quantised import FullWeights
from pellucid.source.step_lines import StepLines

SAMPLED = 16  # numbers of each weight in the fingerprint


class Loaded:
    """A language model under the name that runs and addresses know it by."""

    def __init__(self, name: str, lm: LanguageModel) -> None:
        self.name, self.lm, self.config, self.model = name, lm, lm.config, lm.model
        self.words: dict[Any, tuple[str, str]] = {}  # of steps: found once (`manifest`)

    def text(self, id: int) -> str:
        """The text of a token; of an id that only the embedding's padding has, its number."""
        return text_of(self.lm, id)

    @cached_property
    def names(self) -> dict[str, None]:
        """The names of a pass, in order."""
        return dict.fromkeys(graph.expand(self.config))

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Parameter name -> tensor."""
        return self.lm.weights()

    def weight_row(self, name: str, row: int) -> Tensor:
        """One row of a matrix, or one number of a vector; quantised matrices stay as they are."""
        matrix = self.weights.quantised(name) if isinstance(self.weights, FullWeights) else None
        if matrix is not None:
            return matrix.rows_at(torch.tensor(row, device=self.lm.device)).to(matrix.dtype)
        return self.weights[name][row]

    @cached_property
    def fingerprint(self) -> str:
        """Differs where shape, arithmetic or weights differ: some numbers of each are looked at."""
        versions = (pellucid.__version__, torch.__version__)
        said = (self.name, self.config, self.lm.dtype, self.lm.model.dialect, versions)
        digest = hashlib.sha256(repr((*said, str(self.lm.device))).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            if tensor.is_meta or not tensor.numel():  # streamed: the files stay what they are
                continue
            flat = tensor.detach().reshape(-1)
            places = torch.linspace(
                0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64
            ).long()
            digest.update(flat[places.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def dtype_name(self) -> str:
        """Such as "bfloat16"."""
        return str(self.lm.dtype).removeprefix("torch.")

    @cached_property
    def code(self) -> StepLines:
        """Finds the lines of this model's own code."""
        return StepLines(self.config, self.lm.model.dialect.name)

    def setting(self) -> Setting:
        """The model's own arithmetic, for the replay."""
        return Setting(
            config=self.config,
            dialect=self.lm.model.dialect,
            weights=self.weights.get,
            dtype=self.lm.dtype,
        )

    def python(self, variable: str = "lm") -> str:
        """The line that loads it."""
        checkpoint = self.lm.checkpoint
        words = [repr(str(checkpoint.source) if checkpoint else self.name)]
        words.append(f"dtype={self.dtype_name!r}")
        if checkpoint and checkpoint.dialect != self.model.dialect.name:
            words.append(f"dialect={self.model.dialect.name!r}")
        if self.lm.device.type != "cpu":
            words.append(f"device={str(self.lm.device)!r}")
        if self.lm.adapter is not None:
            words.append(f"adapter={str(self.lm.adapter)!r}")
        return f"{variable} = pellucid.load({', '.join(words)})"

    def leaf_of(self, name: str) -> graph.Row:
        """The table's row of a tensor as this model has it: the same name may have several."""
        layer = names.layer_of(name)
        table = graph.rows(self.config, None if layer is None else self.config.layer(layer))
        return table[graph.leaf(name)]
