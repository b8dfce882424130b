"""How well a model classifies: counts of true and predicted classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClassReport:
    """Counts of (true class, predicted class), and what follows from them.

    names      what the classes are called
    confusion  (K, K): row = true class, column = predicted class
    """

    names: tuple[str, ...]
    confusion: Tensor

    @property
    def count(self) -> int:
        """Examples."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of examples whose class was predicted."""
        return float(self.confusion.diagonal().sum()) / self.count

    @property
    def support(self) -> list[int]:
        """Examples of each class."""
        return self.confusion.sum(1).tolist()

    @property
    def precision(self) -> list[float]:
        """Of the examples predicted as a class, the share that are of it; 0 where none were."""
        return _shares(self.confusion.diagonal(), self.confusion.sum(0))

    @property
    def recall(self) -> list[float]:
        """Of the examples of a class, the share predicted as it; 0 where there are none."""
        return _shares(self.confusion.diagonal(), self.confusion.sum(1))

    @property
    def f1(self) -> list[float]:
        """Harmonic mean of precision and recall, 2 hits / (predicted + true)."""
        return _shares(2 * self.confusion.diagonal(), self.confusion.sum(0) + self.confusion.sum(1))

    @property
    def macro_f1(self) -> float:
        """Mean of F1 over the classes, each counting alike."""
        return sum(self.f1) / len(self.names)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        columns = {
            "name": self.names,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "support": self.support,
        }
        return {
            "count": self.count,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "confusion": self.confusion.tolist(),
            "classes": [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ],
        }


def class_report(logits: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> ClassReport:
    """What logits (N, K) predict for examples of classes labels (N).

    names  of the classes; None calls them by their numbers

    Raises ValueError for no examples, sizes that do not fit, or a label outside 0 … K - 1.
    """
    classes = logits.shape[-1]
    names = tuple(names) if names is not None else tuple(map(str, range(classes)))
    if logits.shape != (len(labels), classes) or len(names) != classes or not len(labels):
        raise ValueError(
            f"logits {tuple(logits.shape)}, {len(labels)} labels and {len(names)} names: expected "
            "one row for each label, at least one, and one column for each name"
        )
    labels = labels.to(logits.device)
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < classes:
        raise ValueError(f"labels from {low} to {high}: expected 0 to {classes - 1}")
    cells = labels * classes + logits.argmax(-1)
    counts = torch.bincount(cells, minlength=classes * classes).view(classes, classes)
    return ClassReport(names=names, confusion=counts.cpu())


def _shares(part: Tensor, whole: Tensor) -> list[float]:
    return (part / whole.clamp(min=1)).tolist()
