"""Hugging Face transformers as an engine: SDPA attention, its KV cache, one call per step.

The loop is written out instead of calling ``model.generate``, whose checks between the steps cost
a little more: these are the faster numbers. `compiled` compiles the one-token step over a static
cache, as its own documentation proposes; the prefill stays eager.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Runner:
    """A transformers model with greedy choice."""

    def __init__(self, path: Path, threads: int, dtype: str, compiled: bool) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        torch.set_num_threads(threads)
        self._library: Any = import_module("transformers")
        self._library.utils.logging.disable_progress_bar()
        self._path, self._dtype, self._compiled = path, getattr(torch, dtype), compiled
        self._static: dict[tuple[int, int], Any] = {}

    def prepare(self) -> dict[str, Any]:
        """Load with from_pretrained."""
        self._model = self._library.AutoModelForCausalLM.from_pretrained(
            self._path, dtype=self._dtype, attn_implementation="sdpa"
        ).eval()
        self._step: Callable[..., Any] = self._model
        if self._compiled:
            self._step = torch.compile(self._model.forward, dynamic=False)
        cache = "static cache, compiled step" if self._compiled else "dynamic cache"
        return {
            "decode_bytes": self._decode_bytes(),
            "settings": f"transformers {self._library.__version__}, sdpa, {cache}",
        }

    def _decode_bytes(self) -> int:
        """Every parameter but tables of which a step reads one row; a tied table is the head."""
        tied = (
            self._model.get_output_embeddings().weight is self._model.get_input_embeddings().weight
        )
        looked_up = ("wpe.weight",) if tied else ("wpe.weight", "wte.weight", "embed_tokens.weight")
        return sum(
            parameter.nbytes
            for name, parameter in self._model.named_parameters()
            if not name.endswith(looked_up)
        )

    def settle(self) -> None:
        """No warm-up is needed."""

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Sequence[int]], new: int) -> list[int]:
        """One pass over the prompts, logits of the last token only."""
        tokens = torch.tensor(rows)
        self._length = tokens.shape[1]
        self._cache = self._new_cache(tokens.shape[0], tokens.shape[1] + new + 1)
        return self._choose(self._model, tokens)

    @torch.inference_mode()
    def decode(self, n: int) -> list[list[int]]:
        """`n` passes of one token per row."""
        return [self._choose(self._step, self._chosen) for _ in range(n)]

    def _new_cache(self, rows: int, room: int) -> Any:
        if not self._compiled:
            return self._library.DynamicCache(config=self._model.config)
        room = -(-room // 256) * 256  # few sizes: each is compiled for once
        if (rows, room) not in self._static:
            self._static[rows, room] = self._library.StaticCache(
                config=self._model.config, max_cache_len=room
            )
        self._static[rows, room].reset()
        return self._static[rows, room]

    def _choose(self, step: Callable[..., Any], tokens: Tensor) -> list[int]:
        place: dict[str, Any] = {}
        if self._compiled:
            place["cache_position"] = torch.arange(self._length - tokens.shape[1], self._length)
        out = step(
            input_ids=tokens,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **place,
        )
        self._length += 1
        self._chosen = out.logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
        return self._chosen[:, 0].tolist()

    def close(self) -> None:
        """Nothing to release: memory goes with the object."""
