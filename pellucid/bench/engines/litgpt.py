"""LitGPT as an engine: its Llama with random weights of its own, its KV cache, one call per step.

Weights of LitGPT's layout would have to be converted first; random ones of the same shapes decode
at the same speed, so nothing is read and load times are not reported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Runner:
    """A LitGPT model with greedy choice."""

    def __init__(self, path: Path, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        self._library: Any = import_module("litgpt")
        self._path, self._dtype = path, getattr(torch, dtype)
        self._sized = (0, 0)

    def prepare(self) -> dict[str, Any]:
        """Build the model; ValueError for one with another MLP or other norms than a Llama."""
        stated = json.loads((self._path / "config.json").read_text("utf-8"))
        if stated.get("hidden_act") != "silu" or "rms_norm_eps" not in stated:
            raise ValueError(f"LitGPT's arguments here are a Llama's, not {stated['model_type']}'s")
        config = self._library.Config(
            name="bench",
            block_size=stated["max_position_embeddings"],
            vocab_size=stated["vocab_size"],
            padded_vocab_size=stated["vocab_size"],
            n_layer=stated["num_hidden_layers"],
            n_head=stated["num_attention_heads"],
            n_query_groups=stated["num_key_value_heads"],
            n_embd=stated["hidden_size"],
            head_size=stated["head_dim"],
            intermediate_size=stated["intermediate_size"],
            norm_eps=stated["rms_norm_eps"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
        torch.set_default_dtype(self._dtype)
        self._model = self._library.GPT(config).eval()
        torch.set_default_dtype(torch.float32)
        table = self._model.transformer.wte.weight.nbytes
        held = sum(parameter.nbytes for parameter in self._model.parameters())
        return {"decode_bytes": held - table, "settings": "litgpt, its KV cache, random weights"}

    def settle(self) -> None:
        """No warm-up is needed."""

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Sequence[int]], new: int) -> list[int]:
        """One pass over the prompts into a cache of the whole room."""
        tokens = torch.tensor(rows)
        batch, length = tokens.shape
        room = length + new + 1
        if self._sized != (batch, room):
            self._model.max_seq_length = room
            self._model.set_kv_cache(batch_size=batch, max_seq_length=room, dtype=self._dtype)
            self._sized = (batch, room)
        self._length = 0
        return self._choose(tokens)

    @torch.inference_mode()
    def decode(self, n: int) -> list[list[int]]:
        """`n` passes of one token per row."""
        return [self._choose(self._chosen) for _ in range(n)]

    def _choose(self, tokens: Tensor) -> list[int]:
        positions = torch.arange(self._length, self._length + tokens.shape[1])
        self._length += tokens.shape[1]
        logits = self._model(tokens, positions, input_pos_maxp1=self._length)  # (B, T, V)
        self._chosen = logits[:, -1].argmax(-1, keepdim=True)
        return self._chosen[:, 0].tolist()

    def close(self) -> None:
        """Nothing to release: memory goes with the object."""
