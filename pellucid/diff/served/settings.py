"""ln p as a sampler may have changed it: temperature, penalties, tokens ruled out, other logs.

The steps are those of `generate.sample`, and OpenAI's penalties on counts of tokens written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pellucid.diff.served.scores import Pairs, hidden_by
from pellucid.evaluate.scoring import wide_logits
from pellucid.generate.sample import Sampling, penalise_repetition, warp
from pellucid.models import Model, evaluating

MOST_PLACES = 256
_ROWS = 32  # at once
_STEPS = 14  # of a search between two values of the grid
_HOPELESS = 0.9  # of the error without the setting: a grid as fine as these leaves less
Misfit = Callable[[Tensor], float]  # of ln p (P) -> how far it is from what is said


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What changes a distribution; the defaults change nothing.

    presence, frequency  taken from the logit of a token that was written, once, or each time
    """

    temperature: float = 1.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __str__(self) -> str:
        changed = [
            f"{name.replace('_', '-')} {getattr(self, name):.3g}"
            for name in Knobs.__dataclass_fields__
            if getattr(self, name) != getattr(Knobs, name)
        ]
        return ", ".join(changed)


_GRIDS: dict[str, tuple[float, ...]] = {
    "temperature": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0, 3.0),
    "repetition": (0.8, 0.9, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0),
    "presence": (-1.0, -0.5, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "frequency": (-1.0, -0.5, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
}
_CUTS: dict[str, tuple[float, ...]] = {
    "top_p": (0.5, 0.7, 0.8, 0.85, 0.9, 0.92, 0.95, 0.98, 0.99),
    "top_k": (5, 10, 20, 40, 50, 64, 100),
    "min_p": (0.01, 0.02, 0.05, 0.1, 0.2),
}
_CAUSES = {
    "temperature": "temperature in the logprobs",
    "repetition": "repetition penalty in the logprobs",
    "presence": "presence penalty in the logprobs",
    "frequency": "frequency penalty in the logprobs",
    "top_p": "top-p in the logprobs",
    "top_k": "top-k in the logprobs",
    "min_p": "min-p in the logprobs",
}


class Processed:
    """A's logits of each place (U, V), to be changed in many ways."""

    def __init__(self, model: Model, pairs: Pairs) -> None:
        self.pairs = pairs
        key = pairs.text * (1 << 32) + pairs.place
        _, self._row, first = _unique(key)
        self._texts, self._places = pairs.text[first].tolist(), pairs.place[first].tolist()
        streams = []
        with evaluating(model):
            for number, said in enumerate(pairs.texts):
                places = [p for t, p in zip(self._texts, self._places, strict=True) if t == number]
                if places:
                    ids = list(said.ids)[: max(places)]
                    streams.append(hidden_by(model)(ids, 0)[torch.tensor(places) - 1])
            stream = torch.cat(streams)
            self._logits = torch.cat([wide_logits(model, x) for x in stream.split(_ROWS)])

    def scores(self, knobs: Knobs) -> Tensor:
        """ln p of each pair (P) in float64 under these settings; −inf for what they rule out."""
        found = torch.empty(len(self.pairs.id), dtype=torch.float64)
        how = Sampling(temperature=knobs.temperature, top_k=int(knobs.top_k), top_p=knobs.top_p,
                       min_p=knobs.min_p)  # fmt: skip
        for begin in range(0, len(self._logits), _ROWS):
            logits = self._penalised(begin, knobs)
            table = warp(logits, how).log_softmax(-1)
            here = ((self._row >= begin) & (self._row < begin + _ROWS)).nonzero()[:, 0]
            found[here] = table[self._row[here] - begin, self.pairs.id[here]].double()
        return found

    def _penalised(self, begin: int, knobs: Knobs) -> Tensor:
        logits = self._logits[begin : begin + _ROWS]
        if knobs.repetition != 1:
            seen = self._counts(begin, logits, written=False) > 0
            logits = penalise_repetition(logits, seen, knobs.repetition)
        if knobs.presence or knobs.frequency:
            counts = self._counts(begin, logits, written=True)
            logits = logits - knobs.presence * (counts > 0) - knobs.frequency * counts
        return logits

    def _counts(self, begin: int, like: Tensor, *, written: bool) -> Tensor:
        """How often each token stands before each place, of all, or of those written; (U, V)."""
        counts = torch.zeros_like(like)
        for row in range(len(like)):
            said, place = self.pairs.texts[self._texts[begin + row]], self._places[begin + row]
            ids = torch.tensor(said.ids[said.written if written else 0 : place], dtype=torch.long)
            counts[row].index_add_(0, ids, torch.ones(len(ids)))
        return counts


def _unique(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted values (U), the place of each of key (P) among them, the first of key with each."""
    values, inverse = torch.unique(key, return_inverse=True)
    first = torch.full((len(values),), len(key)).scatter_reduce(
        0, inverse, torch.arange(len(key)), "amin"
    )
    return values, inverse, first


def settings(processed: Processed, misfit: Misfit) -> Iterator[tuple[str, str, Tensor]]:
    """(cause, evidence, ln p (P)) of each setting at the value that fits best, then of pairs."""
    bare = misfit(processed.scores(Knobs()))
    best: tuple[float, Knobs] = (bare, Knobs())
    for name in _GRIDS:
        knobs = _fitted(processed, misfit, name, Knobs())
        yield _CAUSES[name], str(knobs), processed.scores(knobs)
        best = min(best, (misfit(processed.scores(knobs)), knobs), key=lambda row: row[0])
    for name, grid in _CUTS.items():
        tried = [replace(Knobs(), **{name: value}) for value in grid]
        knobs = min(tried, key=lambda one: misfit(processed.scores(one)))
        yield _CAUSES[name], str(knobs), processed.scores(knobs)
        best = min(best, (misfit(processed.scores(knobs)), knobs), key=lambda row: row[0])
    if best[0] < 0.8 * bare:
        knobs = best[1]
        for _ in range(3):
            for name in _GRIDS:
                knobs = _fitted(processed, misfit, name, knobs)
        if len(str(knobs).split(", ")) > 1:
            yield "several settings in the logprobs", str(knobs), processed.scores(knobs)


def _fitted(processed: Processed, misfit: Misfit, name: str, rest: Knobs) -> Knobs:
    """`rest` with the value of one knob that fits best: of a grid, then between its neighbours."""

    def at(value: float) -> float:
        return misfit(processed.scores(replace(rest, **{name: value})))

    neutral = getattr(Knobs, name)
    grid = sorted({*_GRIDS[name], neutral, getattr(rest, name)})
    errors = [at(value) for value in grid]
    place = min(range(len(grid)), key=errors.__getitem__)
    if errors[place] > _HOPELESS * errors[grid.index(getattr(rest, name))]:
        return replace(rest, **{name: grid[place]})  # nothing that a finer value could become
    low, high = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    ratio = (math.sqrt(5) - 1) / 2  # golden section
    for _ in range(_STEPS):
        one, two = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, two) if at(one) < at(two) else (one, high)
    found = (low + high) / 2
    rounded = [float(f"{found:.{digits}g}") for digits in (1, 2, 3)]
    tried = [neutral, *rounded, found, grid[place]]
    least = min(map(at, tried))
    # Of values that fit alike, within three standard errors, the plainest is meant: 0.7, not 0.699.
    alike = (1 + 9 / int(processed.pairs.own.sum())) ** 0.5
    value = next(x for x in tried if at(x) <= alike * least + 1e-12)
    return replace(rest, **{name: value})


def readings(pairs: Pairs, exact: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """(cause, evidence, ln p (P)) of numbers that are not what they are taken for."""
    yield "logarithm to the base 2", "log2 p for ln p", exact / math.log(2)
    yield "logarithm to the base 10", "log10 p for ln p", exact / math.log(10)
    for step, said in ((1, "each token has that of the one after"), (-1, "of the one before")):
        moved = torch.full_like(exact, torch.nan)
        place = {
            (t, p): row
            for row, (t, p, own) in enumerate(
                zip(pairs.text.tolist(), pairs.place.tolist(), pairs.own.tolist(), strict=True)
            )
            if own
        }
        for (text, at), row in place.items():
            other = place.get((text, at + step))
            if other is not None:
                moved[row] = exact[other]
        yield "logprobs shifted by one token", said, moved
