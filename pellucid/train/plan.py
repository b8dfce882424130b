"""What a training run needs before it starts: memory on each rank, and time.

Everything is counted on shapes: parameters on the meta device, activations by `footprint`. AdamW
keeps two numbers per parameter; parameters, gradients and both are float32 in every layout, and
bfloat16 is what matrices are multiplied in. Allocators, communication buffers and what kernels use
inside come on top: leave a tenth of the card free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from pellucid.models import Config, build
from pellucid.train.footprint import Footprint, Pass, footprint
from pellucid.train.objective import Objective
from pellucid.train.parallel.layout import RankGrid, Shape, local_shapes

FLOAT32 = 4  # bytes
ADAMW_STATES = 2  # the running means of the gradient and of its square


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the rank that holds the most, at the highest point of a training step.

    gathered     FSDP2 only: the parameters of two blocks, and of what is outside blocks, put
                 together for the moment they are used, and as many gradients before they are shared
    activations  what all blocks keep for backward
    working      logits and loss, or gradients under way in one block or the embedding: the most
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Work:
    """One optimiser step of a run.

    cards     ranks, one card each
    rows      rows of one pass on one data-parallel rank
    context   tokens per row
    batch     rows of an optimiser step over all ranks
    bfloat16  matrix products in bfloat16
    """

    cards: int
    rows: int
    context: int
    batch: int
    bfloat16: bool = True

    def __post_init__(self) -> None:
        for name in ("cards", "rows", "context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")

    @property
    def tokens(self) -> int:
        """Tokens of an optimiser step."""
        return self.batch * self.context

    def check(self, layout: RankGrid) -> None:
        """ValueError unless the batch divides into passes of `rows` on every data rank."""
        share = layout.data * self.rows
        if self.batch % share:
            raise ValueError(
                f"a batch of {self.batch} rows does not divide into passes of {self.rows} on "
                f"{layout.data} data-parallel ranks: choose a multiple of {share}"
            )


def layouts(config: Config, cards: int, tensor: int | None = None) -> dict[str, RankGrid]:
    """The ways to spread a model over `cards`, by the name ``train --parallel`` has for them.

    tensor  degree of tensor parallelism; None: the largest of 2, 4 and 8 that fits the heads
    """
    if cards == 1:
        return {"one card": RankGrid()}
    found = {
        "ddp": RankGrid(data=cards),
        "fsdp": RankGrid(data=cards, sharded=True),
    }
    if tensor is None:
        fitting = [ranks for ranks in (2, 4, 8) if cards % ranks == 0 and _splits(config, ranks)]
        tensor = max(fitting, default=1)
    if tensor > 1:
        if cards % tensor:
            raise ValueError(f"{cards} cards do not divide into groups of {tensor}")
        data = cards // tensor
        layout = RankGrid(data=data, tensor=tensor, sharded=data > 1)
        layout.check(config)
        found[f"tp {tensor}" if data == 1 else f"fsdp {data} × tp {tensor}"] = layout
    return found


def _splits(config: Config, ranks: int) -> bool:
    return not any(n % ranks for n in (config.n_heads, config.n_kv_heads, config.hidden_width))


def memory(
    config: Config, work: Work, layout: RankGrid, objective: Objective, *, recompute: bool
) -> Memory:
    """Bytes per rank of a run; ValueError where the layout does not fit the model or the batch.

    objective  what is trained on: (model, batch) -> (sum of losses, number of targets)
    recompute  activation checkpointing
    """
    work.check(layout)
    layout.check(config)
    held = _numbers(local_shapes(_shapes(config), layout))
    kept = measured(config, work, layout, objective, recompute=recompute)
    return Memory(
        parameters=FLOAT32 * held,
        gradients=FLOAT32 * held,
        optimizer=ADAMW_STATES * FLOAT32 * held,
        gathered=_gathered(config, layout, work.bfloat16) if layout.sharded else 0,
        activations=config.n_layers * kept.per_block,
        working=kept.total(config.n_layers) - config.n_layers * kept.per_block,
    )


def measured(
    config: Config, work: Work, layout: RankGrid, objective: Objective, *, recompute: bool
) -> Footprint:
    """The footprint of one pass of `work` on one rank."""
    one = Pass(
        rows=work.rows,
        context=work.context,
        objective=objective,
        layout=layout,
        bfloat16=work.bfloat16,
        recompute=recompute,
    )
    return footprint(config, one)


def _gathered(config: Config, layout: RankGrid, bfloat16: bool) -> int:
    """Whole parameters and gradients at once: of two blocks and of the root (`parallelize`)."""
    shapes = local_shapes(_shapes(config), RankGrid(tensor=layout.tensor))
    block = {name: shape for name, shape in shapes.items() if name.startswith("layers.0.")}
    root = {name: shape for name, shape in shapes.items() if not name.startswith("layers.")}
    numbers = 2 * _numbers(block) + _numbers(root)
    return numbers * ((2 if bfloat16 else FLOAT32) + FLOAT32)


def _shapes(config: Config) -> dict[str, Shape]:
    with torch.device("meta"):
        model = build(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _numbers(shapes: Mapping[str, Shape]) -> int:
    return sum(prod(shape) for shape in shapes.values())


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Time, at a share `mfu` of the cards' `peak` FLOP/s (model FLOP utilisation: what is computed
    twice under activation checkpointing counts once; Chowdhery et al., PaLM, 2022, appendix B).
    """

    flops_per_token: int
    peak: float  # FLOP/s of one card
    mfu: float

    def __post_init__(self) -> None:
        if self.peak <= 0:
            raise ValueError(f"a peak of {self.peak:g} FLOP/s: expected more than 0")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"a utilisation of {self.mfu:g}: expected a share, above 0 to 1")

    def tokens_per_second(self, cards: int) -> float:
        """Tokens of all cards together."""
        return cards * self.peak * self.mfu / self.flops_per_token

    def seconds(self, tokens: int, cards: int) -> float:
        """Time for so many tokens."""
        return tokens / self.tokens_per_second(cards)


def as_json(memory: Memory, card: float) -> dict[str, Any]:
    """One row of the plan; bytes, and whether they fit into a card of `card` bytes."""
    return {**asdict(memory), "total": memory.total, "fits": memory.total <= card}
