"""Cross-entropy where each rank has a slice of the vocabulary: no rank ever holds all logits.

A row's softmax needs two numbers from the others, its largest logit and the sum of exponentials,
and the target's logit from the one rank that has it (Shoeybi et al., Megatron-LM, 2019, section 3).

    rank 0   logits n, V/2  ┐ max  ┐ Σ exp(logit − max)  ┐ logit of target ┐
    rank 1   logits n, V/2  ┘      ┘                     ┘                 ┘ all-reduced, (n) each
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from pellucid.train.data.batches import IGNORED


def split_linear_cross_entropy(
    rows: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int
) -> Tensor:
    """`linear_cross_entropy` of rows (N, C), alike on every rank, and a weight (V, C) cut along V.

    targets (N); at most `chunk_bytes` of logits at a time on a rank. The same scalar on each rank.
    """
    assert isinstance(weight, DTensor), "a weight that several ranks hold is a DTensor"
    (placement,) = weight.placements
    assert placement.is_shard(0), f"the head is cut along the vocabulary, not {placement}"
    mesh = weight.device_mesh
    largest = -(-weight.shape[0] // mesh.size())  # DTensor cuts like torch.chunk
    first = min(mesh.get_local_rank() * largest, weight.shape[0])
    chunk = max(1, chunk_bytes // (largest * rows.element_size()))
    slice_ = weight.to_local()
    return _Split.apply(rows, slice_, targets, first, chunk, mesh.get_group())


class _Split(torch.autograd.Function):
    """rows (N, C) in the products' dtype; weight (v, C), the tokens from `first` on, in its own."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        first: int,
        chunk: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        grads = any(ctx.needs_input_grad[:2])
        grad_rows = torch.zeros_like(rows) if grads else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if grads else None
        with torch.autocast(rows.device.type, enabled=False):
            narrow = weight.to(rows.dtype)
            for begin in range(0, len(rows), chunk):
                some, wanted = rows[begin : begin + chunk], targets[begin : begin + chunk]
                loss, errors = _chunk(F.linear(some, narrow).to(wide), wanted, first, group)
                total += loss
                if grad_rows is None or grad_weight is None:
                    continue
                errors = errors.to(rows.dtype)
                grad_rows[begin : begin + chunk] = errors @ narrow
                grad_weight += errors.t() @ some
        if grad_rows is not None:
            dist.all_reduce(grad_rows, group=group)  # each rank knows its slice's part of the sum
        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_rows, grad_weight = ctx.saved_tensors
        rows = grad_rows * grad.to(grad_rows.dtype)
        return rows, (grad_weight * grad).to(ctx.weight_dtype), None, None, None, None


def _chunk(
    logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Summed loss of all ranks' logits (n, v), and softmax − target of this rank's slice."""
    low = torch.finfo(logits.dtype).min  # a rank may have no token at all
    top = logits.amax(-1) if logits.shape[1] else logits.new_full((len(logits),), low)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)  # (n)
    errors = (logits - top[:, None]).exp_()
    counted = targets != IGNORED
    here = counted & (targets >= first) & (targets < first + logits.shape[1])
    row, place = here.nonzero()[:, 0], targets[here] - first
    wanted = torch.zeros_like(top)
    wanted[row] = logits[row, place] - top[row]
    shared = torch.stack((errors.sum(-1), wanted))  # (2, n): one exchange for both
    dist.all_reduce(shared, group=group)
    total, wanted = shared
    errors /= total[:, None]
    errors[row, place] -= 1
    errors *= counted[:, None]
    return (total.log() - wanted)[counted].sum(), errors
