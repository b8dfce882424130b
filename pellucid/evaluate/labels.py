"""How often a fine-tuned classifier is right: the call behind ``pellucid eval --labels``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.train.finetune import classify
from pellucid.train.finetune.classes import class_report
from pellucid.train.finetune.records import read_records

if TYPE_CHECKING:
    from pellucid.language_model import LanguageModel


def label_report(
    lm: LanguageModel,
    records: str | Path,
    *,
    limit: int | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Accuracy, and precision, recall and F1 of each label, over a file of texts with labels.

    records  CSV or JSON lines, as ``pellucid finetune`` reads them; limit: the first so many
    context  tokens of a text at most; None: the model's context. ``truncated`` counts the longer

    The classification head lies beside the model, or beside its adapter. Raises ValueError or
    OSError where there is none, for a file without labels and for labels it was not trained on.
    """
    if lm.checkpoint is None:
        raise ValueError("a model made by hand has no classification head beside it: save it first")
    names = classify.load_head(lm.adapter or lm.checkpoint.folder, lm.model)
    examples, counts = classify.labelled(
        read_records(str(records))[:limit],
        names,
        lambda text: lm.tokenizer.encode(text, bos=lm.tokenizer.adds_bos),
        context or lm.config.context_length,
    )
    probabilities, labels = classify.examined(lm.model, examples)
    report = class_report(probabilities, labels, names).as_dict()
    return {"model": lm.name, "truncated": counts.truncated, **report}
