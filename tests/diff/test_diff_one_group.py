"""Groups of 16-bit values held against levels one by one: A rounded is proven, damage is not."""

from __future__ import annotations

import pytest
import torch

from pellucid.diff.levels import NF4, OFFSET, SYMMETRIC
from pellucid.diff.levels_of_one_group import standing
from pellucid.diff.quantisation import quantised
from pellucid.diff.selftest.quantisers import FORMATS

UNIT = torch.finfo(torch.bfloat16).eps / 2
KINDS = [  # format, levels, group, steps from end to end
    ("Q8_0", SYMMETRIC, 32, 127),
    ("Q5_1", OFFSET, 32, 31),
    ("Q4_K", OFFSET, 32, 15),
    ("NF4, scales in eight bits", NF4, 64, 16),
]


def _drawn(rows, columns=64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) * 0.04


def _held(levels, a, b, most):
    return standing(levels, a.double(), b.double(), UNIT, most, 2.0**-11)


@pytest.mark.parametrize(("name", "levels", "group", "most"), KINDS, ids=[k[0] for k in KINDS])
def test_a_group_on_its_levels_is_proven_and_a_damaged_one_is_not(name, levels, group, most):
    a = _drawn(6).bfloat16()
    b = FORMATS[name](a.float()).bfloat16()
    a, b = (x.reshape(-1, group)[:6] for x in (a, b))
    assert _held(levels, a, b, most).all()
    assert not _held(levels, a, a, most).any()  # values that stand on no levels
    moved = b.clone().float()
    place = moved.abs().argsort(1)[:, group // 2, None]
    size = (b.float().amax(1) - b.float().amin(1))[:, None] / 8
    moved.scatter_add_(1, place, size)  # one value somewhere else
    assert not _held(levels, a, moved.bfloat16(), most).any()
    assert not _held(levels, a, (b.float() * 1.5).bfloat16(), most).any()


@pytest.mark.parametrize("name", [kind[0] for kind in KINDS])
def test_every_group_of_a_quantised_matrix_in_bfloat16_is_explained(name):
    """With rows of very different sizes, down to scales that float16 holds to a per cent only."""
    columns = 256 if name == "Q4_K" else 128
    smallest = -1 if name.startswith("NF4") else -3
    sizes = torch.logspace(0, smallest, 32)[:, None]
    a = (_drawn(32, columns) * sizes).bfloat16()
    b = FORMATS[name](a.float()).bfloat16()
    found = quantised(a, b)
    assert found is not None and found[0] == "quantised weights" and found[2] == "explained", found
