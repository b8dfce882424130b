"""``pellucid eval --labels``: how often a fine-tuned classifier is right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.cli.common import console, load_model, print_json

if TYPE_CHECKING:
    from pellucid.language_model import LanguageModel


def evaluate_labels(arguments: argparse.Namespace) -> None:
    """Print accuracy and a line for each label, for the examples in ``--labels FILE``."""
    from pellucid.show.training_terminal import class_lines

    lm = load_model(arguments)
    found = label_report(lm, arguments)
    if arguments.json:
        print_json(found)
        return
    out = console()
    out.print(f"{found['model']} on {found['count']:,} labelled texts", markup=False)
    for line in class_lines(found):
        out.print(line, markup=False)


def label_report(lm: LanguageModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report as JSON has it. The head lies beside the adapter, or beside the model."""
    from pellucid.evaluate import class_report
    from pellucid.train.finetune import classify
    from pellucid.train.finetune.records import read_records

    assert lm.checkpoint is not None, "a model from the command line has a checkpoint"
    folder = Path(arguments.adapter) if arguments.adapter else lm.checkpoint.folder
    names = classify.load_head(folder, lm.model)
    context = arguments.context or lm.config.context_length
    examples, cut = classify.labelled(
        read_records(arguments.labels)[: arguments.limit],
        names,
        lambda text: lm.tokenizer.encode(text, bos=lm.tokenizer.adds_bos),
        context,
    )
    probabilities, labels = classify.examined(lm.model, examples)
    report = class_report(probabilities, labels, names).as_dict()
    return {"model": lm.name, "truncated": cut.truncated, **report}
