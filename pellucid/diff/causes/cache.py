"""A KV cache read or written wrongly: keys turned twice, a token lost, another layer's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pellucid import names
from pellucid.diff.causes.hypothesis import Hypothesis, Wrong, given, sibling
from pellucid.diff.replay.operations import Setting, apply, scale_scores
from pellucid.diff.replay.replay import Replay, at_step
from pellucid.models.attention import repeat_heads
from pellucid.models.rope import rotate


def cached_keys(replay: Replay, name: str) -> Iterator[Hypothesis]:
    """Scores of a decoding step from keys that the cache does not hold as they were."""
    step, past = names.step_of(name), _past(replay, name)
    if not past:
        return

    def with_keys(change: Callable[[Tensor], Tensor]) -> Wrong:
        def scores(s: Setting, q: Tensor, k: Tensor) -> Tensor:
            k = torch.cat((change(k[:, :, :past]), k[:, :, past:]), dim=2)
            return scale_scores(s, q @ repeat_heads(k, q.shape[1]).transpose(-1, -2))

        return given(scores)

    layer = names.layer_of(name) or 0
    which = replay.setting.config.layer(layer).rope
    if which:

        def turned(k: Tensor) -> Tensor:
            tables = []
            for part in ("cos", "sin"):
                held = (replay.value(at_step(n, f"{which}.{part}")) for n in range(step))
                tables.append(torch.cat(list(held), dim=-2).to(k.dtype))
            return rotate(k, tables[0], tables[1], replay.setting.dialect)

        evidence = "keys that were turned already, turned again by their positions"
        yield Hypothesis("cached keys rotated again", evidence, with_keys(turned))
    yield Hypothesis(
        "last cached token lost", "its key is not there", with_keys(lambda k: k[:, :, :-1])
    )
    yield Hypothesis("last cached token lost", "its key is 0", with_keys(_without_last))
    for other in _other_layers(replay, layer):

        def theirs(k: Tensor, other: int = other) -> Tensor:
            leaf = "attn.k_rotated" if which else "attn.k"
            return _of_layer(replay, other, leaf, step).to(k.dtype)

        evidence = f"the cached keys are layer {other}'s"
        yield Hypothesis("cached keys of another layer", evidence, with_keys(theirs))


def cached_values(replay: Replay, name: str) -> Iterator[Hypothesis]:
    """z of a decoding step from values, or keys and values, that the cache does not hold right."""
    step, past = names.step_of(name), _past(replay, name)
    if not past:
        return
    layer = names.layer_of(name) or 0
    for other in _other_layers(replay, layer):

        def theirs(s: Setting, pattern: Tensor, v: Tensor, other: int = other) -> Tensor:
            cached = _of_layer(replay, other, "attn.v", step).to(v.dtype)
            v = torch.cat((cached, v[:, :, past:]), dim=2)
            return pattern @ repeat_heads(v, pattern.shape[1])

        evidence = f"the cached values are layer {other}'s"
        yield Hypothesis("cached values of another layer", evidence, given(theirs))

    def lost(replay: Replay, name: str) -> Tensor:
        """Softmax over the other keys, and their values."""
        masked = replay.value(sibling(name, "attn.masked_scores"))
        kept = torch.tensor([place for place in range(masked.shape[-1]) if place != past - 1])
        if sibling(name, "attn.pattern") in replay.observed:
            pattern = replay.observed[sibling(name, "attn.pattern")]
        else:
            pattern = apply(replay.setting, sibling(name, "attn.pattern"), (masked[..., kept],))
        return apply(replay.setting, name, (pattern, replay.arguments(name)[1][:, :, kept]))

    yield Hypothesis("last cached token lost", "neither its key nor its value is there", lost)
    zero = given(
        lambda s, pattern, v: (
            pattern
            @ repeat_heads(
                torch.cat((_without_last(v[:, :, :past]), v[:, :, past:]), 2), pattern.shape[1]
            )
        )
    )
    yield Hypothesis("last cached token lost", "its value is 0", zero)


def _past(replay: Replay, name: str) -> int:
    """How many tokens the cache held before the step of `name`."""
    earlier = range(names.step_of(name))
    return sum(replay.observed[at_step(n, "tokens")].shape[1] for n in earlier)


def _without_last(x: Tensor) -> Tensor:
    return torch.cat((x[:, :, :-1], torch.zeros_like(x[:, :, -1:])), dim=2)


def _other_layers(replay: Replay, layer: int) -> Iterator[int]:
    """The neighbours first, then the others."""
    count = replay.setting.config.n_layers
    yield from sorted((n for n in range(count) if n != layer), key=lambda n: abs(n - layer))


def _of_layer(replay: Replay, layer: int, leaf: str, step: int) -> Tensor:
    """Keys or values of another layer in the passes before a step, side by side."""
    held = (replay.value(at_step(n, f"layers.{layer}.{leaf}")) for n in range(step))
    return torch.cat(list(held), dim=2)
