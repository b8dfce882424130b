"""The three-way verdict: rounding in any order passes, anything larger does not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.diff.replay.statistics import explained_error, measure, rms, roundoff

DIMS = ("B", "T", "C")


def _product(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R, a and b of one product: b adds up in another order."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 12, 64, generator=random).to(dtype)
    w = torch.randn(64, 32, generator=random).to(dtype)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    order = torch.randperm(64, generator=random)
    parts = zip(x[..., order].float().chunk(4, -1), w[order].float().chunk(4), strict=True)
    other = torch.stack([a @ b for a, b in parts]).sum(0).to(dtype)
    return x.to(wide) @ w.to(wide), x @ w, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_order_of_summation_is_rounding(dtype):
    for seed in range(100):
        exact, a, b = _product(seed, dtype)
        result = measure(exact, a, b, DIMS, explained_error(dtype, 64))
        assert result.verdict in ("identical", "within-rounding"), (seed, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_times_the_rounding_is_beyond_it(dtype):
    exact, a, _ = _product(0, dtype)
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).double()
    b = exact + noise * 20 * roundoff(dtype) * rms(exact)
    result = measure(exact, a, b, DIMS, explained_error(dtype, 64))
    assert result.verdict == "diverged" and result.ratio > 1 and result.where == ""


@pytest.mark.parametrize(
    ("place", "where"),
    [((0, 3), "token 3"), ((0, slice(None), 5), "channel 5")],
)
def test_a_wrong_slice_is_found_and_said(place, where):
    exact, a, b = _product(0, torch.float32)
    b = b.clone()
    b[place] = b[place] * (1 + 3e-5)
    result = measure(exact, a, b, DIMS, explained_error(torch.float32, 64))
    assert result.verdict == "diverged" and result.where == where


def test_bit_equality_is_said_even_of_numbers_that_are_not_finite():
    a = torch.tensor([[[1.0, math.inf]]])
    assert measure(a.double(), a, a.clone(), DIMS, 1e-7).verdict == "identical"


def test_values_that_overflow_only_in_b_diverge_and_are_counted():
    exact, a, b = _product(0, torch.float32)
    b = b.clone()
    b[0, 2, 7] = math.inf
    result = measure(exact, a, b, DIMS, 1e-7)
    assert result.verdict == "diverged"
    assert result.note.startswith("1 of 384") and result.where == "token 2, channel 7"


def test_where_even_the_reference_is_not_finite_nothing_is_judged():
    a = torch.full((1, 2, 2), math.nan)
    assert measure(a.double(), a, torch.ones(1, 2, 2), DIMS, 1e-7).verdict == "not-judged"


SCORES = ("B", "H", "T", "S")


def test_a_score_may_be_switched_off_by_any_low_number():
    exact = torch.tensor([[[[0.5, -math.inf], [0.25, 1.5]]]], dtype=torch.float64)
    a = exact.float()
    b = a.masked_fill(a.isinf(), -1e9)
    assert measure(exact, a, b, SCORES, 1e-7, masked=True).verdict == "within-rounding"


@pytest.mark.parametrize(("place", "value"), [((0, 0, 0, 1), 0.3), ((0, 0, 1, 0), -1e9)])
def test_a_score_masked_on_one_side_only_is_a_divergence(place, value):
    exact = torch.tensor([[[[0.5, -math.inf], [0.25, 1.5]]]], dtype=torch.float64)
    b = exact.float().masked_fill(exact.isinf(), -1e9)
    b[place] = value
    result = measure(exact, exact.float(), b, SCORES, 1e-7, masked=True)
    assert result.verdict == "diverged" and "masked differently" in result.note


def test_low_numbers_elsewhere_are_numbers():
    exact = torch.tensor([[[-20000.0, 3.0, 1.0]]], dtype=torch.float64)
    b = exact.float().clone()
    b[0, 0, 0] = -30000.0
    assert measure(exact, exact.float(), b, DIMS, 1e-7).verdict == "diverged"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e20]))
def test_the_verdict_does_not_depend_on_the_scale(seed, scale):
    exact, a, b = _product(seed, torch.float32)
    plain = measure(exact, a, b, DIMS, 1e-6)
    power = 2.0 ** round(math.log2(scale))
    scaled = measure(exact * power, a * power, b * power, DIMS, 1e-6)
    assert scaled.verdict == plain.verdict
    assert scaled.ratio == pytest.approx(plain.ratio, rel=1e-6)


def test_a_tensor_of_zeros_is_measured_in_absolute_terms():
    zeros = torch.zeros(1, 4, 4)
    assert measure(zeros.double(), zeros, zeros + 1e-3, DIMS, 1e-7).verdict == "diverged"


def test_whole_numbers_are_not_rounded():
    assert roundoff(torch.int64) == 0 and roundoff(torch.float32) == 2**-24


def test_the_error_of_equal_values_is_a_share_of_their_size():
    exact = torch.full((1, 2, 4), 10.0, dtype=torch.float64)
    both = exact + 0.5
    result = measure(exact, both, both.clone(), DIMS, 1e-7)
    assert (result.verdict, result.error_a, result.ratio) == ("identical", pytest.approx(0.05), 0)


def test_the_own_error_is_measured_too_where_b_overflows():
    exact = torch.full((1, 2, 4), 10.0, dtype=torch.float64)
    a, b = exact + 0.5, exact + 0.5
    b[0, 1, 2] = math.inf
    result = measure(exact, a, b, DIMS, 1e-7)
    assert (result.verdict, result.error_b) == ("diverged", math.inf)
    assert result.error_a == pytest.approx(0.05)
