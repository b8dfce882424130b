"""Matrices with more rows than the slices in which they are quantised and looked through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pellucid.models.quantised import TILE, QuantisedLinear

ROWS = 64 * TILE + 16 * TILE + 5  # more than one slice of 16 and of 64 tiles, and a part of a tile


def quantised(weight: torch.Tensor, bits: int) -> QuantisedLinear:
    layer = nn.Linear(weight.shape[1], len(weight), bias=False)
    made = QuantisedLinear(layer, bits=bits, group=32)
    made.quantise_(weight)
    return made


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Each row of a size of its own, so that a row in another's place shows."""
    rows = torch.randn(ROWS, 70, generator=torch.Generator().manual_seed(5))
    return rows * torch.linspace(0.5, 3, ROWS)[:, None]


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_matrix_is_quantised_as_its_rows_are(bits, weight):
    """Groups lie along rows, so no row depends on where it stands."""
    whole = quantised(weight, bits).weight
    step = 7 * TILE  # other slices than the code's
    parts = [quantised(part, bits).weight for part in weight.split(step)]
    assert torch.equal(whole, torch.cat(parts))
    largest = weight.abs().amax(1, keepdim=True)
    assert ((whole - weight).abs() <= largest * {8: 0.006, 6: 0.036, 4: 0.2}[bits]).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("row", [0, 63 * TILE + 15, 64 * TILE, ROWS - 1])
def test_a_damaged_level_is_found_in_its_row_and_group(bits, row, weight):
    made = quantised(weight, bits)
    assert not made.misfits(weight).any()
    assert made.misfits(weight).shape == (ROWS, 3)
    other = weight.clone()
    other[row, 40] += weight[row].abs().max()  # so far off that no rounding explains it
    found = made.misfits(other).nonzero().tolist()
    assert found == [[row, 1]]
