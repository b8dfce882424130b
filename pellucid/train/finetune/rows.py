"""Examples in rows: what of each token is learnt, how long ones are cut, how rows are filled.

one example    [prompt prompt prompt answer answer end]
inputs          prompt prompt prompt answer answer
targets           ·      ·    answer answer  end            · = IGNORED

packed         |a a a a a b b b c c c ·|   several in a row, none looks into another
apart          |a a a a a| |b b b · ·|     one in a row, padded to the longest of the batch
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pellucid.models import Model, evaluating
from pellucid.train.data.batches import IGNORED, Batch
from pellucid.train.data.shuffle import Shuffle
from pellucid.train.loop import rows_to
from pellucid.train.objective import Objective
from pellucid.train.precision import device_of, precision

PADDING = 0  # any token: nothing that counts can look at it


class Example(NamedTuple):
    """Token ids (N), and which of them the model is to learn to write, (N) bool."""

    ids: Tensor
    wanted: Tensor


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Counts of examples: kept, truncated to the context, refused for want of an answer in it.

    equal  of those refused: pairs whose two answers are the same
    """

    kept: int
    truncated: int
    refused: int
    equal: int = 0

    def __str__(self) -> str:
        parts = [f"{self.kept:,} examples"]
        parts += [f"{self.truncated:,} of them cut to the context"] if self.truncated else []
        too_long = self.refused - self.equal
        parts += [f"{too_long:,} left out: no answer within the context"] * bool(too_long)
        parts += [f"{self.equal:,} left out: both answers are equal"] * bool(self.equal)
        return ", ".join(parts)


def fitted(examples: Iterable[Example], context: int) -> tuple[list[Example], Cut]:
    """Examples of at most `context` inputs: longer ones lose their end, and are counted.

    One of which no wanted token is left is refused, and counted too.
    """
    kept: list[Example] = []
    truncated = refused = 0
    for ids, wanted in examples:
        short = Example(ids[: context + 1], wanted[: context + 1])
        if not short.wanted[1:].any():  # the first token has nothing before it to follow from
            refused += 1
            continue
        truncated += len(ids) > len(short.ids)
        kept.append(short)
    return kept, Cut(kept=len(kept), truncated=truncated, refused=refused)


class ShuffledRows:
    """Rows by number, shuffled anew in each epoch; `at(step)` needs no history."""

    batch: int
    seed: int

    def __len__(self) -> int:
        """Rows of one epoch."""
        raise NotImplementedError

    def rows_of(self, numbers: Sequence[int]) -> Batch:
        """The rows with these numbers as one batch."""
        raise NotImplementedError

    def at(self, step: int) -> Batch:
        """The rows of optimiser step `step` (from 0)."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return self.rows_of([shuffled(place, len(self), self.seed) for place in places])

    def in_order(self, rows: int = 4) -> Iterator[Batch]:
        """Every row once, `rows` at a time."""
        for first in range(0, len(self), rows):
            yield self.rows_of(range(first, min(first + rows, len(self))))


class ExampleRows(ShuffledRows):
    """Rows of examples.

    packed  several examples in a row of `context` tokens, none of which sees another; else one.
            Few examples stand in shorter rows, so that a batch has as many rows as it asks for

    Raises ValueError where there are no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        context: int,
        batch: int,
        seed: int,
        packed: bool = True,
    ) -> None:
        if not examples:
            raise ValueError("no examples to train on: every one was refused, or there were none")
        self.examples, self.batch, self.seed, self.packed = examples, batch, seed, packed
        sizes = [len(example.ids) - 1 for example in examples]
        assert max(sizes) <= context, "an example is longer than the context: `fitted` cuts them"
        self.rows = filled(sizes, context) if packed else [[place] for place in range(len(sizes))]
        if len(self.rows) < batch and packed:  # narrower ones, or a batch would repeat them
            self.rows = filled(sizes, max(*sizes, -(-sum(sizes) // batch)))
        self.width = max(sum(sizes[place] for place in row) for row in self.rows)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.rows)

    def rows_of(self, numbers: Sequence[int]) -> Batch:
        """The rows with these numbers as one batch."""
        rows, length = [self.rows[number] for number in numbers], self.width
        if not self.packed:
            length = max(len(self.examples[place].ids) - 1 for row in rows for place in row)
        inputs = torch.full((len(rows), length), PADDING)
        targets, documents = torch.full_like(inputs, IGNORED), torch.zeros_like(inputs)
        for number, row in enumerate(rows):
            begin = 0
            for place in row:
                ids, wanted = self.examples[place]
                inside = slice(begin, begin + len(ids) - 1)
                inputs[number, inside] = ids[:-1]
                targets[number, inside] = torch.where(wanted[1:], ids[1:], IGNORED)
                documents[number, inside] = begin
                begin = inside.stop
            documents[number, begin:] = begin  # padding is ignored
        return Batch(inputs, targets, documents if self.packed else None)


def shuffled(place: int, size: int, seed: int) -> int:
    """Which of `size` things comes at a place of endless epochs, each in an order of its own."""
    epoch, inside = divmod(place, size)
    return Shuffle(size, seed * 1_000_003 + epoch)[inside]


def filled(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Things of some sizes in as few bins as best-fit decreasing finds; bins of their places.

    The largest first, each into the fullest bin that still has room for it (Johnson et al., 1974).
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), smallest first
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        found = bisect_left(rooms, (sizes[place], -1))
        if found < len(rooms):
            room, number = rooms.pop(found)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(place)
        insort(rooms, (room - sizes[place], number))
    return bins


def mean_loss(
    model: Model, batches: Iterable[Batch], objective: Objective, *, bfloat16: bool = False
) -> float:
    """Mean of an objective over batches; the mode is put back."""
    device, total, number = device_of(model), 0.0, 0
    for batch in batches:
        with evaluating(model), precision(device, bfloat16):
            loss, count = objective(model, rows_to(batch, slice(None), device))
            total, number = total + loss.item(), number + count
    return total / number
