"""A KV cache in blocks of tokens: memory follows the tokens held, and equal beginnings share it.

text A   ▐ block 0 ▌▐ block 1 ▌▐ block 2  ·▌        a block holds BLOCK tokens of all layers
text B   ▐ block 0 ▌▐ block 1'    ▌                 block 0 is A's own; block 1, in which B
                                                    parts from A, was copied to be written on
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.models import Cache, Model
from pellucid.models.cache import LayerCache

BLOCK = 64  # tokens, as in decode.c


class PagedCache(Cache):
    """The cache of one text; `blocks` are tensors (layers, 2, Hkv, BLOCK, D) of keys and values.

    A block is let go with the last cache that holds it. Those of another text are never written:
    what follows the tokens shared goes into blocks of its own.
    """

    def __init__(self, model: Model) -> None:
        config = model.config
        self.layers = [PagedLayer(self, number) for number in range(config.n_layers)]
        self.blocks: list[Tensor] = []
        self._shape = config.n_layers, 2, config.n_kv_heads, BLOCK, config.head_dim
        self._like = torch.empty(0, dtype=model.dtype, device=model.device)

    @property
    def tensors(self) -> list[Tensor]:
        """All its blocks, shared ones too."""
        return self.blocks

    def reserve(self, length: int) -> None:
        """Blocks for `length` tokens."""
        while len(self.blocks) * BLOCK < length:
            self.blocks.append(self._like.new_empty(self._shape))

    def shared(self, length: int) -> PagedCache:
        """A cache of the first `length` tokens: whole blocks are the same, the last is copied."""
        made = PagedCache.__new__(PagedCache)
        made.layers = [PagedLayer(made, number) for number in range(len(self.layers))]
        made.blocks = self.blocks[: length // BLOCK]
        made._shape, made._like = self._shape, self._like
        if length % BLOCK:
            made.blocks.append(self.blocks[length // BLOCK].clone())
        for layer in made.layers:
            layer.length = length
        return made


class PagedLayer(LayerCache):
    """One layer of a `PagedCache`."""

    def __init__(self, cache: PagedCache, number: int) -> None:
        super().__init__()
        self._cache, self._number = cache, number

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (1, Hkv, T, D) of this pass; return all so far, (1, Hkv, S, D)."""
        first, end = self.length, self.length + k.shape[2]
        self._cache.reserve(end)
        while self.length < end:
            block, inside = divmod(self.length, BLOCK)
            some = min(end - self.length, BLOCK - inside)
            taken = slice(self.length - first, self.length - first + some)
            place = self._cache.blocks[block][self._number, :, :, inside : inside + some]
            place[0], place[1] = k[0, :, taken], v[0, :, taken]
            self.length += some
        if first == 0:
            return k, v
        held = [block[self._number] for block in self._cache.blocks[: -(-end // BLOCK)]]
        both = torch.cat(held, dim=2)[:, None, :, :end]  # (2, 1, Hkv, S, D)
        return both[0], both[1]
