"""One step of the C decoder, and what is written down of it."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from pellucid import graph
from pellucid.names import layer_of

# What the C code writes down where the model has it, in the order of decode.c. Not among them:
# scores and pattern, which never exist as a whole, and logits, which a step returns.
LEAVES = (
    *("embed", "embed_normed", "embed_scaled"),
    *("resid_pre", "attn_norm", "attn.q", "attn.k", "attn.v", "attn.q_normed", "attn.k_normed"),
    *("attn.q_rotated", "attn.k_rotated", "attn.q_scaled", "attn.z", "attn.out", "attn_out"),
    *("resid_mid", "mlp_norm", "mlp.pre", "mlp.gate", "mlp.up", "mlp.act", "mlp.hidden"),
    *("mlp.out", "mlp_out", "resid_post", "final_norm", "raw_logits"),
)


class RowRequest(Structure):
    """``Row`` of decode.c: a text that the step makes longer, and its place in its cache."""

    _fields_ = (
        ("first", c_int32),
        ("length", c_int32),
        *((name, c_int64) for name in ("start", "seen", "capacity", "end")),
        ("blocks", c_void_p),
    )


class StepRequest(Structure):
    """``Step`` of decode.c: what one step is given, and where its results go."""

    _fields_ = (
        ("batch", c_int32),
        ("rows", c_int32),
        *((name, c_void_p) for name in ("tokens", "row_of", "row")),
        *((name, c_void_p) for name in ("keys", "values", "logits", "recorded")),
    )


class Recording:
    """The named tensors of a step that the C code computed; float32, under the names of a trace."""

    def prepare(self, step: StepRequest, config: Any, rows: int) -> None:
        """Room for everything, and the pointers to it; not filled: that would wake OpenMP."""
        self._names = [name for name in graph.expand(config) if graph.leaf(name) in LEAVES]
        sizes = graph.sizes(config, batch=rows, tokens=1, seen=1)
        self._buffers: dict[str, Tensor] = {}
        for name in self._names:
            leaf, layers = graph.leaf(name), 1 if layer_of(name) is None else config.n_layers
            if leaf not in self._buffers:  # of every layer: the C code counts by layers
                shape = tuple(sizes[letter] for letter in graph.dims(name))
                self._buffers[leaf] = torch.empty(layers, *shape)
        found = (self._buffers.get(leaf) for leaf in LEAVES)
        pointers = [None if buffer is None else buffer.data_ptr() for buffer in found]
        self._pointers = (c_void_p * len(pointers))(*pointers)
        step.recorded = ctypes.addressof(self._pointers)

    def named(self) -> dict[str, Tensor]:
        """Name -> tensor, in the order in which a forward pass computes them."""
        return {name: self._buffers[graph.leaf(name)][layer_of(name) or 0] for name in self._names}
