"""What a difference does in the end: to the distribution of the next token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.diff.replay.operations import leaf
from pellucid.diff.report import Effect
from pellucid.trace import Trace


def effect(seen_a: Trace, seen_b: Trace, padding: Tensor | None) -> Effect | None:
    """KL(A ‖ B) in nats per position, and how often both would say the same next token."""
    pairs = list(_logit_pairs(seen_a, seen_b, padding))
    if not pairs:
        return None
    divergence = torch.cat([_kl(x, y) for x, y in pairs])
    agree = torch.cat([x.argmax(-1) == y.argmax(-1) for x, y in pairs])
    return Effect(
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1=float(agree.double().mean()),
    )


def _logit_pairs(
    seen_a: Trace, seen_b: Trace, padding: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    for name in seen_a:
        if not graph.known(name) or leaf(name) != "logits" or name not in seen_b:
            continue
        x, y = seen_a[name].double(), seen_b[name].double()
        x = x[:, -1:] if y.shape[1] == 1 and names.step_of(name) == 0 else x  # its last row alone
        if x.shape[:2] != y.shape[:2]:
            continue
        width = min(x.shape[-1], y.shape[-1])
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        if padding is not None and names.step_of(name) == 0 and x.shape[1] > 1:
            real = torch.arange(x.shape[1])[None] >= padding[:, None]
        yield x[real][:, :width], y[real][:, :width]


def _kl(x: Tensor, y: Tensor) -> Tensor:
    p, q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)
