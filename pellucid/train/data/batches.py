"""From a token stream to batches: windows, shuffled anew in each epoch.

    stream      <end> a a a a <end> b b b <end> c c …     one long line of token ids, (N)
    windows     |- context -|- context -|- context -|     one window is one row of a batch
    documents   0 0 0 0 0 0 0 6 6 6 6 10 10 …             where in its row each token's one begins

A window's targets are its inputs one token later, so a row needs context + 1 tokens of the stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pellucid.train.data.shuffle import Shuffle, mix
from pellucid.train.data.token_source import TokenSource, TokenTensor

IGNORED = -100  # a target where nothing is to be predicted, as cross_entropy's ignore_index
SHORTEST_COPY = 16  # tokens, where a row is long enough


class Batch(NamedTuple):
    """The rows of one optimiser step; B rows of T tokens.

    inputs     (B, T) token ids
    targets    (B, T) the token after each input; IGNORED where nothing is to be predicted
    documents  (B, T) the document each input belongs to, named by the place in the row where it
               begins (0 for one that began before the row): attention and positions stay inside a
               document, and this is what the models take as `starts`. None: plain causal attention
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None


class Batches:
    """Windows of a token source, shuffled anew each epoch; `at(step)` needs no history.

    The source is read as a ring and each epoch starts somewhere else on it, so that a token does
    not always stand at the same place of its window. In an epoch each window comes once.

    source     token ids: a tensor (N), or a TokenSource such as memory-mapped shards
    documents  keep attention and positions inside each document; else rows run on across them
    copies     share of rows in which one passage stands a second time, in the place of what
               followed: text in which looking back pays, so that induction heads form early. 0
               leaves the text

    Raises ValueError for a source that is shorter than one window.
    """

    def __init__(
        self,
        source: Tensor | TokenSource,
        *,
        context: int,
        batch: int,
        seed: int,
        copies: float = 0.0,
        documents: bool = False,
    ) -> None:
        self.stream = TokenTensor(source) if isinstance(source, Tensor) else source
        check_length(self.stream, context)
        if not 0 <= copies <= 1:
            raise ValueError(f"copies in {copies} of the rows: expected a share, 0 to 1")
        if copies and documents:
            raise ValueError("a passage is copied across documents: give copies or documents")
        self.context, self.batch, self.seed = context, batch, seed
        self.copies, self.documents = copies, documents
        self.windows = len(self.stream) // context
        self._epoch, self._shift, self._order = -1, 0, Shuffle(1, 0)  # of the epoch read last

    def at(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows of optimiser step `step` (from 0), or some of them: those of one rank."""
        chosen = range(self.batch)[rows]
        starts = [self._start(step * self.batch + row) for row in chosen]
        ids = torch.stack([self._read(start) for start in starts])  # (B, T + 1)
        if self.copies:
            self._copy(ids, chosen, step)
        documents = None
        if self.documents:
            documents = torch.stack([self._documents(start) for start in starts])
        return Batch(ids[:, :-1], ids[:, 1:], documents)

    def _start(self, row: int) -> int:
        """Where on the ring the window of a row begins; rows count on over steps and epochs."""
        epoch, place = divmod(row, self.windows)
        if epoch != self._epoch:
            seed = mix(mix(self.seed) ^ epoch)
            self._epoch, self._shift = epoch, seed % self.context
            self._order = Shuffle(self.windows, seed)
        return (self._shift + self._order[place] * self.context) % len(self.stream)

    def _read(self, start: int) -> Tensor:
        """context + 1 tokens from `start` on, (T + 1), round the ring."""
        if start + self.context < len(self.stream):
            return self.stream.read(start, start + self.context + 1)
        return torch.cat([self.stream.read(first, last) for first, last, _ in self._arcs(start)])

    def _documents(self, start: int) -> Tensor:
        """For each token of a row the place in it where its document begins, (T)."""
        begins = torch.zeros(self.context + 1, dtype=torch.long)
        for first, last, offset in self._arcs(start):
            places = self.stream.document_starts(first, last) - first + offset
            begins[places] = places
        return begins[:-1].cummax(0).values

    def _arcs(self, start: int) -> list[tuple[int, int, int]]:
        """A window as stretches of the stream: (from, to, place in the window)."""
        length, arcs, offset = len(self.stream), [], 0
        while offset <= self.context:
            stop = min(length, start + self.context + 1 - offset)
            arcs.append((start, stop, offset))
            offset, start = offset + stop - start, 0
        return arcs

    def _copy(self, ids: Tensor, rows: range, step: int) -> None:
        """Copy a passage within its share of the rows; every rank draws the same for all rows."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 2**32 + step)
        chosen = torch.rand(self.batch, generator=generator) < self.copies
        for row in chosen.nonzero().flatten().tolist():
            here = ids[rows.index(row)] if row in rows else torch.zeros_like(ids[0])
            copy_passage(here, generator)


def check_length(source: TokenSource, context: int) -> None:
    """ValueError for a source that is shorter than one window."""
    if len(source) <= context:
        raise ValueError(
            f"the training text is {len(source):,} tokens long: a context of {context:,} needs "
            f"at least {context + 1:,}; give more text or a smaller context"
        )


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


def held_out_windows(
    source: Tensor | TokenSource, context: int, limit: int | None = None
) -> Tensor:
    """Windows side by side, (N, T + 1), evenly spread over the source if there are over `limit`.

    A source shorter than one window is one short window; ValueError if it has no token to predict.
    """
    stream = TokenTensor(source) if isinstance(source, Tensor) else source
    if len(stream) < 2:
        raise ValueError(f"the held-out text is {len(stream)} tokens long: expected 2 or more")
    context = min(context, len(stream) - 1)
    windows = (len(stream) - 1) // context
    chosen = torch.arange(windows)
    if limit is not None and limit < windows:
        chosen = torch.linspace(0, windows - 1, limit).long()
    starts = (chosen * context).tolist()
    return torch.stack([stream.read(start, start + context + 1) for start in starts])
