"""Cross-entropy of a large vocabulary without its logits: a few rows of them at a time.

N tokens over a vocabulary of V need N × V logits, as many log-probabilities and as many gradients:
for GPT-2 and 1,024 tokens three times 206 MB in float32, more than all its activations. Here the
rows go through in chunks, and a chunk's gradients are taken while its logits are still there:

    hidden (N, C)  ┌───┐ × weightᵀ  ┌─────────────┐     loss += Σ logsumexp − logit of target
                   │ n │ ─────────→ │ logits n, V │ ──→ d hidden[n] = (softmax − target) weight
                   ├───┤            └─────────────┘     d weight   += (softmax − target)ᵀ hidden
                   │   │   the next n rows take its place

It is the arithmetic of `F.linear` and `F.cross_entropy`, in another order (the idea is known as
fused or chunked linear cross-entropy; Hsu et al., Liger Kernel, 2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.train.batches import IGNORED

CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MB in float32


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Summed cross-entropy in nats of logits hidden · weightᵀ; targets of IGNORED do not count.

    hidden (…, C), weight (V, C), targets (…); `chunk` rows at a time (default: as many as keep the
    logits at 2^24 elements). Under autocast the products are in its dtype; the softmax is in
    float32, or in float64 where `hidden` is.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    if hasattr(weight, "device_mesh"):  # a DTensor: each rank has a slice of the vocabulary
        from pellucid.train.parallel.vocabulary import split_linear_cross_entropy

        return split_linear_cross_entropy(rows, weight, targets.reshape(-1), CHUNK_ELEMENTS)
    chunk = chunk or max(1, CHUNK_ELEMENTS // len(weight))
    return _LinearCrossEntropy.apply(rows, weight, targets.reshape(-1), chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    """See the module. rows (N, C) and weight (V, C) in the dtype of the products."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        for_rows, for_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        grad_rows = torch.empty_like(rows) if for_rows else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        with torch.autocast(rows.device.type, enabled=False):
            for first in range(0, len(rows), chunk):
                some, wanted = rows[first : first + chunk], targets[first : first + chunk]
                log_p = F.log_softmax(F.linear(some, weight), dim=-1, dtype=wide)  # (n, V)
                total += F.nll_loss(log_p, wanted, ignore_index=IGNORED, reduction="sum")
                if grad_rows is None and grad_weight is None:
                    continue
                errors = _errors(log_p, wanted).to(rows.dtype)
                if grad_rows is not None:
                    torch.mm(errors, weight, out=grad_rows[first : first + chunk])
                if grad_weight is not None:
                    grad_weight += errors.t() @ some
        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        grad_rows, grad_weight = ctx.saved_tensors
        return (
            None if grad_rows is None else grad_rows * grad.to(grad_rows.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def _errors(log_p: Tensor, targets: Tensor) -> Tensor:
    """softmax − target of log-probabilities (n, V), in their memory; 0 where none is."""
    errors = log_p.exp_()
    counted = targets != IGNORED
    place = targets.clamp(min=0)[:, None]
    errors.scatter_add_(1, place, -counted[:, None].to(errors.dtype))
    if not counted.all():
        errors *= counted[:, None]
    return errors
