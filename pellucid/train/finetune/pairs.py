"""Preference data: a prompt with two answers, the better one first, in rows of one pair each.

Texts or messages:

    {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 23"}
    {"prompt": [{"role": "user", …}], "chosen": [{"role": "assistant", …}], "rejected": […]}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from pellucid.tokenizers import ChatFormat, Tokenizer
from pellucid.train.data.batches import IGNORED, Batch
from pellucid.train.finetune.instructions import continued, last_answer, messages_of
from pellucid.train.finetune.records import Record, place_of, text_of
from pellucid.train.finetune.rows import PADDING, Cut, Example, ShuffledRows


class AnswerPair(NamedTuple):
    """A prompt with each of its two answers; the loss counts the answers."""

    chosen: Example
    rejected: Example


def pairs(
    records: Iterable[Record], tokenizer: Tokenizer, chat: ChatFormat | None
) -> Iterator[AnswerPair]:
    """The pairs in tokens.

    Texts are taken as they are, an end token after each answer; messages are written in the chat
    format, which texts do without. Raises ValueError, naming the example, for one that cannot be
    read.
    """
    for number, record in enumerate(records, start=1):
        where = place_of(record, number)
        if isinstance(record.get("chosen"), list):
            assert chat is not None, "messages need a chat format"
            both = [_talk(record, key, chat, where) for key in AnswerPair._fields]
        else:
            prompt = text_of(record, "prompt", where, "")
            both = [
                continued(prompt, text_of(record, key, where), tokenizer)
                for key in AnswerPair._fields
            ]
        yield AnswerPair(*both)


def _talk(record: Record, key: str, chat: ChatFormat, where: str) -> Example:
    """A conversation; the loss counts its last answer, which may hold the conversation too."""
    prompt, answer = record.get("prompt") or [], record[key]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(answer, list) or not all(isinstance(part, dict) for part in answer):
        raise ValueError(f"{where}: {key!r} is no list of messages, as the other answer is")
    if not answer or answer[-1].get("role") != "assistant":
        raise ValueError(f"{where}: {key!r} does not end with a message of the assistant")
    whole = [*prompt, *answer] if answer[0].get("role") == "assistant" else answer
    said = messages_of(whole, f"{where}: {key!r}", where)
    try:
        return last_answer(said, chat)
    except ValueError as error:
        raise ValueError(f"{where}: {key!r}: {error}") from None


def fitted_pairs(found: Iterable[AnswerPair], context: int) -> tuple[list[AnswerPair], Cut]:
    """Pairs whose texts have at most `context` inputs: longer ones lose their end, and are counted.

    A pair of which an answer is gone, or whose answers are the same by then, is refused.
    """
    kept: list[AnswerPair] = []
    truncated = refused = equal = 0
    for pair in found:
        short = AnswerPair(
            *(Example(ids[: context + 1], want[: context + 1]) for ids, want in pair)
        )
        empty = any(not want[1:].any() for _, want in short)
        if empty or torch.equal(short.chosen.ids, short.rejected.ids):
            refused += 1
            equal += not empty and torch.equal(pair.chosen.ids, pair.rejected.ids)
            continue
        truncated += any(len(a.ids) > len(b.ids) for a, b in zip(pair, short, strict=True))
        kept.append(short)
    return kept, Cut(kept=len(kept), truncated=truncated, refused=refused, equal=equal)


class PairRows(ShuffledRows):
    """Rows of one pair each.

        |chosen  ·  ·|rejected  ·|       two halves of the same length, padded on the right

    `documents` numbers the halves over the whole data: 2 · pair, and 2 · pair + 1.
    """

    def __init__(self, found: Sequence[AnswerPair], *, batch: int, seed: int) -> None:
        if not found:
            raise ValueError("no pairs to train on: every one was refused, or there were none")
        self.pairs, self.batch, self.seed = found, batch, seed

    def __len__(self) -> int:
        """Pairs."""
        return len(self.pairs)

    def rows_of(self, numbers: Sequence[int]) -> Batch:
        """The pairs with these numbers as one batch."""
        length = max(len(example.ids) - 1 for n in numbers for example in self.pairs[n])
        inputs = torch.full((len(numbers), 2, length), PADDING)
        targets, documents = torch.full_like(inputs, IGNORED), torch.empty_like(inputs)
        for row, number in enumerate(numbers):
            for half, (ids, wanted) in enumerate(self.pairs[number]):
                inputs[row, half, : len(ids) - 1] = ids[:-1]
                targets[row, half, : len(ids) - 1] = torch.where(wanted[1:], ids[1:], IGNORED)
                documents[row, half] = 2 * number + half
        return Batch(inputs.flatten(1), targets.flatten(1), documents.flatten(1))
