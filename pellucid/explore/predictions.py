"""What a model expects next: the likeliest tokens of logits (V), and how sure it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.explore.runs import Run
from pellucid.language_model import LanguageModel


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def likeliest(run: Run, logits: Tensor, top: int) -> list[dict[str, Any]]:
    """The `top` likeliest tokens of logits (V), with text, logit and probability."""
    return alternatives_of(run.loaded.lm, logits, max(1, top))


def alternatives_of(lm: LanguageModel, logits: Tensor, top: int) -> list[dict[str, Any]]:
    """As `likeliest`, of a model's logits (V)."""
    logits = wide(logits)
    shares = logits.softmax(-1)
    best = logits.topk(min(top, len(logits))).indices
    text = lm.tokenizer.token_string
    return [
        {"id": id, "text": text(id), "logit": float(logits[id]), "probability": float(shares[id])}
        for id in best.tolist()
    ]


def entropy(logits: Tensor) -> float:
    """Of the distribution that logits (V) stand for, in nats."""
    chances = wide(logits).double().log_softmax(-1)
    return float(-(chances.exp() * chances.clamp(min=-1e300)).sum())
