"""Batches in the order of other trainers, so that their recipes can be repeated to the number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.train.data.batches import Batch, check_length
from pellucid.train.data.token_source import TokenSource


class RandomBatches:
    """Windows that begin anywhere, drawn with replacement, as nanoGPT draws them; stateless."""

    def __init__(self, source: TokenSource, *, context: int, batch: int, seed: int) -> None:
        check_length(source, context)
        self.source, self.context, self.batch, self.seed = source, context, batch, seed

    def at(self, step: int) -> Batch:
        """The rows of optimiser step `step` (from 0)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.source) - self.context, (self.batch,), generator=generator)
        return _windows(self.source, starts, self.context)


class LoaderBatches:
    """Windows side by side in the order of ``DataLoader(shuffle=True, drop_last=True)``.

    Such a loader draws its order from torch's global random numbers, which dropout draws from too,
    and so does each evaluation on a shuffled training set. This is the book's loop ("Build a Large
    Language Model (From Scratch)", chapter 5), which evaluates after steps 1, 1 + eval_every … on
    the first `eval_batches` batches of a newly shuffled training loader, then on held-out text. So
    `at` must be asked for the steps in order, and `state` carries an order over an interruption.
    """

    def __init__(
        self, source: TokenSource, *, context: int, batch: int, eval_every: int, eval_batches: int
    ) -> None:
        check_length(source, context)
        self.source, self.context, self.batch = source, context, batch
        self.eval_every, self.eval_batches = eval_every, eval_batches
        self.windows = len(range(0, len(source) - context, context))
        self._order: list[list[int]] = []
        self._next = 0
        self._evaluated = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one time over the text; what is left over is dropped."""
        return self.windows // self.batch

    def at(self, step: int) -> Batch:
        """The rows of optimiser step `step`; the steps must come in order."""
        if step != self._next:
            raise ValueError(f"step {step} of a data loader that stands at step {self._next}")
        if step and step % self.eval_every == 1 % self.eval_every:
            self.evaluation_sample(step)
        place = step % self.steps_per_epoch
        if place == 0:
            self._order = self._shuffled()
        self._next += 1
        return self._rows(self._order[place])

    def evaluation_sample(self, step: int) -> list[Batch] | None:
        """After `step` steps: training text to evaluate on where that is due, drawn once."""
        if self._evaluated == step or step % self.eval_every != 1 % self.eval_every:
            return None
        self._evaluated = step
        order = self._shuffled()[: self.eval_batches]
        _draw()  # what the loader of the held-out text takes
        return [self._rows(places) for places in order]

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on, as plain JSON."""
        return {"order": self._order, "next": self._next, "evaluated": self._evaluated}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._order, self._next = state["order"], state["next"]
        self._evaluated = state["evaluated"]

    def _shuffled(self) -> list[list[int]]:
        """The windows of each batch of one epoch, by torch's own loader."""
        from torch.utils.data import DataLoader, TensorDataset

        numbers = TensorDataset(torch.arange(self.windows))
        loader = DataLoader(numbers, batch_size=self.batch, shuffle=True, drop_last=True)
        return [batch.tolist() for (batch,) in loader]

    def _rows(self, windows: list[int]) -> Batch:
        return _windows(self.source, torch.tensor(windows) * self.context, self.context)


def _draw() -> None:
    torch.empty((), dtype=torch.int64).random_()


def _windows(source: TokenSource, starts: Tensor, context: int) -> Batch:
    rows = torch.stack([source.read(at, at + context + 1) for at in starts.tolist()])
    return Batch(rows[:, :-1], rows[:, 1:])
