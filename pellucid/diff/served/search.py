"""What fits: every way in which a server may differ, computed and held against what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.diff.causes.search import BETTER, Cause, Trial
from pellucid.diff.replay.statistics import TENSOR_FACTOR
from pellucid.diff.served import places, settings, variants
from pellucid.diff.served.places import Moved
from pellucid.diff.served.said import Said
from pellucid.diff.served.scores import FLOOR, Pairs, resolution, rms, rounding, scores
from pellucid.diff.served.variants import Base, Variant
from pellucid.models import Model
from pellucid.tokenizers import Tokenizer

MOST_PLACES = 256  # that hypotheses are computed for, of the texts that are farthest off
_FEW = 8  # pairs: of fewer nothing is concluded
_SURE = 8.0  # standard errors by which a hypothesis' own gap must stand in B's
_LIKE = 0.2  # by how much of itself it may stand there more or less than once
_DONE = 50.0  # a fall of the error after which no other kind of hypothesis is needed
_FAR, _ALL = 10.0, 2.0  # nor where a gap of so many roundings leaves about one
_HELPS = 0.95  # of the error, left by quantised layers, for which the head is tried too
_HEALTHY = "computed in"


@dataclass(kw_only=True)
class _Found:
    trial: Trial
    misfit: float


class Search:
    """The hypotheses about some texts, and how each stands against what is said of them.

    size   of A's own rounding, in the units of `scores.rounding`
    began  the place from which on B is off
    """

    def __init__(
        self,
        base: Base,
        texts: Sequence[Said],
        tokenizer: Tokenizer | None,
        size: float,
        began: int,
        progress: Callable[[str], None],
    ) -> None:
        self.base, self.texts, self.tokenizer, self.size = base, texts, tokenizer, size
        self.began, self.progress = began, progress
        self.found: list[_Found] = []

    def begin(self, exact: Model, coarse: Model, order: Sequence[int]) -> None:
        """Choose the places that hypotheses are computed for: of the texts in this order."""
        self.model, self.chosen = exact, [self.texts[n] for n in order]
        self.pairs = Pairs.of(self.chosen, MOST_PLACES)
        kept = [n for n in range(len(self.chosen)) if bool((self.pairs.text == n).any())]
        self.chosen = [self.chosen[n] for n in kept]
        self.pairs = Pairs.of(self.chosen, MOST_PLACES)
        self.exact, _, moved = rounding(exact, coarse, self.pairs)
        floor = FLOOR * (1 + self.exact.abs()) + resolution(self.pairs.value)
        self.scale = (moved + floor) * self.size
        self.gap = self._gap(self.exact)

    def _gap(self, values: Tensor) -> Tensor:
        """What is said less `values`, in units of rounding; NaN where nothing can be compared."""
        gap = torch.where(values == self.pairs.value, 0.0, self.pairs.value - values)
        return (gap / self.scale).clamp(-1e6, 1e6)

    def misfit(self, values: Tensor) -> float:
        """How far ln p (P) is from what is said, in units of rounding."""
        return rms(self._gap(values))

    def consider(self, cause: str, evidence: str, values: Tensor) -> _Found:
        """Hold a hypothesis' ln p (P) against what is said; whether it fits, by a real fall."""
        left = self._gap(values)
        known = ~left.isnan()
        after, before = rms(left[known]), rms(self.gap[known])
        fits = False
        if int(known.sum()) >= max(_FEW, len(left) // 4) and after <= TENSOR_FACTOR:
            own = (self.gap - left)[known]  # the gap that the hypothesis makes
            power = float(own.square().sum())
            even = power**2 >= _FEW * float(own.pow(4).sum())  # not by one or two tokens alone
            if power > 0 and (even or before > TENSOR_FACTOR):
                share = float((own * self.gap[known]).sum()) / power
                error = max(after, 1e-9) / power**0.5
                fits = abs(share - 1) <= _LIKE and share >= _SURE * error and after < before
        nats = rms((self.pairs.value - values)[known & self.pairs.own])
        found = _Found(
            trial=Trial(cause=cause, evidence=evidence, error=nats, fits=fits), misfit=after
        )
        self.found.append(found)
        return found


def find_cause(
    search: Search, exact: Model, coarse: Model, order: Sequence[int], diverged: bool
) -> tuple[Cause | None, tuple[Trial, ...], str]:
    """(what fits best, all that was tried, what a healthy B seems to do) for texts in `order`.

    Where B is within rounding only what costs little is tried: a cause is then named where it
    stands in B's gaps beyond chance.
    """
    search.begin(exact, coarse, order)
    before = search.misfit(search.exact)
    for group in _groups(search, diverged):
        tried = list(group)  # all of a kind: the next may fit better
        if any(_settled(found, before) for found in tried):
            break
    best: _Found | None = None
    for found in search.found:
        if found.trial.fits and (best is None or found.misfit < best.misfit / BETTER):
            best = found
    trials = tuple(found.trial for found in search.found)
    if best is None:
        return None, trials, ""
    nats = rms((search.pairs.value - search.exact)[search.pairs.own])
    fall = f"the gap falls from {nats:.2g} to {best.trial.error:.2g} nats"
    if best.trial.cause.startswith(_HEALTHY):
        return None, trials, f"B seems {best.trial.cause} ({best.trial.evidence}): {fall}"
    cause = Cause(
        name=best.trial.cause,
        evidence=f"{best.trial.evidence}: computed, {fall}",
        error=best.trial.error or 0.0,
        tried=len(trials),
    )
    return cause, trials, ""


def _settled(found: _Found, before: float) -> bool:
    """Whether so much is explained that other kinds of hypotheses need not be computed."""
    exact = found.misfit <= before / _DONE
    return found.trial.fits and (exact or (before >= _FAR and found.misfit <= _ALL))


def _groups(search: Search, diverged: bool) -> Iterator[Iterator[_Found]]:
    """Every hypothesis, kind by kind, what is likely and costs little first."""
    base, pairs, bos = search.base, search.pairs, search.tokenizer and search.tokenizer.bos_id
    search.progress("cause: what the numbers are")
    yield (search.consider(*row) for row in settings.readings(pairs, search.exact))
    yield (_computed(search, variant) for variant in variants.computed_in(base))
    search.progress("cause: other tokens")
    yield (_moved(search, moved) for moved in places.begin_tokens(search.chosen, bos))
    yield (_moved(search, moved) for moved in places.other_prompts(search.chosen, search.tokenizer))
    search.progress("cause: a sampler's settings")
    yield _settings(search)
    if not diverged:
        return
    yield (_moved(search, moved) for moved in places.cut_prompts(search.chosen, bos))
    search.progress("cause: another context, RoPE, constants")
    if not base.config.has_windows:
        yield _windows(search)
    yield (_computed(search, variant) for variant in variants.of_config(base))
    search.progress("cause: a quantised cache, quantised weights")
    yield (_computed(search, variant) for variant in variants.of_cache(base))
    yield _quantised(search)


def _quantised(search: Search) -> Iterator[_Found]:
    """Formats of weights: in the layers, and where that helps in embedding and head too."""
    before = search.misfit(search.exact)
    for inside, everywhere in variants.of_weights(search.base):
        found = _computed(search, inside)
        yield found
        if everywhere is not None and found.misfit < _HELPS * before:
            yield _computed(search, everywhere)


def _moved(search: Search, moved: Moved) -> _Found:
    values = scores(search.model, search.pairs, ids=moved.ids, shifts=moved.shifts)
    begin = torch.tensor(moved.begin)[search.pairs.text]
    values = torch.where(search.pairs.place >= begin, values, torch.nan)
    return search.consider(moved.cause, moved.evidence, values)


def _computed(search: Search, variant: Variant) -> _Found:
    model = variant.model()
    hidden = variant.hidden(model) if variant.hidden else None
    return search.consider(
        variant.cause, variant.evidence, scores(model, search.pairs, hidden=hidden)
    )


def _windows(search: Search) -> Iterator[_Found]:
    """A context cut at some length, found by halving steps from the best of a few."""
    longest, began = int(search.pairs.place.max()), search.began
    tried: dict[int, _Found] = {}

    def found(width: int) -> Iterator[_Found]:
        if width not in tried and 1 <= width < longest:
            tried[width] = _computed(search, variants.windowed(search.base, width))
            yield tried[width]

    rounds = [1 << n for n in range(3, 18)]
    for width in (*rounds, began - 1, began - 8, began - 24):
        yield from found(width)
    for step in (32, 16, 8, 4, 2, 1, 1):
        if tried:
            best = min(tried, key=lambda width: tried[width].misfit)
            for width in (best - step, best + step):
                yield from found(width)


def _settings(search: Search) -> Iterator[_Found]:
    """A sampler's settings; where the prompt is scored too, on what was sampled alone as well."""
    processed, sampled = settings.Processed(search.model, search.pairs), search.pairs.written()
    everywhere = [] if sampled.all() else [torch.ones_like(sampled)]
    for mask in ([sampled] if sampled.any() else []) + everywhere:

        def applied(values: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask, values, search.exact)

        for cause, evidence, values in settings.settings(
            processed, lambda values, applied=applied: search.misfit(applied(values))
        ):
            yield search.consider(cause, evidence, applied(values))
