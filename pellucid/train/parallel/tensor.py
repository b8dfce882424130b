"""Tensor parallelism: which matrices are cut, and what stands in for a head that is tied.

Outside the cut pairs every rank of a group computes the same, on plain tensors; inside, each has
some of the heads and some of the hidden numbers, so nothing in the models changes.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from pellucid.models import Model
from pellucid.train.parallel.layout import BY_INPUT, BY_OUTPUT


def split_matrices(model: Model, mesh: DeviceMesh) -> None:
    """Cut the matrices of `model`, in place, over the ranks of the one-dimensional `mesh`."""
    whole = Replicate()
    for block in model.layers:
        styles = {name: ColwiseParallel() for name in BY_OUTPUT}
        styles |= {name: RowwiseParallel() for name in BY_INPUT}
        styles |= {"attn_norm": Copied(), "mlp_norm": Copied()}
        there = dict(block.named_modules())
        parallelize_module(block, mesh, {name: styles[name] for name in styles if name in there})
    outside: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=whole, output_layouts=whole),  # rows of the table
        "pos_embed": Copied(),
        "norm": Copied(),
        "unembed": ColwiseParallel(output_layouts=whole),  # columns of the logits, then gathered
    }
    there = dict(model.named_children())
    parallelize_module(model, mesh, {name: outside[name] for name in outside if there.get(name)})
    if model.unembed is None:
        head: Any = _TiedHead(model.embed, mesh)
        model.unembed = head
    # FSDP2 hangs a hook on what a model returns, and a view could lose it: these two are no views.
    for module in (model.norm, model.unembed):
        assert module is not None, "a tensor-parallel model has a head of its own"
        module.register_forward_hook(lambda _, inputs, output: output.clone())


class Copied(ParallelStyle):
    """A module that every rank computes whole, its parameters on the mesh all the same.

    An optimiser and FSDP2 take a model whose parameters are all on one mesh.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def to_mesh(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> Any:
            return tuple(_on(mesh, tensor) for tensor in inputs)

        def to_plain(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Any:
            return output.to_local()

        return distribute_module(module, device_mesh, None, to_mesh, to_plain)


class _TiedHead(nn.Module):
    """A head whose weight is the embedding's: (V / t, C) on each rank; no parameter of its own."""

    def __init__(self, embed: nn.Embedding, mesh: DeviceMesh) -> None:
        super().__init__()
        self._embed, self._mesh = (embed,), mesh  # in a tuple, so that it is no submodule

    @property
    def weight(self) -> Tensor:
        """The embedding's."""
        return self._embed[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V), gathered from all ranks."""
        logits = F.linear(_on(self._mesh, x), self.weight)
        assert isinstance(logits, DTensor), "the embedding of a tensor-parallel model is on a mesh"
        return logits.full_tensor()


def _on(mesh: DeviceMesh, tensor: Tensor) -> DTensor:
    """A tensor that every rank holds alike, on the mesh."""
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
