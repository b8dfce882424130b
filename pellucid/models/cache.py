"""The KV cache: keys and values of the tokens seen so far, one object per layer."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer; grows by doubling, so that appending costs little."""

    def __init__(self) -> None:
        self.k: Tensor | None = None  # (B, Hkv, capacity, D)
        self.v: Tensor | None = None
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v (B, Hkv, T, D) of this pass; return all so far, (B, Hkv, S, D)."""
        if self.k is None or self.v is None or k.requires_grad or v.requires_grad:
            # Under autograd nothing may be overwritten: earlier steps still need what they saw.
            self.k, self.v = self._joined(self.k, k), self._joined(self.v, v)
            self.length += k.shape[2]
            return self.k, self.v
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            capacity = max(end, 2 * self.k.shape[2])
            self.k, self.v = self._grown(self.k, capacity), self._grown(self.v, capacity)
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def begin(self, batch: int, kv_heads: int, room: int, like: Tensor, width: int) -> None:
        """Empty keys and values (B, Hkv, room, D) in the dtype and place of `like`."""
        self.k = like.new_empty(batch, kv_heads, room, width)
        self.v = like.new_empty(batch, kv_heads, room, width)

    def reserve(self, length: int) -> None:
        """Room for `length` tokens, row by row in memory, for code that writes there itself."""
        if self.k is None or self.v is None:
            return
        if length > self.k.shape[2] or not (self.k.is_contiguous() and self.v.is_contiguous()):
            self.k, self.v = self._grown(self.k, length), self._grown(self.v, length)

    def _joined(self, past: Tensor | None, new: Tensor) -> Tensor:
        # A copy even of the first keys: after `crop` the buffer is written again, and an
        # open trace, which may hold this tensor, must not see that.
        return new.clone() if past is None else torch.cat((past[:, :, : self.length], new), dim=2)

    def _grown(self, past: Tensor, capacity: int) -> Tensor:
        batch, heads, _, width = past.shape
        grown = past.new_empty(batch, heads, capacity, width)
        grown[:, :, : self.length] = past[:, :, : self.length]
        return grown


class Cache:
    """One `LayerCache` per layer, zipped with the layers by the model."""

    def __init__(self, n_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far, S."""
        return self.layers[0].length if self.layers else 0

    @property
    def tensors(self) -> list[Tensor]:
        """All that holds keys and values."""
        held = (tensor for layer in self.layers for tensor in (layer.k, layer.v))
        return [tensor for tensor in held if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values, spare capacity included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def shared(self, length: int) -> Cache:
        """The first `length` tokens, for another text to go on from: here a copy."""
        made = Cache(len(self.layers))
        for layer, own in zip(self.layers, made.layers, strict=True):
            assert layer.k is not None and layer.v is not None, "a cache that holds tokens"
            own.k, own.v = layer.k[:, :, :length].clone(), layer.v[:, :, :length].clone()
            own.length = length
        return made

    def reserve(self, length: int) -> None:
        """Room for `length` tokens in every layer, row by row in memory."""
        for layer in self.layers:
            layer.reserve(max(length, layer.length))

    def crop(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        for layer in self.layers:
            layer.length = length

    def uncrop(self, length: int) -> None:
        """Hold `length` tokens again: those a crop dropped, before anything else was appended."""
        for layer in self.layers:
            layer.length = length
