"""A model with its tokenizer: the object most people hold.

`load` opens a checkpoint; `LanguageModel` joins what the floors below do apart: generating, tracing
and walking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pellucid
from pellucid import checkpoints, tokenizers
from pellucid.trace import Edit, Globs, Trace, estimated_bytes, trace

if TYPE_CHECKING:
    from pellucid.checkpoints import Checkpoint
    from pellucid.models import Config, Model
    from pellucid.reference import Step
    from pellucid.tokenizers import Tokenizer

Prompt = str | Sequence[int]


def load(
    source: str | Path = "demo",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dialect: str | None = None,
) -> LanguageModel:
    """Open a model: a folder in Meta's or Hugging Face's layout, ``owner/name``, or a demo.

    dtype    "float32", "bfloat16", …; None keeps the checkpoint's own, without a second copy
    dialect  whose rounding: "meta", "hf", "notebook"; None takes the layout's

    Raises ValueError or OSError, in one clear line, for a checkpoint that is not whole.
    """
    checkpoint = checkpoints.open_checkpoint(source)
    model = checkpoints.load_model(
        checkpoint, dtype=as_dtype(dtype), device=torch.device(device), dialect=dialect
    )
    return LanguageModel(model, tokenizers.load(checkpoint.folder), checkpoint)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name; ValueError for a name that is no floating-point dtype."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"unknown dtype {dtype!r}: expected float32, bfloat16, float16, float64")
        return found
    return dtype
