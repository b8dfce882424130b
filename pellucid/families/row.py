"""What is known of one family of models: a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pellucid.families.gguf_row import Gguf
from pellucid.families.names import Entry, Names, Pairs, entries
from pellucid.families.parts import Part
from pellucid.models import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's files state a model.

    model_type    what ``config.json`` calls it, and `ModelConfig.family`
    architecture  transformers' class of the model with its head
    source        where its arithmetic is written down: file and class in transformers 5.23
    parts         its keys, both ways, in the order in which they are written
    features      fields of `ModelConfig` that no key states
    names         what files call its parameters
    pairs         where the files keep the two rows that RoPE turns together, see `PairOrder`
    ignored       keys of its own that do not change what it computes
    stated        keys that its files need beside the parts: most classes pad with an id of their
                  own, which a vocabulary need not have
    make          from the arguments to the config
    gguf          how llama.cpp's files state it; None: they do not, or not as we read them
    """

    model_type: str
    architecture: str
    source: str
    parts: tuple[Part, ...]
    features: Mapping[str, Any] = field(default_factory=dict)
    names: Names = field(default_factory=Names)
    pairs: Pairs = "halves"
    ignored: frozenset[str] = frozenset()
    stated: Mapping[str, Any] = field(default_factory=lambda: {"pad_token_id": None})
    make: Callable[..., ModelConfig] = ModelConfig
    gguf: Gguf | None = None

    def entries(self, config: ModelConfig) -> Iterator[Entry]:
        """Every stored tensor of a model of this family, in the order of the forward pass."""
        return entries(config, self.names, self.pairs)
