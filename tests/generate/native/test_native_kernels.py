"""Every kernel this machine can run, against float64, within the bound of its dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pellucid.generate.native import instruction_sets, library
from pellucid.generate.native.decoder import multiply
from pellucid.models.quantised import QuantisedLinear

SETS = instruction_sets()
SHAPES = [(1, 1), (3, 5), (16, 64), (17, 33), (64, 172), (50, 300), (33, 1000)]


@pytest.fixture(scope="module", params=SETS)
def made(request):
    return library(request.param)


def linear(rows: int, columns: int, dtype: torch.dtype, seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, columns, generator=generator))
    return layer.to(dtype).requires_grad_(False)


def vectors(batch: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(7))
    return x.to(dtype).float()  # a model rounds its activations before a product


def bound(weight: torch.Tensor, x: torch.Tensor, unit: float) -> torch.Tensor:
    """What rounding makes of a sum of products: a share of the sum of their sizes."""
    return unit * (x.double().abs() @ weight.double().abs().T)


def as_stored(quantised: QuantisedLinear) -> torch.Tensor:
    """Levels times scales, not rounded to the dtype that the model's own code needs them in."""
    quantised.dtype, dtype = torch.float32, quantised.dtype
    weight = quantised.weight
    quantised.dtype = dtype
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_matrices(made, dtype, shape):
    rows, columns = shape
    layer = linear(rows, columns, dtype, seed=rows)
    for batch in (1, 2, 3, 4, 5, 16):
        x = vectors(batch, columns, dtype)
        exact = x.double() @ layer.weight.double().T
        # Products of 16-bit numbers are exact in float32, so only its summation rounds.
        error = (multiply(made, layer, x).double() - exact).abs()
        assert (error <= bound(layer.weight, x, columns**0.5 * 2**-22) + 1e-30).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("bits", "offsets"), [(8, False), (6, False), (4, False), (4, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_matrices(made, dtype, bits, offsets, group, shape):
    rows, columns = shape
    layer = linear(rows, columns, dtype, seed=columns)
    layer.weight.add_(0.3)
    quantised = QuantisedLinear(layer, bits=bits, group=group, offsets=offsets)
    quantised.quantise_(layer.weight)
    weight = as_stored(quantised)
    for batch in (1, 3, 4, 6):
        x = vectors(batch, columns, torch.float32)
        exact = x.double() @ weight.double().T
        # Of a model in 16 bits activations keep 15 bits of the largest of their group.
        bits_kept = 2**-15 if dtype == torch.bfloat16 else 0
        step = x.abs().amax() * bits_kept * weight.double().abs().sum(1)
        # An offset is taken times the sum of its group's inputs, levels times each of them.
        unit = columns**0.5 * 2**-22 * (4 if offsets else 1)
        allowed = step + bound(weight, x, unit) + 1e-30
        assert ((multiply(made, quantised, x).double() - exact).abs() <= allowed).all()


def test_zeros_and_extremes(made):
    layer = linear(20, 96, torch.float32, seed=0)
    layer.weight[3] = 0
    layer.weight[4, :64] = 0
    for bits, offsets in ((8, False), (6, False), (4, False), (4, True)):
        quantised = QuantisedLinear(layer, bits=bits, offsets=offsets)
        quantised.quantise_(layer.weight)
        x = torch.zeros(2, 96)
        x[1, 70] = -3e4
        out = multiply(made, quantised, x)
        assert (out[0] == 0).all() and out[1, 3] == 0
        near = {"rtol": 1e-5, "atol": 3e-3} if offsets else {}  # level and offset may cancel
        torch.testing.assert_close(out[1], -3e4 * quantised.weight[:, 70], **near)


def test_each_library_says_what_it_is():
    for name in SETS:
        assert library(name).pellucid_instructions().decode() == name
