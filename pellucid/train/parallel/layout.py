"""How ranks share the work: over rows of the batch, over slices of the weights, or both.

A rank is one process with one card. Ranks stand in a grid of `data` × `tensor`:

    data  = 2   rows of the batch are split     │ rank 0   rank 1 │  the same rows,
    tensor = 2  matrices are split              │ rank 2   rank 3 │  each its slice of the matrices

Tensor parallelism cuts a pair of matrices so that nothing has to be exchanged between them
(Shoeybi et al., Megatron-LM, 2019): the first by its outputs, the second by its inputs.

    x ── q, k, v: whole heads of this rank ── attention ── o: a part of the sum ── all-reduce
    x ── gate, up: F / t hidden numbers ───── act · up ─── down: a part of the sum ── all-reduce
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pellucid.models import Config

Shape = tuple[int, ...]

BY_OUTPUT = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_INPUT = ("attn.o_proj", "mlp.down_proj")
BY_VOCABULARY = ("embed", "unembed")


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """The grid of ranks, and whether the ranks of one column share parameters.

    data     ranks over which rows of the batch are split
    tensor   ranks over which every matrix is split
    sharded  parameters, gradients and optimiser states split over the `data` ranks (FSDP2, the
             third stage of Rajbhandari et al., ZeRO, 2020) instead of a copy on each (DDP)
    """

    data: int = 1
    tensor: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.data < 1 or self.tensor < 1:
            raise ValueError(f"{self.data} × {self.tensor} ranks: expected 1 or more of each")
        if self.tensor > 1 and self.data > 1 and not self.sharded:
            raise ValueError(
                f"{self.tensor} tensor-parallel ranks with {self.data} copies of the model: DDP "
                "does not take split matrices; shard over the data ranks instead (fsdp)"
            )

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.data * self.tensor

    def check(self, config: Config) -> None:
        """ValueError unless a model of `config` splits evenly over the tensor ranks."""
        for what, count in (
            ("query heads", config.n_heads),
            ("key/value heads", config.n_kv_heads),
            ("hidden width", config.hidden_width),
        ):
            if count % self.tensor:
                raise ValueError(
                    f"{what} {count} do not divide among {self.tensor} tensor-parallel ranks: "
                    f"choose a divisor of {count}"
                )


def split_axis(parameter: str) -> int | None:
    """The axis along which tensor parallelism cuts a parameter: 0, 1, or None for a copy each.

    A weight is (outputs, inputs); the bias of a matrix that is cut by its inputs is added once,
    after the sum, so each rank has it whole.
    """
    module, kind = parameter.rsplit(".", 1)
    inside = re.sub(r"^layers\.\d+\.", "", module)
    if inside in BY_OUTPUT or inside in BY_VOCABULARY:
        return 0
    return 1 if inside in BY_INPUT and kind == "weight" else None


def local_shapes(shapes: Mapping[str, Shape], layout: RankGrid) -> dict[str, Shape]:
    """The shape of each parameter on rank 0, which holds the most where a cut is uneven.

    First the tensor-parallel cut, then FSDP2's, which is always along axis 0.
    """
    return {name: _local(name, shape, layout) for name, shape in shapes.items()}


def _local(name: str, shape: Shape, layout: RankGrid) -> Shape:
    sizes = list(shape)
    axis = split_axis(name)
    if axis is not None:
        sizes[axis] = -(-sizes[axis] // layout.tensor)
    if layout.sharded:
        sizes[0] = -(-sizes[0] // layout.data)
    return tuple(sizes)
