"""The pictures of a diff: what is small on the page must not hide what is wrong in the tensor."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest
import torch

from pellucid.show.diff_maps import (
    CELLS,
    NOT_FINITE,
    NOTHING,
    PANELS,
    ZERO,
    Maps,
    reduced,
    smaller,
)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unpacked(picture, what):
    shape = picture["panels"], picture["rows"], picture["columns"]
    return np.frombuffer(base64.b64decode(picture[what]), np.uint8).reshape(shape)


def test_a_small_tensor_is_whole():
    x = randn(1, 7, 12)
    pair = reduced(x, x + 1, ("B", "T", "C"), CELLS)
    assert pair.block == (1, 1) and pair.left_out == 0 and pair.heads == ("",)
    assert torch.equal(pair.reference, x) and torch.equal(pair.seen, x + 1)
    assert pair.size == pytest.approx(float(x.square().mean().sqrt()))
    assert pair.stats["B"]["mean"] == pytest.approx(float(x.mean()) + 1)


@pytest.mark.parametrize("shape", [(1, 33, 2049), (1, 1, 5000), (1, 700, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_one_wrong_value_is_seen_in_its_own_cell(shape, seed):
    x = randn(*shape, seed=seed)
    y = x.clone()
    place = [
        int(torch.randint(size, (), generator=torch.Generator().manual_seed(seed)))
        for size in shape
    ]
    y[tuple(place)] += 1e-6
    pair = reduced(x, y, ("B", "T", "C"), 300)
    assert pair.seen[0].numel() <= 300
    (down, across), cell = pair.block, (pair.seen != pair.reference).nonzero().tolist()
    assert cell == [[0, place[1] // down, place[2] // across]]
    assert pair.reference[tuple(cell[0])] == x[tuple(place)]
    assert pair.seen[tuple(cell[0])] == y[tuple(place)]
    again = smaller(pair, 80)
    assert again.seen.numel() <= 80
    ((_, row, column),) = (again.seen != again.reference).nonzero().tolist()
    assert (row, column) == (place[1] // again.block[0], place[2] // again.block[1])


def test_of_many_heads_the_worst_are_shown():
    x = randn(2, 24, 5, 6)
    y = x.clone()
    y[1, 7] += 3
    y[0, 23, 2, 2] += 1
    pair = reduced(x, y, ("B", "H", "T", "D"), CELLS)
    assert len(pair.heads) == PANELS and pair.left_out == 2 * 24 - PANELS
    assert {"row 0, head 23", "row 1, head 7"} <= set(pair.heads)
    shown = pair.heads.index("row 1, head 7")
    assert torch.equal(pair.seen[shown], y[1, 7])


def test_bytes_read_back():
    x, error = randn(1, 4, 9), 1e-3
    pair = reduced(x, x + error, ("B", "T", "C"), CELLS)
    picture = pair.to_json()
    values = (unpacked(picture, "reference").astype(float) - ZERO) / ZERO * picture["limit"]
    within = x[0].abs() <= picture["limit"]
    assert np.abs(values[0] - x[0].numpy())[within].max() <= picture["limit"] / ZERO
    decades = unpacked(picture, "error") / 25 - 9
    assert np.abs(decades - math.log10(error / pair.size)).max() <= 0.5 / 25 + 1e-9


def test_equal_masked_and_not_finite_cells():
    x = randn(1, 1, 3, 3)
    y = x.clone()
    x[..., 0, 2], y[..., 0, 2] = float("-inf"), torch.finfo(torch.float32).min
    y[..., 1, 1], y[..., 2, 2] = float("nan"), float("inf")
    pair = reduced(x, y, ("B", "H", "T", "S"), CELLS)
    assert (pair.stats["R"]["not finite"], pair.stats["B"]["not finite"]) == (0, 2)
    picture = pair.to_json()
    error, seen = unpacked(picture, "error")[0], unpacked(picture, "seen")[0]
    assert error[0, 2] == seen[0, 2] == NOTHING
    assert error[1, 1] == error[2, 2] == seen[1, 1] == seen[2, 2] == NOT_FINITE
    assert error[0, 0] == 0
    assert math.isfinite(picture["limit"]) and math.isfinite(picture["size"])


def test_the_future_of_a_pattern_has_no_value():
    pattern = torch.softmax(randn(1, 2, 4, 6).masked_fill(torch.ones(4, 6).triu(3) > 0, -1e9), -1)
    pattern = pattern.float()
    leaking = pattern.clone()
    leaking[0, 0, 0, 5] = 0.25
    maps = Maps()
    maps.keep("layers.0.attn.pattern", pattern, leaking)
    assert maps.pairs["layers.0.attn.pattern"].stats["R"]["not finite"] == 0
    picture = maps.pairs["layers.0.attn.pattern"].to_json()
    error = unpacked(picture, "error")
    future = np.triu(np.ones((4, 6)), 3) > 0
    assert (error[1][future] == NOTHING).all() and (error[1][~future] == 0).all()
    assert error[0, 0, 5] > 100  # not masked: somebody looked there


def test_keep_takes_what_a_diff_gives():
    maps = Maps()
    maps.keep("mask", torch.ones(3, 3).tril() > 0, torch.ones(2, 1, 3, 3).tril() > 0)
    maps.keep("layers.0.attn.q", torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5))
    maps.keep("positions", torch.arange(3), torch.arange(3))
    maps.keep("logits", torch.ones(1, 2, 9).bfloat16(), torch.ones(1, 2, 9).bfloat16())
    assert set(maps.pairs) == {"mask", "positions", "logits"}
    assert maps.pairs["mask"].heads == ("row 0, head 0", "row 1, head 0")
    for pair in maps.pairs.values():
        assert set(pair.to_json()) >= {"reference", "seen", "error"}
