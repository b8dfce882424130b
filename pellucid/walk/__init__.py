"""The walk: a model worked out on paper, one named tensor and one head at a time.

`walk` shows the steps of one prompt; `witness` collects what it says about every name of the
vocabulary, to hold a model against. The steps themselves, which are the text to read, begin in
script.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid import graph
from pellucid.models import Config
from pellucid.numerics import Dialect
from pellucid.walk.runner import WalkRunner
from pellucid.walk.script import SCRIPT
from pellucid.walk.steps import Picture, Step

__all__ = ["SCRIPT", "Picture", "Step", "Walk", "walk", "walk_part", "witness"]


class Walk(Iterator[Step]):
    """The steps of a walk, one after the other; a notebook shows them all, folded."""

    def __init__(self, begin: Callable[[], Iterator[Step]]) -> None:
        self._begin, self._steps = begin, begin()

    def __next__(self) -> Step:
        return next(self._steps)

    def _repr_html_(self) -> str:
        from pellucid.notebook import folded

        steps = self._begin()  # of its own: an iteration under way goes on
        return folded((f"{step.title} · {step.address}", step._repr_html_()) for step in steps)


def walk(
    config: Config,
    weights: Mapping[str, Tensor],
    tokens: Sequence[int] | Tensor,
    *,
    token_strings: Sequence[str] | None = None,
    specials: Mapping[str, int] | None = None,
    dialect: Dialect,
    dtype: torch.dtype | None = None,
    layer: int = 0,
    head: int = 0,
    everything: bool = False,
) -> Walk:
    """Every step from `tokens` to the next token, in the order of a person with a pencil.

    weights        parameter name -> tensor; read one at a time, when a step needs it, and let go
    token_strings  the text of each token, specials: text -> id; without them, without their steps
    dtype          of the activations; None: as the embedding table is stored
    layer, head    what to show in full; the other heads and layers become one step each
    everything     show every head of every layer

    The first thing is computed when the first step is asked for. ValueError for tokens that the
    model cannot take and for a layer or head beyond the last.
    """
    prompt = _checked_tokens(config, tokens)
    for what, number, count in (
        ("layer", layer, config.n_layers),
        ("head", head, config.n_heads),
    ):
        if not 0 <= number < count:
            raise ValueError(f"{what} {number}: this model has {what}s 0 to {count - 1}")
    if token_strings is not None and len(token_strings) != len(prompt):
        raise ValueError(f"{len(token_strings)} token strings for {len(prompt)} tokens")
    told: dict[str, Any] = {
        "token_strings": token_strings and list(token_strings),
        "specials": [f"{number} {text}" for text, number in _in_order(specials or {})] or None,
        "last_row": len(prompt) - 1,
    }
    shown = (range(config.n_layers), range(config.n_heads)) if everything else ([layer], [head])
    return Walk(lambda: _runner(config, weights, prompt, dialect, dtype, **told).walk(*shown))


def witness(
    config: Config,
    weights: Mapping[str, Tensor],
    tokens: Sequence[int] | Tensor,
    dialect: Dialect,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """What the walk says about every name of the vocabulary, with the shapes of the model, B = 1.

    Every step of every head, stacked; a trace of the model over tokens (1, T) has the same names.
    """
    prompt = _checked_tokens(config, tokens)
    every_row = slice(None)
    runner = _runner(config, weights, prompt, dialect, dtype, last_row=every_row, silent=True)
    found: dict[str, list[Tensor]] = {}
    for step in runner.walk(range(config.n_layers), range(config.n_heads)):
        if step.index or step.name not in found:
            found.setdefault(step.name, []).append(step.value)
    collected = {}
    for name in graph.expand(config):
        per_head = graph.dims(name)[1:2] in (("H",), ("Hkv",))
        value = torch.stack(found[name]) if per_head else found[name][0]
        collected[name] = value[None] if graph.has_batch(name) else value
    return collected


def walk_part(
    config: Config,
    weights: Mapping[str, Tensor],
    tokens: Sequence[int] | Tensor,
    *,
    layer: int,
    stream: Tensor,
    head: int,
    dialect: Dialect,
    dtype: torch.dtype | None = None,
) -> Iterator[Step]:
    """The steps before the first layer and those of one layer, into which `stream` (T, C) flows.

    `layer` n_layers are the steps after the last one. Steps without a title are among them.
    """
    prompt = _checked_tokens(config, tokens)
    values = {"last_row": len(prompt) - 1, "silent": True}
    return _runner(config, weights, prompt, dialect, dtype, **values).part(layer, head, stream)


def _runner(
    config: Config,
    weights: Mapping[str, Tensor],
    prompt: Tensor,
    dialect: Dialect,
    dtype: torch.dtype | None,
    **values: Any,
) -> WalkRunner:
    """A runner whose activations lie where the weights lie, in the dtype of the embedding table."""
    known = getattr(weights, "dtype", None)
    if known is not None:  # a checkpoint knows without reading; what it reads lies on the CPU
        stored = known("embed.weight")
    else:
        stored = weights["embed.weight"].dtype
        prompt = prompt.to(weights["embed.weight"].device)
    values = {"token_strings": None, "specials": None} | values
    return WalkRunner(SCRIPT, config, weights, dialect, dtype or stored, tokens=prompt, **values)


def _in_order(specials: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(specials.items(), key=lambda special: special[1])


def _checked_tokens(config: Config, tokens: Sequence[int] | Tensor) -> Tensor:
    prompt = torch.as_tensor(tokens)
    if prompt.ndim != 1 or not len(prompt):
        raise ValueError(
            f"tokens of shape {tuple(prompt.shape)}: the walk takes one row of at least one token"
        )
    if prompt.is_floating_point() or prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise ValueError(f"token ids must be whole numbers from 0 to {config.vocab_size - 1}")
    if config.rope is None and len(prompt) > config.context_length:
        raise ValueError(
            f"{len(prompt)} tokens, but there are position embeddings for only "
            f"{config.context_length}: crop to the last {config.context_length}"
        )
    return prompt.long()
