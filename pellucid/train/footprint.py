"""What a training pass holds in memory, measured on tensors that have shapes and no memory.

No formula for what autograd keeps stands beside the model: a model of two blocks and one of three
run forward and backward as fake tensors, and every allocation and release is counted. Blocks are
alike, so the rest is straight lines. A pass has two places where it can hold the most:

    bytes           ╱╲ loss, last block's backward: every block keeps something
                  ╱    ╲        ╱╲ the embedding's gradient: blocks are done
                ╱        ╲    ╱   ╲
              ╱ forward    ╲╱      ╲

What kernels use inside themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pellucid.models import Config, Model, build
from pellucid.train.data.batches import Batch
from pellucid.train.objective import Objective
from pellucid.train.parallel.layout import RankGrid, split_axis
from pellucid.train.parallel.recompute import recompute_blocks
from pellucid.train.precision import training_precision


class Ledger(TorchDispatchMode):
    """Counts bytes of live tensors while it is entered: `now`, and the `peak` since the last mark.

    Storages that are there before, `known` among them, are not counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.marked = 0
        self._bytes = {_identity(tensor): 0 for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and enter what it returns.

        A fake tensor has no value: a question for one (do all targets count?) is answered yes.
        """
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._enter(value)
        return result

    def mark(self) -> None:
        """Put the peak so far aside as `marked` and begin a new one."""
        self.marked, self.peak = self.peak, self.now

    def _enter(self, tensor: Tensor) -> None:
        identity = _identity(tensor)
        if identity in self._bytes:
            return  # a view, or a result written in place
        storage = tensor.untyped_storage()
        self._bytes[identity] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, identity)

    def _leave(self, identity: int) -> None:
        self.now -= self._bytes.pop(identity)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one pass forward and backward, without parameters, gradients and optimiser.

    Each pair is a straight line over the number of blocks: bytes of none, bytes of each.

    loss  until the last block's backward is done; its slope is what one block keeps
    end   from there to the end
    """

    loss: tuple[int, int]
    end: tuple[int, int]

    @property
    def per_block(self) -> int:
        """What one block keeps from its forward until its backward."""
        return self.loss[1]

    def total(self, blocks: int) -> int:
        """Bytes at the highest point for a model of so many blocks."""
        return max(fixed + blocks * each for fixed, each in (self.loss, self.end))


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One micro-batch as a rank computes it.

    rows, context   shape of the tokens, (B, T)
    bfloat16        activations in bfloat16; weights too where they are sharded (FSDP2 gathers them
                    in bfloat16), else as `training_precision` has it
    recompute       activation checkpointing of every block
    objective       (model, batch) -> (sum of losses, number of targets)
    """

    rows: int
    context: int
    objective: Objective
    layout: RankGrid
    bfloat16: bool = False
    recompute: bool = False


def footprint(config: Config, work: Pass) -> Footprint:
    """Measure what `work` holds for a model of `config`; nothing is allocated."""
    two, three = (peaks(replace(config, n_layers=blocks), work) for blocks in (2, 3))
    loss, end = ((a - 2 * (b - a), b - a) for a, b in zip(two, three, strict=True))
    return Footprint(loss=loss, end=end)


def peaks(config: Config, work: Pass, *, fake: bool = True) -> tuple[int, int]:
    """Most bytes that one pass holds before and after the last block's backward is done.

    With ``fake=False`` it really runs, on the CPU.

    Gradients are there from an earlier pass and are added to, as when they accumulate.
    """
    with FakeTensorMode() if fake else nullcontext():
        model = build(config).train()
        narrow(model, work.layout)
        if work.bfloat16 and work.layout.sharded:
            _to_bfloat16(model)
        if work.recompute:
            recompute_blocks(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tokens = torch.zeros(work.rows, work.context, dtype=torch.long)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        ledger = Ledger([*model.parameters(), *gradients, tokens])
        _on_backward_done(model.layers[-1], ledger.mark)
        cast = work.bfloat16 and not work.layout.sharded
        with ledger:
            with training_precision(model, cast):
                loss, _ = work.objective(model, Batch(tokens, tokens))
            loss.backward()
    return ledger.marked, ledger.peak


def _on_backward_done(block: nn.Module, call: Callable[[], None]) -> None:
    """Call `call` each time the gradient of `block`'s input is complete."""

    def watch(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        inputs[0].register_hook(lambda _: call())

    block.register_forward_pre_hook(watch)


def _to_bfloat16(model: Model) -> None:
    for module in model.modules():  # Module.to cannot change the dtype of fake parameters in place
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.bfloat16()))


def narrow(model: Model, layout: RankGrid) -> None:
    """Give `model`, in place, the matrices that one tensor-parallel rank holds."""
    if layout.tensor == 1:
        return
    for path, module in list(model.named_modules()):
        axis = split_axis(f"{path}.weight") if path else None
        if axis is None:
            continue
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent) if parent else model
        setattr(owner, name, _slice(module, axis, layout.tensor))


def _slice(module: nn.Module, axis: int, ranks: int) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return nn.Embedding(-(-module.num_embeddings // ranks), module.embedding_dim)
    assert isinstance(module, nn.Linear), f"{type(module).__name__} is not split over ranks"
    sizes = [module.out_features, module.in_features]
    sizes[axis] = -(-sizes[axis] // ranks)
    return nn.Linear(sizes[1], sizes[0], bias=module.bias is not None)
