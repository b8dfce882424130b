"""From a token stream to batches: windows, shuffled anew in each epoch.

    stream      <end> a a a a <end> b b b <end> c c …     one long line of token ids, (N)
    windows     |- context -|- context -|- context -|     one window is one row of a batch

A window's targets are its inputs one token later, so a row needs context + 1 tokens of the stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # a target where nothing is to be predicted, as cross_entropy's ignore_index
SHORTEST_COPY = 16  # tokens, where a row is long enough


class Batch(NamedTuple):
    """The rows of one optimiser step; B rows of T tokens.

    inputs     (B, T) token ids
    targets    (B, T) the token after each input; IGNORED where nothing is to be predicted
    documents  (B, T) the document each input belongs to, numbered within its row: attention and
               positions stay inside a document. None: plain causal attention over the row
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None


class Batches:
    """Windows of a token stream, shuffled anew each epoch; `at(step)` needs no history.

    The stream is read as a ring and each epoch starts somewhere else on it, so that a token does
    not always stand at the same place of its window.

    copies  share of rows in which one passage stands a second time, in the place of what followed:
            text in which looking back pays, so that induction heads form early. 0 leaves the text

    Raises ValueError for a stream that is shorter than one window.
    """

    def __init__(
        self, stream: Tensor, *, context: int, batch: int, seed: int, copies: float = 0.0
    ) -> None:
        if len(stream) <= context:
            raise ValueError(
                f"the training text is {len(stream):,} tokens long: a context of {context:,} needs "
                f"at least {context + 1:,}; give more text or a smaller context"
            )
        if not 0 <= copies <= 1:
            raise ValueError(f"copies in {copies} of the rows: expected a share, 0 to 1")
        self.stream, self.context, self.batch, self.seed = stream, context, batch, seed
        self.copies = copies
        self.windows = len(stream) // context
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.long)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch * self.context

    def at(self, step: int) -> Batch:
        """The rows of optimiser step `step` (from 0)."""
        rows = range(step * self.batch, (step + 1) * self.batch)
        starts = torch.tensor([self._start(row) for row in rows])
        places = starts[:, None] + torch.arange(self.context + 1)  # (B, T + 1)
        ids = self.stream[places % len(self.stream)]
        if self.copies:
            generator = torch.Generator().manual_seed((self.seed + 1) * 2**32 + step)
            chosen = torch.rand(len(ids), generator=generator) < self.copies
            for row in chosen.nonzero().flatten().tolist():
                copy_passage(ids[row], generator)
        return Batch(ids[:, :-1], ids[:, 1:])

    def _start(self, row: int) -> int:
        epoch, place = divmod(row, self.windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            shift = torch.randint(self.context, (), generator=generator)
            order = torch.randperm(self.windows, generator=generator)
            self._epoch, self._starts = epoch, shift + order * self.context
        return int(self._starts[place])


def copy_passage(ids: Tensor, generator: torch.Generator) -> None:
    """Put a random passage of ids (N) a second time somewhere after itself, in place.

    a b c d e f g h i j   ->   a b c d e f b c d j
    """

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    longest = len(ids) // 2
    length = between(min(SHORTEST_COPY, longest), longest)
    first = between(0, len(ids) - 2 * length)
    second = between(first + length, len(ids) - length)
    ids[second : second + length] = ids[first : first + length].clone()


def held_out_windows(stream: Tensor, context: int, limit: int | None = None) -> Tensor:
    """Windows side by side, (N, T + 1), evenly spread over the stream if there are over `limit`.

    A stream shorter than one window is one short window; ValueError if it has no token to predict.
    """
    if len(stream) < 2:
        raise ValueError(f"the held-out text is {len(stream)} tokens long: expected 2 or more")
    context = min(context, len(stream) - 1)
    windows = (len(stream) - 1) // context
    chosen = torch.arange(windows)
    if limit is not None and limit < windows:
        chosen = torch.linspace(0, windows - 1, limit).long()
    return stream[chosen[:, None] * context + torch.arange(context + 1)]
