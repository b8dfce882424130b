"""Many generations of one model in shared steps; they join and leave between two of them.

    step      │ a b c │ a b c d │ a c d │      one pass over the weights for all rows that decode,
    prompts   │ d d   │ e       │ e e e │      in C with tokens of prompts beside them; then at most
                                               a piece in all of the prompts still to be read

In the C decoder a row's bits do not depend on the rows beside it, so each answer is the one that
the model gives alone. Where a model cannot run there, a step is one pass after another, each the
one that its generation would make by itself; a prompt's passes are these anyhow (`engine`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from pellucid.generate import native
from pellucid.generate.draft import draft_steps
from pellucid.generate.engine import Generation, generate_tokens
from pellucid.generate.fast import FastSteps, decodes_in_c
from pellucid.generate.limits import check_lengths, context_limit
from pellucid.generate.prefixes import PIECE, KeptCache, PrefixStore
from pellucid.generate.sample import row_seeds
from pellucid.generate.scores import Scored, TextScores
from pellucid.models import Cache, Model

SHARED_BYTES = 1 << 30  # of caches that later prompts can begin from
AT_ONCE = 32  # texts of a batch that are written at a time

Row = Generation | TextScores


class Together:
    """The generations of one model that share its passes; one thread at a time.

    Each decoding row gets a token per step, however many rows and however long the prompts that
    others wait for. Of prompts, the oldest and the one with the least left to read take turns: a
    short one overtakes a long one, which is never left waiting.
    """

    def __init__(
        self,
        model: Model,
        *,
        fast: bool | None = None,
        draft: Model | None = None,
        shared_bytes: int = SHARED_BYTES,
    ) -> None:
        """fast: as for `generate_tokens`; shared_bytes: of what `prefixes` may hold.

        draft: runs ahead of a generation that is alone, where its text stays what it is without:
        a greedy one, or one without a seed. ValueError as for `generate_tokens`.
        """
        self._model, self._draft = model, None
        if draft is not None:
            _, self._draft = draft_steps(model, draft, fast)
            fast = True
        self._steps = FastSteps(model, context_limit(model.config), fast)
        self.prefixes = PrefixStore(
            shared_bytes, any_length=self._steps.reads_prompts, paged=self._steps.in_c
        )
        self._rows: list[Row] = []  # in the order in which they came
        self._turn = 0
        self.proposed = self.guessed = 0  # tokens drafted, and guesses that were right

    def generate(self, prompt: Sequence[int], **options: Any) -> Generation:
        """A generation to `join` with; the options are those of `generate_tokens`.

        Nothing of it is run, and no memory of it held, before it has joined.
        """
        same = options["sampling"].greedy or options.get("seed") is None
        return generate_tokens(
            self._model, [prompt], kept=self.prefixes, fast=self._steps,
            draft=self._draft if same else None, **options,
        )  # fmt: skip

    def score(self, ids: Sequence[int], first: int = 1, top: int = 0) -> TextScores:
        """Scores of ids[first:] to `join` with, each with the `top` likeliest of its place.

        They are `ready` once the whole text is read. Nothing of it is run before it has joined.
        """
        self._steps.wait()
        return TextScores(self._model, ids, first, top, self._steps, self.prefixes)

    def join(self, row: Row) -> None:
        """From the next step on, until it leaves."""
        self._rows.append(row)

    def leave(self, row: Row) -> None:
        """No further step is computed for it; its memory is free when the last reference goes."""
        if row in self._rows:
            self._rows.remove(row)
            self.proposed += row.proposed
            self.guessed += row.guessed

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: Row) -> bool:
        return row in self._rows

    def step(self) -> None:
        """One token for each row that decodes, and at most a piece of prompts.

        A row is `ready` then, until its next item is taken. An error stays in the row it is of.
        """
        waiting = [row for row in self._rows if not (row.ready or row.took_guess())]
        decoding = [(row, *due) for row in waiting if (due := row.next_token()) is not None]
        apart = [row for row, _, cache in decoding if not self._steps.joins(cache)]
        if len(decoding) == 1 and len(self._rows) == 1:  # it may run ahead by itself
            apart = [decoding[0][0]]
        joint = [(row, [token], cache) for row, token, cache in decoding if row not in apart]
        reading = [row for row in waiting if row not in {row for row, *_ in decoding}]
        room, read = native.MOST - len(joint), 0
        for row in self._in_turn(reading):
            chunk = row.next_chunk(room - read) if read < room else None
            if chunk is not None:
                joint.append((row, *chunk))
                read += len(chunk[0])
        if not self._shared_pass(joint):
            apart += [row for row, *_ in joint if row not in reading]
            read = 0
        for row in apart:
            self._advance(row)
        self._read([row for row in reading if not row.ready], PIECE - read)

    def _in_turn(self, rows: list[Row]) -> list[Row]:
        """Rows that read a prompt: first the oldest or the one with the least left, by turns."""
        if not rows:
            return []
        self._turn += 1
        first = rows[0] if self._turn % 2 else min(rows, key=lambda row: row.unread)
        return [first, *(row for row in rows if row is not first)]

    def _shared_pass(self, joint: list[tuple[Row, list[int], Cache]]) -> bool:
        """One pass for the next tokens of several rows; False where C is not there yet."""
        if not joint:
            return True
        rows, tokens, caches = zip(*joint, strict=True)
        try:
            wanted = [row.wanted(len(some)) for row, some, _ in joint]
            found = self._steps.step_each(tokens, caches, wanted)
        except Exception as error:  # of all that shared it
            for row in rows:
                row.fail(error)
            return True
        for row, some, logits in zip(rows, tokens, found or (), strict=False):
            row.take(logits, len(some))
        return found is not None

    def _read(self, rows: list[Row], room: int) -> None:
        """Passes of at most so many tokens of prompts in all, and at least one, unless it is 0."""
        while rows and room > 0:
            row = self._in_turn(rows)[0]
            before = row.unread
            self._advance(row)
            if row.ready:
                rows.remove(row)
                before += 1  # its last token is read, too
            room -= max(before - row.unread, 1)

    def _advance(self, row: Row) -> None:
        try:
            row.advance()
        except Exception as error:
            row.fail(error)


class JoinedRows(Iterator[list[int | None]]):
    """Several texts of one `Together` as one iterator, each at its own pace; no padding is run.

    Iterating gives, per step, a token for each row that got one, and None for the others: those
    that have finished, still read their prompt, or wait for a place. `logits` (B, V) are those of
    the rows that got one.
    """

    guessed_by: str | None = None
    proposed = 0

    def __init__(self, together: Together, rows: list[Generation], at_once: int) -> None:
        """rows: generations of `together`, so many of which are written at a time."""
        self._together, self._rows, self._at_once = together, rows, at_once
        self._waiting = deque(row for row, run in enumerate(self._rows) if run.is_live(0))
        self._live: list[int] = []

    def is_live(self, row: int) -> bool:
        """Whether `row` gets another token."""
        return self._rows[row].is_live(0)

    def finish(self, row: int) -> None:
        """End a row; it gets no further tokens."""
        self._rows[row].finish(0)

    def __next__(self) -> list[int | None]:
        for row in [row for row in self._live if not self.is_live(row)]:
            self._together.leave(self._rows[row])
            self._live.remove(row)
        while self._waiting and len(self._live) < self._at_once:
            self._live.append(self._waiting.popleft())
            self._together.join(self._rows[self._live[-1]])
        if not self._live:
            raise StopIteration
        new: list[int | None] = [None] * len(self._rows)
        while not (ready := [row for row in self._live if self._rows[row].ready]):
            self._together.step()
        for row in ready:
            (new[row],) = next(self._rows[row])
        self.logits = torch.cat([self._rows[row].logits for row in ready])
        return new


def generate_rows(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    slide: bool = False,
    fast: bool | None = None,
    draft: Model | None = None,
    kept: KeptCache | None = None,
    at_once: int = AT_ONCE,
    **options: Any,
) -> Generation | JoinedRows:
    """As `generate_tokens`, but where C decodes several prompts share steps, not a padded batch.

    max_new_tokens  one number for all prompts, or one for each
    draft           of a single prompt, several are written without; kept: of a single one, too
    at_once         prompts that are written at a time, where they share steps
    """
    lengths = check_lengths(prompts, max_new_tokens, model.config, slide=slide)
    if len(prompts) > 1 and kept is None and decodes_in_c(model, fast):
        together = Together(model, fast=fast)
        rows = [
            together.generate(prompt, seed=one, max_new_tokens=length, slide=slide, **options)
            for prompt, one, length in zip(
                prompts, row_seeds(seed, len(prompts)), lengths, strict=True
            )
        ]
        return JoinedRows(together, rows, at_once)
    return generate_tokens(
        model, prompts, max_new_tokens=lengths, seed=seed, slide=slide, fast=fast, kept=kept,
        draft=draft if len(prompts) == 1 else None, **options,
    )  # fmt: skip


def score_texts(
    model: Model,
    texts: Sequence[tuple[Sequence[int], int]],
    *,
    top: int = 0,
    at_once: int = AT_ONCE,
    fast: bool | None = None,
) -> list[list[Scored]]:
    """Of each (ids, first): ln p of ids[first:], given all that stands before, in shared passes.

    The numbers do not depend on the other texts, which are read so many at a time. What texts
    begin with alike is read once where that gives the same bits: the second waits for the first.
    """
    together = Together(model, fast=fast)
    waiting = deque(range(len(texts)))
    begins = [tuple(ids[: together.prefixes.sharable(first - 1)]) for ids, first in texts]
    live: dict[int, TextScores] = {}
    found: dict[int, list[Scored]] = {}
    while waiting or live:
        busy = {begins[number] for number in live if begins[number]}
        for number in list(islice(waiting, at_once)):
            if len(live) < at_once and begins[number] not in busy:
                waiting.remove(number)
                live[number] = together.score(*texts[number], top)
                together.join(live[number])
                busy |= {begins[number]} - {()}
        together.step()
        for number in [number for number, row in live.items() if row.ready]:
            together.leave(live[number])
            found[number] = live.pop(number).scores
    return [found[number] for number in range(len(texts))]
