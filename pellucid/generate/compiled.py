"""Decoding steps as one compiled graph, replayed as a CUDA graph: the fast way on a GPU.

A graph is fixed: the same tensors at the same addresses with the same shapes in every step. So the
KV cache has all its room from the beginning, the position is a number on the device, and attention
looks at the whole room through a mask. The layers are the model's own; only what a pass works out
in Python (positions, mask, where the cache ends) is done anew, in tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid.models import Cache, Model
from pellucid.models.attention import Mask
from pellucid.models.cache import LayerCache


class FixedLayer(LayerCache):
    """Keys and values of one layer with all their room, written at a position on the device."""

    def __init__(self, past: LayerCache, room: int, position: Tensor) -> None:
        super().__init__()
        assert past.k is not None and past.v is not None, "a decoding step follows a first pass"
        self.k, self.v = past._grown(past.k, room), past._grown(past.v, room)
        self.k[:, :, past.length :] = 0  # looked at through the mask: numbers, though unused
        self.v[:, :, past.length :] = 0
        self.position, self.room = position, room
        from torch._dynamo import mark_static_address

        for held in (self.k, self.v):  # a CUDA graph may write into what never moves
            mark_static_address(held)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, Hkv, 1, D) of this step; return the whole room, (B, Hkv, room, D)."""
        assert self.k is not None and self.v is not None, "made with all its room"
        self.k.index_copy_(2, self.position, k)
        self.v.index_copy_(2, self.position, v)
        return self.k, self.v


def decode_step(
    model: Model, tokens: Tensor, position: Tensor, starts: Tensor, layers: Sequence[FixedLayer]
) -> Tensor:
    """tokens (B, 1) at `position` (1) of the cache -> logits (B, V); starts (B): padding before."""
    place = torch.arange(layers[0].room, device=tokens.device)
    allowed = (place <= position) & (place >= starts[:, None])  # (B, room)
    mask = Mask(allowed[:, None, None, :], plain=False)
    positions = (position - starts)[:, None]  # (B, 1)
    x = model.embedded(tokens, positions, 0)
    places = model.places(positions, mask, x.dtype, end=position)
    for layer, kind, cache in zip(model.layers, model.kinds, layers, strict=True):
        x = layer(x, places[kind], cache)
    return model.logits(model.norm(x))[:, -1]


class CompiledSteps:
    """Steps of one generation through `decode_step`, compiled once for its shapes."""

    def __init__(self, model: Model, cache: Cache, room: int, *, backend: Any = None) -> None:
        """room: tokens the cache will hold at the end. The cache is taken over as it is now.

        backend: of ``torch.compile``; None is its own with CUDA graphs.
        """
        device = model.device
        self._model, self.cache = model, cache
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._layers = [FixedLayer(layer, room, self._position) for layer in cache.layers]
        how: dict[str, Any] = {"backend": backend} if backend else {"mode": "reduce-overhead"}
        self._step = torch.compile(decode_step, fullgraph=True, dynamic=False, **how)

    @torch.no_grad()
    def step(self, tokens: Sequence[int], cache: Cache, starts: Sequence[int]) -> Tensor:
        """One token per row (B) -> logits (B, V); `cache` is one token longer afterwards."""
        device = self._position.device
        self._position.fill_(cache.length)
        logits = self._step(
            self._model,
            torch.tensor(tokens, device=device)[:, None],
            self._position,
            torch.tensor(starts, device=device),
            self._layers,
        )
        for held, fixed in zip(cache.layers, self._layers, strict=True):
            held.k, held.v, held.length = fixed.k, fixed.v, held.length + 1
        return logits.clone()  # the graph writes into the same memory at its next replay
