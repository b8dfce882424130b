"""Decoding steps by the fast way where there is one, and the reason where there is none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pellucid import trace
from pellucid.generate import native
from pellucid.models import Cache, Model
from pellucid.trace import Trace


class FastSteps:
    """Runs one-token steps of a generation in C, or says that it does not.

    The library is compiled once per machine. Until it is there, and wherever it cannot run a model,
    steps stay with the model's own code, which gives the same logits up to rounding.
    """

    def __init__(self, model: Model, length: int, wanted: bool | None) -> None:
        """length: of the longest row, in tokens; wanted: None where possible, True, or False never.

        ValueError where it is wanted and not possible, with the reason.
        """
        self._model, self._length = model, length
        self._decoder: native.Decoder | None = None
        self._possible = wanted is not False
        if not self._possible:
            return
        problem = native.unsupported(model)
        if wanted and problem:
            raise ValueError(f"the fast engine cannot run this model: {problem}")
        self._possible = problem is None
        if wanted:
            try:
                native.library()
            except native.NotBuilt as reason:
                raise ValueError(f"the fast engine is not available: {reason}") from None

    def step(
        self,
        tokens: Sequence[int],
        cache: Cache,
        starts: Sequence[int],
        recording: native.Recording | None = None,
    ) -> Tensor | None:
        """One token per row after what `cache` holds -> logits (B, V), or None: not this way.

        An open trace is for the model's own code, which names its steps.
        """
        if not self._possible or trace.is_open() or len(tokens) > native.MOST_ROWS:
            return None
        if self._decoder is None:
            made = native.building().ready()
            if made is None:
                return None
            self._decoder = native.Decoder(made, self._model, length=self._length)
        seen = cache.length
        if seen >= self._length:
            return None
        cache.reserve(min(self._length, max(seen + 64, 2 * seen)))
        return self._decoder.step(tokens, cache, starts, recording)


def trace_fast(model: Model, prompt: Sequence[int], tokens: Sequence[int]) -> Trace:
    """Every tensor the C decoder names while it runs `tokens` after `prompt`.

    The prompt's own pass is the model's code and is recorded as step 0; token i is step i + 1. The
    C code computes attention without writing down scores and pattern, so these are not in it.
    Raises ValueError where the fast engine cannot run the model.
    """
    import torch

    cache, length = Cache(model.config.n_layers), len(prompt) + len(tokens)
    steps = FastSteps(model, length, wanted=True)
    with trace.trace(model, fused=True) as seen:
        model(torch.tensor([list(prompt)]), cache=cache)
    for number, token in enumerate(tokens, 1):
        recording, place = native.Recording(), cache.length
        logits = steps.step([token], cache, [0], recording)
        assert logits is not None, "a model that was accepted is decoded"
        found = {"tokens": torch.tensor([[token]]), "positions": torch.tensor([place])}
        found |= recording.named() | {"logits": logits[:, None]}
        for name, value in found.items():
            value = value if name in ("tokens", "positions") else value.to(model.norm.weight.dtype)
            seen[f"step.{number}.{name}"] = value
    return seen
