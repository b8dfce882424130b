"""The seam between the loop and many processes: what a rank does that one process need not.

The loop asks a `Ranks` for its share of the rows and for sums over all ranks, the training state
asks for its slices of tensors, and nothing else of them changes. Here is the answer of one process;
the one for torch.distributed is in `parallel`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pellucid.models import Model
from pellucid.train.data.batches import Batch
from pellucid.train.slices import Slice, whole


class Ranks:
    """One process alone; a base for others.

    rank, world         which of the ranks that share the rows of a batch, from 0, and of how many
    process, processes  which of all processes, from 0, and of how many: several of them may compute
                        the same rows, each with its part of the matrices
    writes_rank         whether this is the one process that writes what those have alike
    """

    rank: int = 0
    world: int = 1
    process: int = 0
    processes: int = 1
    writes_rank: bool = True

    def rows(self, batch: Batch) -> Batch:
        """The rows of the batch that this rank computes: an even share, ranks in order."""
        share = len(batch.inputs) // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        documents = None if batch.documents is None else batch.documents[mine]
        return Batch(batch.inputs[mine], batch.targets[mine], documents)

    def sum(self, values: Tensor) -> Tensor:
        """`values` added over all ranks."""
        return values

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of one pass; only the `last` needs to exchange gradients."""
        return nullcontext()

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """After the last backward: every ``.grad`` becomes the sum over ranks, if it is not yet."""

    def gradient_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """Euclidean norm of the whole gradient, a float32 scalar."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def reshard(self, model: Model) -> None:
        """Let go of whole parameters that a forward pass left gathered: back to slices of them."""

    def slice_of(self, tensor: Tensor) -> Slice:
        """What this process has of a parameter, or of a tensor that is spread like one."""
        return whole(tensor)

    def gathered(self, found: Any) -> list[Any]:
        """What each process found, in their order; all of them call this together."""
        return [found]
