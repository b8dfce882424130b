"""Steps of groups and levels that keep products, against searches and formulas written out."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, random_model, random_tokens

from pellucid.evaluate.quantise import quantise_by_inputs
from pellucid.models.levels import Products, best_steps, compensated_levels, near_enough, to_levels
from pellucid.models.quantised import Format, QuantisedMatrix, quantise


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error_of(weight, scales, offsets, counts):
    levels = to_levels(weight, scales, 4, offsets)
    return (counts * (levels * scales[..., None] + offsets[..., None] - weight) ** 2).sum(-1)


def test_steps_are_near_the_best_of_a_fine_search():
    weight, counts = random(40, 32) + 0.7, (random(32) / 2).exp()
    found = error_of(weight, *best_steps(weight, 4, counts), counts)
    low, high = weight.amin(1), weight.amax(1)
    best = torch.full_like(low, float("inf"))
    for first in torch.linspace(-0.1, 0.3, 25):
        for last in torch.linspace(-0.1, 0.3, 25):
            start, end = low + first * (high - low), high - last * (high - low)
            scales = (end - start) / 15
            best = torch.minimum(best, error_of(weight, scales, start + 8 * scales, counts))
    assert (found <= 2 * best).all() and found.sum() <= 1.1 * best.sum()


def test_equal_values_and_zeros_are_kept():
    weight = torch.zeros(3, 32)
    weight[1] = 0.25
    scales, offsets = best_steps(weight, 4, torch.ones(32))
    assert error_of(weight, scales, offsets, torch.ones(32)).max() == 0


def test_levels_are_those_of_the_published_rule():
    """Frantar et al. (2022), equation 2, with the inverse of what is left at every column."""
    weight, x = random(6, 24).double(), random(200, 24).double() @ random(24, 24).double()
    sums = x.T @ x
    regular = sums + 0.01 * sums.diagonal().mean() * torch.eye(24)
    scale, left, expected = torch.full((6, 24), 0.3).double(), weight.clone(), []
    for column in range(24):
        inverse = torch.linalg.inv(regular[column:, column:])
        level = (left[:, column] / 0.3).round().clamp(-8, 7)
        expected.append(level)
        error = (left[:, column] - level * 0.3) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    found = compensated_levels(weight.float(), scale.float(), None, 4, Products(sums.float()))
    assert torch.equal(found, torch.stack(expected, 1).float())


@pytest.mark.parametrize("offsets", [False, True])
def test_products_are_closer_and_values_farther(offsets):
    weight, x = random(48, 70) + 0.2, random(300, 70) @ (torch.eye(70) + 0.2 * random(70, 70))
    made = [
        QuantisedMatrix(48, 70, bits=4, group=32, offsets=offsets, dtype=torch.float32)
        for _ in range(2)
    ]
    made[0].quantise_(weight)
    made[1].quantise_(weight, products=Products(x.T @ x))
    values = [float((each.weight - weight).square().mean()) for each in made]
    products = [float((x @ (each.weight - weight).T).square().mean()) for each in made]
    assert values[1] > values[0] and products[1] < 0.7 * products[0]
    assert not made[1].misfits(weight).any()
    made[1].scales[1, 1].view(-1)[5] = made[1].scales[1, 1].view(-1)[5] * 0.5
    assert made[1].misfits(weight).nonzero().tolist() == [[21, 1]]


@pytest.mark.parametrize(("rows", "offsets"), [(1, True), (40, False), (1090, True)])
def test_a_fitted_matrix_has_the_levels_of_the_rule_for_its_own_steps(rows, offsets):
    """Columns that fill no group, rows that fill no tile, and more tiles than one slice has."""
    weight, x = random(rows, 40) + 0.2, random(200, 40) @ (torch.eye(40) + 0.2 * random(40, 40))
    products = Products(x.T @ x)
    made = QuantisedMatrix(rows, 40, bits=4, group=32, offsets=offsets, dtype=torch.float32)
    made.quantise_(weight, products=products)
    scales, shifts = (
        None if each is None else each.flatten(0, 1)[:rows].repeat_interleave(32, 1)[:, :40]
        for each in made.steps()
    )
    assert scales is not None
    assert (shifts is not None) == offsets
    levels = compensated_levels(weight, scales, shifts, 4, products)
    assert torch.equal(made.weight, levels * scales + (0 if shifts is None else shifts))
    assert made.fitted
    assert not made.misfits(weight).any()
    other = weight.clone()
    other[rows - 1, 35] += 9 * float(scales[rows - 1, 35].abs()) * 2
    assert made.misfits(other).nonzero().tolist() == [[rows - 1, 1]]


def test_inputs_that_depend_on_one_another_are_no_obstacle():
    x = random(5, 40)  # fewer inputs than columns
    levels = compensated_levels(random(8, 40), torch.full((8, 40), 0.3), None, 4,
                                Products(x.T @ x))  # fmt: skip
    assert levels.isfinite().all()


def test_near_enough_sees_an_offset_and_a_far_value():
    weight, scales = random(4, 32), torch.full((4,), 0.3)
    value = to_levels(weight, scales, 4) * 0.3
    assert near_enough(weight, value, scales).all()
    value[1] += 0.5
    value[2, 7] += 3
    assert near_enough(weight, value, scales).tolist() == [True, False, False, True]


@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2"])
def test_blocks_are_fitted_one_after_the_other(kind):
    tokens = random_tokens(CONFIGS[kind], 4, 16)
    original = random_model(CONFIGS[kind], torch.float32)
    made = [random_model(CONFIGS[kind], torch.float32) for _ in range(2)]
    how = Format(bits=4, fitted=True)
    quantise(made[0], how)
    quantise_by_inputs(made[1], how, tokens)
    with torch.no_grad():
        wanted = original.hidden(tokens)
        off = [float((model.hidden(tokens) - wanted).square().mean()) for model in made]
    assert off[1] < 0.8 * off[0]
    for path, module in made[1].named_modules():
        if isinstance(module, QuantisedMatrix):
            assert module.fitted == path.startswith("layers.")
