"""One step of the C decoder, and what is written down of it."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

# In the order of decode.c: leaf, and what its last axis is made of.
_LEAVES = (
    ("resid_pre", "width"),
    ("attn_norm", "width"),
    ("attn.q", "heads"),
    ("attn.k", "kv_heads"),
    ("attn.v", "kv_heads"),
    ("attn.q_rotated", "heads"),
    ("attn.k_rotated", "kv_heads"),
    ("attn.z", "heads"),
    ("attn_out", "width"),
    ("resid_mid", "width"),
    ("mlp_norm", "width"),
    ("mlp.gate", "hidden"),
    ("mlp.up", "hidden"),
    ("mlp.act", "hidden"),
    ("mlp.hidden", "hidden"),
    ("mlp_out", "width"),
    ("resid_post", "width"),
)
_ONLY_LLAMA = ("attn.q_rotated", "attn.k_rotated", "mlp.gate", "mlp.hidden")


class StepRequest(Structure):
    """``Step`` of decode.c: what one step is given, and where its results go."""

    _fields_ = (
        ("batch", c_int32),
        ("length", c_int32),
        ("tokens", c_void_p),
        ("starts", c_void_p),
        ("seen", c_int64),
        ("capacity", c_int64),
        *((name, c_void_p) for name in ("keys", "values", "logits", "recorded", "embedded")),
        ("final", c_void_p),
    )


class Recording:
    """The named tensors of a step that the C code computed; float32, under the names of a trace."""

    def prepare(self, step: StepRequest, config: Any, rows: int) -> None:
        """Room for everything, and the pointers to it; not filled: that would wake OpenMP."""
        heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        sizes = {"width": config.width, "heads": heads, "kv_heads": kv_heads}
        sizes["hidden"] = config.hidden_width
        self._config = config
        self._buffers = {
            leaf: torch.empty(config.n_layers, rows, sizes[kind]) for leaf, kind in _LEAVES
        }
        self._ends = {name: torch.empty(rows, config.width) for name in ("embed", "final_norm")}
        pointers = [buffer.data_ptr() for buffer in self._buffers.values()]
        self._pointers = (c_void_p * len(pointers))(*pointers)
        step.recorded = ctypes.addressof(self._pointers)
        step.embedded = self._ends["embed"].data_ptr()
        step.final = self._ends["final_norm"].data_ptr()

    def named(self) -> dict[str, Tensor]:
        """Name -> tensor, in the order in which a forward pass computes them."""
        found = {"embed": self._ends["embed"][:, None]}
        for layer in range(self._config.n_layers):
            for leaf, buffers in self._buffers.items():
                name = leaf
                if self._config.rope is None:
                    if leaf in _ONLY_LLAMA:
                        continue
                    name = "mlp.pre" if leaf == "mlp.up" else leaf  # its product is not gated
                value = buffers[layer][:, None]  # (B, 1, width)
                if leaf.startswith("attn."):
                    value = value.unflatten(-1, (-1, self._config.head_dim)).transpose(1, 2)
                found[f"layers.{layer}.{name}"] = value
        return found | {"final_norm": self._ends["final_norm"][:, None]}
