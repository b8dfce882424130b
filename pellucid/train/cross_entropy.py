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

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.train.data.batches import IGNORED

CHUNK_BYTES = 2**26  # of logits held at a time
SLICE = 2**13  # rows of the weight whose gradient is added at a time
BLOCK_ELEMENTS = 2**20  # of a softmax at a time, so that it stays in the processor's cache


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Summed cross-entropy in nats of logits hidden · weightᵀ; targets of IGNORED do not count.

    hidden (…, C), weight (V, C), targets (…); `chunk` rows at a time (default: as many as keep the
    logits at 64 MB). Under autocast the products are in its dtype; the softmax and the gradient of
    the weight are in float32, or in float64 where `hidden` is.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    if torch.is_autocast_enabled(hidden.device.type):
        rows = rows.to(torch.get_autocast_dtype(hidden.device.type))
    if hasattr(weight, "device_mesh"):  # a DTensor: each rank has a slice of the vocabulary
        from pellucid.train.parallel.vocabulary import split_linear_cross_entropy

        return split_linear_cross_entropy(rows, weight, targets.reshape(-1), CHUNK_BYTES)
    if chunk is None:
        bytes_ = len(rows) * len(weight) * rows.element_size()
        chunk = math.ceil(len(rows) / math.ceil(bytes_ / CHUNK_BYTES))
    return _LinearCrossEntropy.apply(rows, weight, targets.reshape(-1), chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    """See the module. rows (N, C) in the dtype of the products, weight (V, C) in its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        for_rows, for_weight = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(rows) if for_rows else None
        total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        ctx.grad_rows, ctx.grad_weight = grad_rows, None
        with torch.autocast(rows.device.type, enabled=False):
            narrow = weight.to(rows.dtype)
            for first in range(0, len(rows), chunk):
                some, wanted = rows[first : first + chunk], targets[first : first + chunk]
                logits = F.linear(some, narrow)  # (n, V)
                total += _losses_and_errors(logits, wanted, errors=for_rows or for_weight)
                if grad_rows is not None:
                    torch.mm(logits, narrow, out=grad_rows[first : first + chunk])
                if for_weight:
                    _add_product(ctx, logits, some, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # In place and given away: the weight's gradient is the largest tensor of a small model.
        (grad,) = grads
        if not hasattr(ctx, "grad_weight"):
            raise RuntimeError("this loss gave its gradients away: it has one backward pass")
        grad_rows, grad_weight = ctx.grad_rows, ctx.grad_weight
        del ctx.grad_rows, ctx.grad_weight
        for gradient in (grad_rows, grad_weight):
            if gradient is not None:
                gradient.mul_(grad)
        return grad_rows, grad_weight, None, None


def _add_product(ctx: Any, errors: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
    """grad_weight += errorsᵀ · rows; errors (n, V), rows (n, C)."""
    first = ctx.grad_weight is None
    if first:
        ctx.grad_weight = rows.new_empty((errors.shape[1], rows.shape[1]), dtype=dtype)
    for place in range(0, errors.shape[1], SLICE):  # a product in bfloat16 is added in float32
        some = ctx.grad_weight[place : place + SLICE]
        product = errors[:, place : place + SLICE].t() @ rows
        some.copy_(product) if first else some.add_(product)


def _losses_and_errors(logits: Tensor, targets: Tensor, *, errors: bool) -> Tensor:
    """Sum of the losses of logits (n, V); with `errors` they become softmax − target, in place."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = logits.new_zeros((), dtype=wide)
    block = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for first in range(0, len(logits), block):
        some, wanted = logits[first : first + block], targets[first : first + block]
        log_p = F.log_softmax(some, dim=-1, dtype=wide)
        total += F.nll_loss(log_p, wanted, ignore_index=IGNORED, reduction="sum")
        if errors:
            counted = (wanted != IGNORED)[:, None].to(wide)
            log_p.exp_().scatter_add_(1, wanted.clamp(min=0)[:, None], -counted)
            some.copy_(log_p.mul_(counted) if counted.min() == 0 else log_p)
    return total
