"""Sequence classification: a linear head on the last token, which has seen the whole text.

    tokens (T) ── blocks, norm ── (T, C) ── last row (C) ── score (L, C) ── one number per label (L)

The head is a module `score` of the model, as in transformers' ``ForSequenceClassification`` models.
It is saved beside the model: ``classifier.safetensors`` and ``classifier.json`` with the labels.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.files import read_json
from pellucid.models import Model, evaluating
from pellucid.train.data.batches import IGNORED, Batch
from pellucid.train.finetune.records import Record, place_of, text_of
from pellucid.train.finetune.rows import Cut, Example
from pellucid.train.precision import device_of, precision

HEAD, TENSORS, LABELS = "score", "classifier.safetensors", "classifier.json"


def label_of(record: Record, number: int) -> str:
    """The label of an example as text; ValueError where it has none."""
    label = record.get("label")
    if label is None or isinstance(label, list | dict) or not str(label).strip():
        where = place_of(record, number)
        raise ValueError(f"{where}: 'label' is {label!r}; expected a text or a number")
    return str(label).strip()


def balance(records: Iterable[Record]) -> dict[str, int]:
    """Label -> how many examples have it; numbers in their order, texts in the alphabet's."""
    counts = Counter(label_of(record, number) for number, record in enumerate(records, start=1))
    numbers = all(label.removeprefix("-").isdecimal() for label in counts)
    order = sorted(counts, key=int) if numbers else sorted(counts)
    return {label: counts[label] for label in order}


def labelled(
    records: Iterable[Record],
    labels: Sequence[str],
    encode: Callable[[str], list[int]],
    context: int,
) -> tuple[list[Example], Cut]:
    """Examples in which the label's number stands in the place of the next token.

    Texts of over `context` tokens lose their end, and are counted. ValueError for a text without
    tokens and for a label that is not among `labels`.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    found: list[Example] = []
    truncated = 0
    for number, record in enumerate(records, start=1):
        where = place_of(record, number)
        ids = encode(text_of(record, "text", where))
        label = label_of(record, number)
        if not ids:
            raise ValueError(f"{where} has no text to classify")
        if label not in numbers:
            raise ValueError(
                f"{where}: label {label!r} is none of {', '.join(map(repr, labels))}, "
                "which there are to learn"
            )
        truncated += len(ids) > context
        kept = torch.tensor([*ids[:context], numbers[label]])
        found.append(Example(kept, torch.arange(len(kept)) == len(kept) - 1))
    return found, Cut(kept=len(found), truncated=truncated, refused=0)


def add_head(model: Model, labels: int, seed: int = 0) -> nn.Linear:
    """A head of random weights, trained from the beginning; ValueError for fewer than 2 labels."""
    if labels < 2:
        raise ValueError(f"{labels} label in the data: classification needs 2 or more")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(labels, model.config.width, generator=generator) * 0.02
    like = model.embed.weight
    head = nn.Linear(model.config.width, labels, bias=False, device="meta")
    dtype = torch.promote_types(like.dtype, torch.float32)  # trained, whatever the model is in
    head.weight = nn.Parameter(weight.to(like.device, dtype))
    model.add_module(HEAD, head)
    return head


def head_of(model: Model) -> nn.Linear:
    """The head; ValueError for a model without."""
    head = dict(model.named_children()).get(HEAD)
    if not isinstance(head, nn.Linear):
        raise ValueError("this model has no classification head: fine-tune one, or load it")
    return head


def scores(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores (n, L) at the n positions that have a label, and the labels' numbers (n)."""
    labelled = batch.targets != IGNORED
    hidden = model.hidden(batch.inputs, starts=batch.documents)  # (B, T, C)
    head = head_of(model)
    found = head(hidden[labelled].to(head.weight.dtype))
    return found.to(torch.promote_types(found.dtype, torch.float32)), batch.targets[labelled]


def classification_objective(model: Model, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy of each label in nats, and how many labels there are."""
    found, wanted = scores(model, batch)
    return F.cross_entropy(found, wanted, reduction="sum"), len(wanted)


def classify(
    model: Model, texts: Sequence[Sequence[int]], rows: int = 8, bfloat16: bool = False
) -> Tensor:
    """Probability of each label (N, L) for texts of token ids; the mode is put back."""
    device, found = device_of(model), []
    for first in range(0, len(texts), rows):
        some = [torch.tensor(ids) for ids in texts[first : first + rows]]
        inputs = nn.utils.rnn.pad_sequence(some, batch_first=True)  # (B, T), padded on the right
        targets = torch.full_like(inputs, IGNORED)
        for row, ids in enumerate(some):
            targets[row, len(ids) - 1] = 0
        with evaluating(model), precision(device, bfloat16):
            part, _ = scores(model, Batch(inputs.to(device), targets.to(device)))
        found.append(part.softmax(-1).cpu())
    return torch.cat(found)


def examined(model: Model, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """What the classifier makes of labelled examples: probabilities (N, L) and true labels (N)."""
    texts = [example.ids[:-1].tolist() for example in examples]
    return classify(model, texts), torch.stack([example.ids[-1] for example in examples])


def save_head(folder: str | Path, model: Model, labels: Sequence[str]) -> None:
    """Write the head and its labels into a folder that is there."""
    from safetensors.torch import save_file

    state = {f"{HEAD}.{name}": value for name, value in head_of(model).state_dict().items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, Path(folder) / TENSORS, {"format": "pt"})
    text = json.dumps({"labels": list(labels)}, indent=2, ensure_ascii=False)
    (Path(folder) / LABELS).write_text(text + "\n", encoding="utf-8")


def load_head(folder: str | Path, model: Model) -> list[str]:
    """Give `model` the head in a folder; its labels.

    Raises OSError where there is none and ValueError for one that does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    absent = [name for name in (LABELS, TENSORS) if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder}: no classification head: {absent[0]} is missing")
    try:
        labels = read_json(folder / LABELS)["labels"]
        weight = load_file(folder / TENSORS)[f"{HEAD}.weight"]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged classification head: {error}") from None
    expected = (len(labels), model.config.width)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"{folder / TENSORS}: the head is {tuple(weight.shape)}; {len(labels)} labels on a "
            f"model {model.config.width} wide make {expected}"
        )
    head = add_head(model, len(labels))
    with torch.no_grad():
        head.weight.copy_(weight)
    return [str(label) for label in labels]
