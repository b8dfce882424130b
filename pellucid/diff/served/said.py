"""What another engine says of texts: token ids, and ln p of each given those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

IMPOSSIBLE = -9000.0  # what servers write for −inf lies below
Messages = Sequence[Mapping[str, Any]]


@dataclass(kw_only=True)
class Said:
    """One text in token ids (N), and what is said of it.

    logprobs  ln p in nats of each token given all before it; None where nothing is said (N)
    others    (place, id, ln p) of tokens that were likely there and not taken
    written   place of the first token that was sampled; the prompt stands before it
    messages  the conversation that the prompt is, where that is known
    counted   tokens of the prompt as the engine counts them, or None
    """

    ids: list[int]
    logprobs: list[float | None]
    others: list[tuple[int, int, float]] = field(default_factory=list)
    written: int = 0
    messages: Messages | None = None
    counted: int | None = None

    @property
    def pairs(self) -> list[tuple[int, int, float]]:
        """(place, id, ln p) of all that is said: first of the text's tokens, then of others."""
        own = [
            (place, self.ids[place], value)
            for place, value in enumerate(self.logprobs)
            if place and value is not None
        ]
        return own + [row for row in self.others if row[0]]


def as_logprob(value: Any, where: str) -> float | None:
    """ln p as a number, None where there is none; ValueError for what cannot be one."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: the log-probability is {str(value)[:40]!r}, expected a number")
    if math.isnan(value):
        raise ValueError(f"{where}: the log-probability is NaN: the engine's logits are no numbers")
    if value > 1e-3:
        raise ValueError(
            f"{where}: the log-probability is {value:g}, above 0: expected ln p in nats"
        )
    return -math.inf if value <= IMPOSSIBLE else min(float(value), 0.0)


@contextmanager
def well_formed(where: str) -> Iterator[None]:
    """ValueError, in one line, where fields inside do not hold what they are read as."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{where}: log-probabilities in no form that is known here ({error})"
        ) from error
