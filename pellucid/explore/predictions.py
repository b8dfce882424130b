"""What a model expects next: the likeliest tokens of logits (V), and how sure it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.language_model import LanguageModel


def text_of(lm: LanguageModel, id: int) -> str:
    """The text of a token; of an id that only the padding of the embedding has, its number."""
    try:
        return lm.tokenizer.token_string(id)
    except ValueError:
        return f"[{id}]"


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def likeliest(lm: LanguageModel, logits: Tensor, top: int) -> list[dict[str, Any]]:
    """The `top` likeliest tokens of logits (V), with text, logit and probability."""
    return likeliest_of_rows(lm, logits[None], top)[0]


def likeliest_of_rows(lm: LanguageModel, logits: Tensor, top: int) -> list[list[dict[str, Any]]]:
    """`likeliest` of each row of logits (rows, V), most of the work done for all rows at once."""
    logits = wide(logits)
    best = logits.topk(max(0, min(top, logits.shape[-1])))
    shares = logits.softmax(-1).gather(-1, best.indices)
    texts = {id: text_of(lm, id) for id in set(best.indices.flatten().tolist())}
    return [
        [
            {"id": id, "text": texts[id], "logit": logit, "probability": share}
            for id, logit, share in zip(*row, strict=True)
        ]
        for row in zip(*(t.tolist() for t in (best.indices, best.values, shares)), strict=True)
    ]


def entropy(logits: Tensor) -> float:
    """Of the distribution that logits (V) stand for, in nats."""
    chances = wide(logits).double().log_softmax(-1)
    return float(-(chances.exp() * chances.clamp(min=-1e300)).sum())
