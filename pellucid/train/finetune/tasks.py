"""The four things a model can be fine-tuned to do, each as what `pellucid.train.train` asks for.

| kind | an example | what is made smaller |
|---|---|---|
| text | a document | cross-entropy of every next token |
| instructions | a conversation | cross-entropy of the answers' tokens |
| classification | a text and its label | cross-entropy of the label |
| preferences | a prompt, a better and a worse answer | the DPO loss of a pair |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pellucid.models import Model
from pellucid.tokenizers import TemplateChat, Tokenizer
from pellucid.train.data.batches import Batches, held_out_windows
from pellucid.train.data.documents import Document, begin_and_end, token_stream
from pellucid.train.evaluation import evaluate
from pellucid.train.finetune import classify, instructions, pairs, preferences
from pellucid.train.finetune.classes import class_report
from pellucid.train.finetune.preferences import DPO
from pellucid.train.finetune.records import Record
from pellucid.train.finetune.rows import Cut, ExampleRows, fitted, mean_loss
from pellucid.train.loop import Data
from pellucid.train.objective import Objective, next_token_objective

UNITS = {
    "text": "nats/token",
    "instructions": "nats/token of the answers",
    "classification": "nats/label",
    "preferences": "nats/pair",
}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How examples become batches.

    context  most inputs of a row
    batch    rows of an optimiser step
    packed   several examples in a row where the kind of data allows it
    """

    context: int
    batch: int
    seed: int = 0
    packed: bool = True
    bfloat16: bool = False

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to train on and how to judge it.

    batches          ``at(step)``
    steps_per_epoch  optimiser steps that go once through the data, a fraction where they do not
                     come out even
    held_out         the loss of a model on what was held out
    measures         more about it: accuracy, reward margins
    facts            what is in the data, what was cut and left out
    labels           of a classifier
    template         the chat template that the model learns, if it has none of its own
    """

    kind: str
    batches: Data
    steps_per_epoch: float
    objective: Objective
    held_out: Callable[[Model], float]
    measures: Callable[[Model], dict[str, Any]] = lambda model: {}
    facts: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[str] = ()
    template: str | None = None


def text_task(
    training: Sequence[Document],
    held_out: Sequence[Document],
    tokenizer: Tokenizer,
    options: TaskOptions,
) -> Task:
    """Plain text, as in pretraining; documents begin and end as the tokenizer's models expect."""
    around = begin_and_end(tokenizer)
    batches = Batches(
        token_stream(training, tokenizer.encode, *around),
        context=options.context,
        batch=options.batch,
        seed=options.seed,
    )
    stream = token_stream(held_out, tokenizer.encode, *around)
    windows = held_out_windows(stream, options.context)
    return Task(
        kind="text",
        batches=batches,
        steps_per_epoch=batches.windows / options.batch,
        objective=next_token_objective,
        held_out=lambda model: evaluate(model, windows, bfloat16=options.bfloat16),
        facts={"training_tokens": len(batches.stream), "held_out_tokens": len(stream)},
    )


def instruction_task(
    training: Sequence[Record],
    held_out: Sequence[Record],
    tokenizer: Tokenizer,
    options: TaskOptions,
) -> Task:
    """Conversations in the tokenizer's chat format, or in a plain one where it has none."""
    chat, plain = instructions.chat_of(tokenizer)
    rows, cuts = [], []
    for records in (training, held_out):
        found = instructions.examples(records, chat, plain=plain)
        examples, cut = fitted(found, options.context)
        _check_some_left(cut, options)
        rows.append(_rows(examples, options))
        cuts.append(cut)
    objective = next_token_objective
    return Task(
        kind="instructions",
        batches=rows[0],
        steps_per_epoch=len(rows[0]) / options.batch,
        objective=objective,
        held_out=lambda model: _loss(model, rows[1], objective, options),
        facts=_facts(*cuts)
        | {"rows": len(rows[0]), "chat_format": "plain" if plain else chat.name},
        template=chat.template if plain and isinstance(chat, TemplateChat) else None,
    )


def classification_task(
    training: Sequence[Record],
    held_out: Sequence[Record],
    labels: Mapping[str, int],
    tokenizer: Tokenizer,
    options: TaskOptions,
) -> Task:
    """Texts with labels, as `classify.balance` counts them. The model needs its head."""
    names = list(labels)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=tokenizer.adds_bos)

    examples, cut = classify.labelled(training, names, encode, options.context)
    judged, judged_cut = classify.labelled(held_out, names, encode, options.context)
    rows, held_rows = _rows(examples, options), _rows(judged, options)
    objective = classify.classification_objective

    def measures(model: Model) -> dict[str, Any]:
        return class_report(*classify.examined(model, judged), names).as_dict()

    return Task(
        kind="classification",
        batches=rows,
        steps_per_epoch=len(rows) / options.batch,
        objective=objective,
        held_out=lambda model: _loss(model, held_rows, objective, options),
        measures=measures,
        facts=_facts(cut, judged_cut) | {"balance": dict(labels), "rows": len(rows)},
        labels=names,
    )


def preference_task(
    training: Sequence[Record],
    held_out: Sequence[Record],
    tokenizer: Tokenizer,
    options: TaskOptions,
    settings: DPO,
    model: Model,
) -> Task:
    """Pairs of answers. `model` has the weights that training begins with: the reference."""
    talks = any(isinstance(record.get("chosen"), list) for record in [*training, *held_out])
    chat, plain = instructions.chat_of(tokenizer) if talks else (None, False)
    rows, cuts, starts = [], [], []
    for records in (training, held_out):
        found = pairs.pairs(records, tokenizer, chat)
        fitting, cut = pairs.fitted_pairs(found, options.context)
        _check_some_left(cut, options)
        rows.append(pairs.PairRows(fitting, batch=options.batch, seed=options.seed))
        starts.append(preferences.reference(model, rows[-1], bfloat16=options.bfloat16))
        cuts.append(cut)
    judge = preferences.dpo_objective(starts[1], settings)

    def measures(model: Model) -> dict[str, Any]:
        found = preferences.preference_report(
            model, rows[1], starts[1], settings.beta, bfloat16=options.bfloat16
        )
        return {
            "reward_margin": found.margin,
            "reward_accuracy": found.accuracy,
            "reward_chosen": found.chosen,
            "reward_rejected": found.rejected,
        }

    return Task(
        kind="preferences",
        batches=rows[0],
        steps_per_epoch=len(rows[0]) / options.batch,
        objective=preferences.dpo_objective(starts[0], settings),
        held_out=lambda model: _loss(model, rows[1], judge, options),
        measures=measures,
        facts=_facts(*cuts),
        template=chat.template if plain and isinstance(chat, TemplateChat) else None,
    )


def _rows(examples: Sequence[Any], options: TaskOptions) -> ExampleRows:
    return ExampleRows(
        examples,
        context=options.context,
        batch=options.batch,
        seed=options.seed,
        packed=options.packed,
    )


def _check_some_left(cut: Cut, options: TaskOptions) -> None:
    if not cut.kept and cut.equal:
        raise ValueError(f"the two answers of {cut.equal:,} examples are equal: nothing to prefer")
    if not cut.kept:
        raise ValueError(
            f"none of {cut.refused:,} examples has an answer within the context of "
            f"{options.context:,} tokens: give more context, or examples with answers"
        )


def _loss(
    model: Model, rows: ExampleRows | pairs.PairRows, objective: Objective, o: TaskOptions
) -> float:
    return mean_loss(model, rows.in_order(), objective, bfloat16=o.bfloat16)


def _facts(training: Cut, held_out: Cut) -> dict[str, Any]:
    return {
        side: {key: count for key, count in vars(cut).items() if count or key != "equal"}
        for side, cut in (("training", training), ("held_out", held_out))
    }


def split(items: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(training, held out): a random `share` of the items is held out, at least one of each.

    Both keep the order of the items. ValueError for fewer than two items or a share outside 0 to 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"{share} of the examples held out: expected a share between 0 and 1")
    if len(items) < 2:
        raise ValueError(f"{len(items)} example: expected 2 or more, to hold one out")
    number = min(max(1, round(share * len(items))), len(items) - 1)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:number])
    return (
        [item for place, item in enumerate(items) if place not in chosen],
        [item for place, item in enumerate(items) if place in chosen],
    )


def split_texts(
    texts: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """As `split`; of texts too few to hold one out whole, the end of each is held out."""
    if share * len(texts) >= 1 or not 0 < share < 1:
        return split(texts, share, seed)
    cuts = [(text, round((1 - share) * len(text.text))) for text in texts]
    return (
        [Document(name, text[:cut]) for (name, text), cut in cuts],
        [Document(name, text[cut:]) for (name, text), cut in cuts],
    )
