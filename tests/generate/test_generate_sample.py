"""Sampling: each step against transformers, the draw against its distribution."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.generate import sample
from pellucid.generate.sample import (
    Sampling,
    accept_or_draw,
    draw,
    next_tokens,
    row_generators,
    row_seed,
    warp,
)


def random_logits(seed: int, *, ties: bool, rows: int = 3, vocabulary: int = 50) -> torch.Tensor:
    logits = 4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    return logits.round() if ties else logits


def generators(rows: int) -> list[torch.Generator]:
    return row_generators(0, rows)


@pytest.mark.peers
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, ("TemperatureLogitsWarper", 0.7)),
        ({"top_k": 1}, ("TopKLogitsWarper", 1)),
        ({"top_k": 7}, ("TopKLogitsWarper", 7)),
        ({"top_k": 500}, ("TopKLogitsWarper", 500)),
        ({"top_p": 1e-6}, ("TopPLogitsWarper", 1e-6)),
        ({"top_p": 1e-9}, ("TopPLogitsWarper", 1e-9)),  # 1 - p rounds to 1 in float32
        ({"top_p": 0.5}, ("TopPLogitsWarper", 0.5)),
        ({"top_p": 0.95}, ("TopPLogitsWarper", 0.95)),
        ({"min_p": 0.05}, ("MinPLogitsWarper", 0.05)),
        ({"min_p": 1.0}, ("MinPLogitsWarper", 1.0)),
    ],
)
def test_each_step_equals_transformers(ours: dict, theirs: tuple, ties: bool) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    name, value = theirs
    for seed in range(20):
        logits = random_logits(seed, ties=ties)
        expected = getattr(process, name)(value)(None, logits.clone())
        assert torch.equal(warp(logits, Sampling(**ours)), expected)


def test_each_step_by_hand() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, -math.inf], [2.0, 2.0, 2.0, 1.0, 0.0]])
    gone = -math.inf
    for steps, expected in (
        ({"temperature": 0.5}, 2 * logits),
        ({"top_k": 1}, [[gone, 3, gone, 3, gone], [2, 2, 2, gone, gone]]),  # equals stay
        ({"top_k": 3}, [[gone, 3, 1, 3, gone], [2, 2, 2, gone, gone]]),
        ({"top_k": 9}, logits),
        # Shares 0.02 0.45 0.06 0.45 0, and 0.28 three times, 0.10, 0.04.
        ({"top_p": 0.95}, [[gone, 3, 1, 3, gone], [2, 2, 2, 1, gone]]),
        ({"min_p": 0.2}, [[gone, 3, gone, 3, gone], [2, 2, 2, 1, gone]]),  # e^-2 and e^-1 of it
        ({"min_p": 0.5}, [[gone, 3, gone, 3, gone], [2, 2, 2, gone, gone]]),
    ):
        assert torch.equal(warp(logits, Sampling(**steps)), torch.as_tensor(expected)), steps
    level = warp(torch.zeros(1, 4), Sampling(top_p=0.5))  # a quarter each: two go, whichever
    assert level.isinf().sum() == 2
    seen = torch.tensor([[True, True, False, False, True], [False] * 5])
    penalised = warp(logits - 1, Sampling(temperature=0.0, repetition_penalty=2.0), seen)
    assert torch.equal(penalised[0], torch.tensor([-2.0, 1.0, 0.0, 2.0, gone]))
    assert torch.equal(penalised[1], logits[1] - 1)


@pytest.mark.parametrize(
    ("name", "value", "kind"), [("temperature", "1", "a number"), ("top_k", 2.5, "a whole number")]
)
def test_what_is_no_number_is_said(name: str, value: object, kind: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value!r}: expected {kind}$"):
        Sampling(**{name: value})


@pytest.mark.peers
@pytest.mark.parametrize("ties", [False, True])
def test_all_steps_in_order_equal_transformers(ties: bool) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    chain = process.LogitsProcessorList(
        [
            process.RepetitionPenaltyLogitsProcessor(1.3),
            process.TemperatureLogitsWarper(0.6),
            process.TopKLogitsWarper(20),
            process.TopPLogitsWarper(0.9),
            process.MinPLogitsWarper(0.02),
        ]
    )
    sampling = Sampling(temperature=0.6, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    for seed in range(20):
        logits = random_logits(seed, ties=ties)
        tokens = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(seed))
        seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, tokens, True)
        assert torch.equal(warp(logits, sampling, seen), chain(tokens, logits.clone()))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_sufficient_set(seed: int, p: float) -> None:
    logits = random_logits(seed, ties=False, rows=1).double()
    kept = sample.keep_top_p(logits, p)[0] > -math.inf
    probabilities = logits.softmax(-1)[0]
    mass = float(probabilities[kept].sum())
    assert mass >= p - 1e-12
    assert mass - float(probabilities[kept].min()) < p + 1e-12, "one token fewer was enough"
    assert not kept.all() or p > 0.9
    assert probabilities[kept].min() > probabilities[~kept].max()


def test_repetition_penalty_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert sample.penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_greedy_takes_the_likeliest_and_no_random_number() -> None:
    sampling, rows = Sampling(temperature=0.0, top_k=1), generators(2)
    before = [g.get_state() for g in rows]
    assert next_tokens(torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]]), sampling, rows) == [1, 0]
    assert all(torch.equal(g.get_state(), b) for g, b in zip(rows, before, strict=True))


def test_draw_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    count = 20_000
    drawn = draw(probabilities.log().expand(count, -1), [generators(1)[0]] * count)
    share = torch.bincount(drawn, minlength=5) / count
    # Four standard deviations of a binomial share.
    assert ((share - probabilities).abs() <= 4 * (probabilities / count).sqrt()).all()
    assert share[1] == 0


def test_draw_survives_the_ends_of_the_unit_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    for number, token in ((0.0, 1), (1 - 2**-53, 2)):
        monkeypatch.setattr(
            torch, "rand", lambda *_, number=number, **__: torch.tensor([number]).double()
        )
        assert draw(logits, generators(1)).tolist() == [token]


def test_narrow_logits_are_sampled_in_float32() -> None:
    sampling = Sampling(temperature=0.9, top_p=0.8)
    for seed in range(20):
        logits = random_logits(seed, ties=False, vocabulary=2000).bfloat16()
        narrow = next_tokens(logits, sampling, row_generators(seed, 3))
        assert narrow == next_tokens(logits.float(), sampling, row_generators(seed, 3))


def test_logits_that_are_not_numbers_are_refused() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN"):
            next_tokens(
                torch.tensor([[1.0, math.nan]]), Sampling(temperature=temperature), generators(1)
            )


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
    ],
)
def test_settings_are_checked_where_they_are_made(wrong: dict) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}: expected"):
        Sampling(**wrong)


def test_seeds() -> None:
    assert row_seed(7, 0) == 7
    seeds = {row_seed(seed, row) for seed in range(20) for row in range(1, 20)}
    assert len(seeds) == 20 * 19 and all(0 <= seed < 2**63 for seed in seeds)
    digest = hashlib.blake2b(b"7 1", digest_size=8).digest()  # the top 63 of its 64 bits
    assert row_seed(7, 1) == int(digest.hex(), 16) // 2
    assert [g.initial_seed() for g in row_generators([3, 4], 2)] == [3, 4]
    chance = {g.initial_seed() for _ in range(3) for g in row_generators(None, 2)}
    assert len(chance) == 6
    with pytest.raises(ValueError, match="seed is -1"):
        row_generators(-1, 1)
    assert row_seed(2**63 - 1, 0) == 2**63 - 1
    with pytest.raises(ValueError, match=f"seed is {2**63}"):
        row_seed(2**63, 0)
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        row_generators([1, 2], 3)


def test_chance_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    row_generators(None, 2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("seed", range(5))
def test_a_drafted_token_is_accepted_below_its_share_and_else_drawn_from_the_rest(seed) -> None:
    """min(1, p / q) against the uniform number that the seed gives first, to 1e-9."""
    first = float(torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    drafted_by = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    for share, accepted in ((first + 1e-9, True), (first - 1e-9, False)):
        p = torch.tensor([share, 0.0, 1 - share, 0.0], dtype=torch.float64)
        found = accept_or_draw(
            p.log()[None], Sampling(), torch.Generator().manual_seed(seed), None, 0, drafted_by
        )
        assert found == (0 if accepted else 2)  # of the others only one has more than the draft's
