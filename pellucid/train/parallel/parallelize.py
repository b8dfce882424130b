"""Spread a model over ranks: one function, read from top to bottom."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from pellucid.models import Config, Model
from pellucid.train.data.batches import Batch
from pellucid.train.objective import Objective
from pellucid.train.parallel.layout import RankGrid
from pellucid.train.parallel.ranks import DistributedRanks
from pellucid.train.parallel.recompute import recompute_blocks
from pellucid.train.parallel.tensor import split_matrices
from pellucid.train.precision import own_compiler_cache


def parallelize(
    model: Model,
    ranks: DistributedRanks,
    objective: Objective,
    *,
    recompute: bool = False,
    compile: bool = False,
    bfloat16: bool = False,
) -> Objective:
    """Spread `model`, in place, over `ranks`; the objective to train it with.

    recompute  activation checkpointing of every block
    compile    torch.compile of every block
    bfloat16   FSDP2 gathers parameters in bfloat16, sums gradients in float32 (without FSDP2
               autocast is the way, and the loop's business)

    Every rank must hold the same weights before. Make the optimiser afterwards: parameters are
    other objects then. ValueError where the model does not divide among the ranks.
    """
    layout, mesh = ranks.layout, ranks.mesh
    check(model.config, layout, compile=compile)
    ranks.model = model

    # 1. Tensor parallelism first: it exchanges modules' parameters for slices, and whatever wraps
    #    the blocks later must already see the slices.
    if layout.tensor > 1:
        split_matrices(model, mesh["tensor"])

    # 2. Activation checkpointing inside the compiled region, so that the compiler sees what is
    #    computed twice; and inside FSDP2's hooks, which must not run a second time with the block.
    if recompute:
        recompute_blocks(model)

    # 3. Compile each block, not the model: blocks are alike, one graph serves all. The forward
    #    only, so that FSDP2's hooks around a block stay outside of the graph.
    if compile:
        own_compiler_cache()
        for block in model.layers:
            block.forward = torch.compile(block.forward)

    # 4. Data parallelism last, around everything. FSDP2: a block's parameters are gathered just
    #    before it runs, in forward and again in backward; what is outside blocks, at the root.
    if layout.sharded:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bfloat16 else None,
            reduce_dtype=torch.float32 if bfloat16 else None,
            cast_forward_inputs=False,  # cos and sin stay float32; the rest has the weights' dtype
        )
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh["data"], mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # the loop divides, by what counts over all ranks
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        for method in ("hidden", "logits"):  # called apart from forward by objectives
            register_fsdp_forward_method(model, method)
    elif layout.data > 1:
        ranks.wrapped = _copied(_Step(model, objective), mesh.get_group("data"))
        return _through(ranks.wrapped)
    return objective


def check(config: Config, layout: RankGrid, *, compile: bool) -> None:
    """ValueError for what cannot be spread like that."""
    layout.check(config)
    if compile and layout.tensor > 1:
        raise ValueError(
            "the compiler does not take blocks whose matrices are cut (DTensors in and around "
            "them): train tensor-parallel without compile, or share the weights by fsdp alone"
        )


class _Step(nn.Module):
    """Model and objective as one module: what is called between forward and backward is inside,
    and DDP sees every use of the parameters."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """Sum of losses and their number."""
        return self.objective(self.model, batch)


def _copied(step: _Step, group: dist.ProcessGroup) -> DistributedDataParallel:
    # Gradients as views of the buckets that are exchanged: no second copy of them.
    wrapped = DistributedDataParallel(step, process_group=group, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(group, _summed)
    return wrapped


def _through(wrapped: DistributedDataParallel) -> Objective:
    def objective(model: Model, batch: Batch) -> tuple[Tensor, int]:
        return wrapped(batch)

    return objective


def _summed(group, bucket):  # without annotations: DDP compares them, and as text they differ
    """Add a bucket of gradients over all ranks; DDP's own way would divide by their number."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None, "an asynchronous reduction has a handle"
    return work.get_future().then(lambda done: done.value()[0])
