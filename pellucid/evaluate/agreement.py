"""Two models over the same text: how far apart their distributions of the next token are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.evaluate.scoring import hidden_of, rows_at_once, wide_logits
from pellucid.models import Model, evaluating


def compare_models(
    model_a: Model, model_b: Model, windows: Tensor, *, batch: int = 4
) -> dict[str, float]:
    """Compare two models of one vocabulary over windows (N, T + 1) of token ids.

    kl_mean, kl_max             KL(A ‖ B) in nats per place: sum of p_A · (ln p_A − ln p_B)
    top1                        share of places at which both hold the same token most likely
    perplexity_a, perplexity_b  of the windows' last T tokens

    Softmax and sums are in float64, so that small divergences are not rounding. The logits of a few
    rows are held at a time, never all. The models may be of different dtypes and on different
    devices. Raises ValueError for models of different vocabularies.
    """
    sizes = model_a.config.vocab_size, model_b.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"vocabularies of {sizes[0]} and {sizes[1]} tokens: expected one and same")
    total = _Total()
    with evaluating(model_a, model_b):
        for some in windows.split(batch):
            inputs, targets = some[:, :-1], some[:, 1:].flatten()
            everywhere = torch.ones_like(inputs, dtype=torch.bool)
            rows = rows_at_once(model_a)
            parts = zip(
                hidden_of(model_a, inputs, everywhere).split(rows),
                hidden_of(model_b, inputs, everywhere).split(rows),
                targets.split(rows),
                strict=True,
            )
            for hidden_a, hidden_b, wanted in parts:
                a, b = wide_logits(model_a, hidden_a), wide_logits(model_b, hidden_b)
                total.add(a, b.to(a.device), wanted.to(a.device))
    return total.result()


class _Total:
    """Sums over places."""

    def __init__(self) -> None:
        self.places = self.same = 0
        self.kl = self.kl_max = self.nats_a = self.nats_b = 0.0

    def add(self, a: Tensor, b: Tensor, targets: Tensor) -> None:
        """Logits of both (N, V) and the token that followed (N)."""
        log_a, log_b = F.log_softmax(a.double(), -1), F.log_softmax(b.double(), -1)
        kl = F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1).clamp(min=0)
        self.kl += kl.sum().item()
        self.kl_max = max(self.kl_max, kl.max().item())
        self.same += int((a.argmax(-1) == b.argmax(-1)).sum())
        self.nats_a += F.nll_loss(log_a, targets, reduction="sum").item()
        self.nats_b += F.nll_loss(log_b, targets, reduction="sum").item()
        self.places += len(targets)

    def result(self) -> dict[str, float]:
        """Means over the places."""
        return {
            "kl_mean": self.kl / self.places,
            "kl_max": self.kl_max,
            "top1": self.same / self.places,
            "perplexity_a": math.exp(self.nats_a / self.places),
            "perplexity_b": math.exp(self.nats_b / self.places),
        }
