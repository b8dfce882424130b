"""The numbers of a verdict: each bound against the formula of its docstring, slice by slice."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import LLAMA, random_model, random_tokens

from pellucid.diff import compare, from_model
from pellucid.diff.replay import judge
from pellucid.diff.replay.statistics import equal, explained_error, measure, not_judged, overflowed
from pellucid.models import build


def rms(x: np.ndarray) -> float:
    return math.sqrt(float((x.astype(np.float64) ** 2).mean()))


def most(r: np.ndarray, unit: float) -> float:
    """The unit, and as much again where one value of r dwarfs all others."""
    return unit * (1 + math.sqrt((r**4).sum()) / (r**2).sum())


def expected(exact, a, b, unit) -> dict[tuple[int, int], float]:
    """(axis, place) -> the slice's error in units of what is allowed; (-1, 0): the whole tensor."""
    size = rms(exact)
    whole = max(rms(a - exact) / size, unit / 3)
    found = {(-1, 0): rms(b - exact) / size / max(3 * rms(a - exact) / size, most(exact, unit))}
    for axis in range(exact.ndim):
        for place in range(exact.shape[axis]):
            r, one, other = (np.take(x, place, axis) for x in (exact, a, b))
            own = math.sqrt((r.size * rms(one - r) ** 2 + 8 * (whole * size) ** 2) / (r.size + 8))
            own = max(own, rms(a - exact) / size * rms(r))
            factor = 8 * max(1.0, math.sqrt(8 / r.size))
            found[axis, place] = rms(other - r) / max(factor * own, most(r, unit) * rms(r))
    return found


@pytest.mark.parametrize("unit", [1e-9, 3e-4])
@pytest.mark.parametrize("shape", [(2, 3, 40), (3, 2, 2), (1, 12, 7)])
def test_the_ratio_is_that_of_the_worst_slice(shape, unit):
    random = np.random.default_rng(shape[1])
    exact = random.standard_normal(shape)
    a = exact + 1e-4 * random.standard_normal(shape)
    for place, factor in (
        (..., 4.0),
        ((..., 1), 1.5),
        ((slice(None), 2 % shape[1]), 40.0),
        ((0, 0, 0), 100.0),
    ):
        b = exact + 1e-4 * random.standard_normal(shape)
        b[place] = exact[place] + factor * (b[place] - exact[place])
        ratios = expected(exact, a, b, unit)
        if shape[0] == 1:
            del ratios[0, 0]  # the only row of a batch is the whole
        (axis, worst), ratio = max(ratios.items(), key=lambda item: item[1])
        if ratio <= 1:
            ratio = ratios[-1, 0]
        found = measure(*map(torch.from_numpy, (exact, a, b)), ("B", "T", "C"), unit)
        assert found.ratio == pytest.approx(ratio, rel=1e-9)
        assert found.verdict == ("diverged" if ratio > 1 else "within-rounding")
        word = {-1: "", 0: f"row {worst}", 1: f"token {worst}", 2: f"channel {worst}"}[axis]
        assert found.where == (word if ratio > 1 else "")
        assert found.error_a == pytest.approx(rms(a - exact) / rms(exact), rel=1e-12)
        assert found.error_b == pytest.approx(rms(b - exact) / rms(exact), rel=1e-12)


@pytest.mark.parametrize("most", [0, 1])
def test_bits_of_so_many_tensors_are_searched_for_a_cause(most, monkeypatch):
    monkeypatch.setattr(judge, "MOST_SEARCHED", most)
    rows = [random_tokens(LLAMA, 64).tolist()]
    a = from_model(random_model(LLAMA, torch.bfloat16), "A")
    other = build(replace(LLAMA, norm_eps=20 * LLAMA.norm_eps))
    other.load_state_dict(random_model(LLAMA, torch.bfloat16).state_dict(), assign=True)
    b = replace(from_model(other.eval(), "B"), weights=None, config=None, dialect=None)
    names = [fault.name for fault in compare(a, b, rows).faults]
    assert ("layers.0.attn_norm" in names) == (most > 0)  # its sizes say nothing, its bits do


def test_of_two_slices_alike_the_first_axis_is_named():
    exact = torch.ones(1, 256, 256, dtype=torch.float64)
    b = exact.clone()
    b[0, 2, 3] = 1.5
    found = measure(exact, exact.clone(), b, ("B", "T", "C"), 2**-20)
    assert (found.verdict, found.where) == ("diverged", "token 2")


def test_sums_of_many_terms_are_explained_by_their_accumulator():
    assert explained_error(torch.float64, 10**6) == pytest.approx(1000 * 2.0**-53)
    assert explained_error(torch.float32, 10**6) == pytest.approx(1000 * 2.0**-24)
    assert explained_error(torch.float32, 1) == 2.0**-24
    assert explained_error(torch.bfloat16, 64) == 2.0**-8  # the result's own rounding is coarser
    assert explained_error(torch.bfloat16, 2**34) == pytest.approx(2.0**17 * 2.0**-24)


def test_what_is_no_number_has_no_error():
    for values in ([1.0, math.inf], [math.inf, math.inf], [math.nan, 2.0]):
        exact = torch.tensor([[values]], dtype=torch.float64)
        found = measure(exact, exact.float(), exact.float(), ("B", "T", "C"), 1e-7)
        if not math.isnan(values[0]):
            assert found.verdict == "identical"
        assert (found.error_a, found.ratio) == (0.0, 0.0)
    for infinite in (math.inf, -math.inf):
        exact, both = torch.tensor([[[2.0, infinite]]]), torch.tensor([[[2.0, 1.0]]])
        assert measure(exact.double(), both, both.clone(), ("B", "T", "C"), 1e-7).error_a == 0
    exact, both = torch.tensor([[[2.0, math.inf]]]), torch.tensor([[[2.5, math.inf]]])
    found = measure(exact.double(), both, both.clone(), ("B", "T", "C"), 1e-7)
    assert found.error_a == pytest.approx(math.sqrt(0.5**2 / 2) / 2)  # of the size of the finite
    for each in (equal("why"), not_judged("why")):
        assert (each.error_a, each.error_b, each.ratio, each.where) == (0.0, 0.0, 0.0, "")
        assert each.note == "why"


def test_only_what_overflows_where_the_reference_does_not_is_broken():
    reference = torch.tensor([1.0, math.inf, -2e4, math.nan, 5.0])
    seen = torch.tensor([math.inf, math.inf, -math.inf, 1.0, 6.0])
    assert overflowed(reference, seen).tolist() == [True, False, True, False, False]
    assert overflowed(reference, seen, masked=True).tolist() == [True, False, False, False, False]
