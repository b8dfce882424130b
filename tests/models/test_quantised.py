"""Weights in 8, 6 and 4 bits: levels, scales, their order in memory, and models made of them."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, random_model, random_tokens

from pellucid.models.quantised import (
    TILE,
    Format,
    FullWeights,
    QuantisedMatrix,
    packed,
    quantise,
    quantised_empty,
    unpacked,
)
from pellucid.trace import trace


def filled(weight: torch.Tensor, bits: int, group: int = 32) -> QuantisedMatrix:
    matrix = QuantisedMatrix(*weight.shape, bits=bits, group=group, dtype=torch.float32)
    matrix.quantise_(weight)
    return matrix


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_bytes_lie_as_the_drawing_says(bits):
    group, low = 16, -(2 ** (bits - 1))
    levels = torch.randint(
        low, -low, (2, TILE, 3, group), generator=torch.Generator().manual_seed(1)
    )
    stored = packed(levels.float(), bits)
    assert torch.equal(unpacked(stored, bits), levels.float())
    tile, row, place, column = 1, 5, 2, 13
    value = int(levels[tile, row, place, column]) - low
    if bits == 8:
        assert stored[tile, place, column // 4, row, column % 4] == value
    else:  # column 13 is in the second half of its group: the high bits of column 5's byte
        assert int(stored[tile, place, 5 // 4, row, 5 % 4]) >> 4 == value % 16
    if bits == 6:  # and in the last quarter: the highest bits of the one byte that is left
        assert int(stored[tile, place, 2, row, 13 % 4]) >> 6 == value // 16


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_each_level_is_found_where_the_table_says(bits):
    """The layouts of the module's docstring, worked out byte by byte."""
    group = 32
    levels = torch.randint(
        -(2 ** (bits - 1)), 2 ** (bits - 1), (2, TILE, 3, group),
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    stored = packed(levels.float(), bits).int()
    assert stored.shape == (2, 3, group * bits // 32, TILE, 4)
    flat = stored.permute(0, 3, 1, 2, 4).flatten(3)  # (tiles, 16, groups, bytes in reading order)
    for column in range(group):
        if bits == 8:
            value = flat[..., column]
        else:
            half, place = divmod(column, group // 2)
            value = flat[..., place] // 16**half % 16
        if bits == 6:
            quarter, place = divmod(column, group // 4)
            value = value + 16 * (flat[..., group // 2 + place] // 4**quarter % 4)
        assert torch.equal(value - 2 ** (bits - 1), levels[..., column])


@pytest.mark.parametrize("shape", [(16, 64), (17, 50), (1, 8), (40, 200)])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_every_weight_is_near(bits, shape):
    weight = random_weight(*shape)
    matrix = filled(weight, bits)
    assert matrix.weight.shape == weight.shape
    largest = torch.stack([part.abs().amax(1) for part in weight.split(32, dim=1)], dim=1)
    step = largest / {8: 127, 6: 32, 4: 7.4}[bits]  # the widest scale that is tried
    off = (matrix.weight - weight).abs()
    # Half a step. With 6 bits there is no level 32, only -32; with 4 bits large weights may be cut
    # off, to 7 / 8.6 of the largest.
    allowed = step.repeat_interleave(32, dim=1)[:, : shape[1]] * {8: 0.51, 6: 1.1, 4: 1.4}[bits]
    assert (off <= allowed).all()
    assert not matrix.misfits(weight).any()


def test_more_bits_are_finer_and_smaller_groups_than_larger():
    weight = random_weight(64, 256)
    error = {
        (bits, group): float((filled(weight, bits, group).weight - weight).square().mean())
        for bits in (8, 6, 4)
        for group in (32, 64, 128)
    }
    for bits in (8, 6, 4):
        assert error[bits, 32] < error[bits, 64] < error[bits, 128]
    assert error[8, 128] < error[6, 32] / 5 < error[4, 32] / 50


def test_the_chosen_scale_beats_the_plain_one():
    weight = random_weight(64, 256)
    groups = weight.view(64, 8, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    plain = (groups / (largest / -8)).round().clamp(-8, 7) * (largest / -8)
    chosen = filled(weight, 4).weight.view_as(groups)
    assert (chosen - groups).square().mean() < 0.97 * (plain - groups).square().mean()


def test_zeros_stay_zeros():
    weight = random_weight(20, 64)
    weight[3], weight[:, 32:] = 0, 0
    for bits in (8, 6, 4):
        assert (filled(weight, bits).weight[weight == 0] == 0).all()


def test_rows_of_an_embedding_are_rows_of_the_table():
    matrix = filled(random_weight(50, 40), 8)
    places = torch.tensor([[0, 49], [17, 17]])
    assert torch.equal(matrix.rows_at(places), matrix.weight[places])


def test_a_damaged_level_or_scale_does_not_fit():
    weight = random_weight(40, 96)
    for bits in (8, 6, 4):
        matrix = filled(weight, bits)
        matrix.packed[1, 2, 0, 5, 0] ^= 1
        wrong = matrix.misfits(weight)
        assert wrong.sum() == 1 and wrong[TILE + 5, 2]
        matrix.packed[1, 2, 0, 5, 0] ^= 1
        matrix.scales[0, 1, 7] *= 1.5
        wrong = matrix.misfits(weight)
        assert wrong.sum() == 1 and wrong[7, 1]


def test_with_offsets_values_are_what_the_codes_say():
    weight = random_weight(20, 100) + 0.4
    matrix = QuantisedMatrix(20, 100, bits=4, group=32, offsets=True, dtype=torch.float32)
    matrix.quantise_(weight)
    row, column = 17, 70
    codes, worth = matrix.scales[1, 2, :, 1].float(), matrix.row_scales[1, :, 1].float()
    level = unpacked(matrix.packed, 4)[1, 1, 2, column - 64]
    value = level * (codes[0] * worth[0]) + (codes[1] - 128) * worth[1]
    assert value == matrix.weight[row, column]
    assert torch.equal(matrix.rows_at(torch.tensor([row])), matrix.weight[[row]])
    plain = QuantisedMatrix(20, 100, bits=4, group=32, dtype=torch.float32)
    plain.quantise_(weight)
    errors = [(each.weight - weight).square().mean() for each in (matrix, plain)]
    assert errors[0] < 0.75 * errors[1]


def test_equal_weights_need_an_offset_and_no_levels():
    weight = random_weight(16, 96)
    weight[3, 32:64], weight[5, :32] = 0.25, 0
    matrix = QuantisedMatrix(16, 96, bits=4, group=32, offsets=True, dtype=torch.float32)
    matrix.quantise_(weight)
    assert matrix.scales[0, 1, :, 3].tolist()[0] == 0
    assert matrix.scales[0, 0, :, 5].tolist() == [0, 128]
    assert matrix.weight[3, 32:64].unique().numel() == 1
    assert (matrix.weight[5, :32] == 0).all()


def test_an_offset_whose_step_is_hardly_a_number_keeps_its_sign():
    """The least bfloat16 above 0 is 2^-133: 178 of them in 127 steps would need 1.4 for a step."""
    weight = torch.full((16, 32), 178 * 2.0**-133)
    weight[1::2] *= -1
    matrix = QuantisedMatrix(16, 32, bits=4, group=32, offsets=True, dtype=torch.float32)
    matrix.quantise_(weight)
    assert torch.equal(matrix.weight[0], torch.full((32,), 127 * 2.0**-133))
    assert torch.equal(matrix.weight[1], torch.full((32,), -128 * 2.0**-133))


def test_embedding_and_head_have_bits_of_their_own():
    model = quantise(random_model(CONFIGS["llama-gqa"], torch.float32), Format(bits=4, head_bits=8))
    kinds = {
        path: (module.bits, module.group, module.offsets)
        for path, module in model.named_modules()
        if isinstance(module, QuantisedMatrix)
    }
    assert set(kinds) >= {"embed", "layers.0.attn.q_proj", "layers.1.mlp.down_proj"}
    for path, kind in kinds.items():
        assert kind == ((4, 32, True) if path.startswith("layers.") else (8, 32, False))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantised_model_computes_with_what_its_levels_stand_for(kind):
    original = random_model(CONFIGS[kind], torch.float32)
    expected = random_model(CONFIGS[kind], torch.float32)
    quantised = quantise(original, Format(bits=4))
    weights = FullWeights(quantised)
    assert sorted(weights) == sorted(expected.state_dict())
    assert len(weights) == len(expected.state_dict())
    expected.load_state_dict(dict(weights))
    tokens = random_tokens(expected.config, 2, 7)
    with torch.no_grad():
        assert torch.equal(quantised(tokens), expected(tokens))
    with trace(quantised) as seen:
        quantised(tokens)
    assert "layers.1.attn.pattern" in seen
    norms = [name for name in weights if "norm" in name]
    assert norms and all(weights.quantised(name) is None for name in norms)


def test_the_skeleton_takes_the_state():
    quantised = quantise(random_model(CONFIGS["gpt2"], torch.float32), Format(bits=8))
    empty = quantised_empty(quantised.config, Format(bits=8))
    empty.load_state_dict(quantised.state_dict(), assign=True)
    tokens = random_tokens(quantised.config, 1, 5)
    with torch.no_grad():
        assert torch.equal(empty.eval()(tokens), quantised(tokens))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "int8 in groups of 64"),
        ({"bits": 6, "group": 128}, "int6 in groups of 128, head int8"),
        ({"bits": 4}, "int4 in groups of 32 with offsets, head int6"),
        ({"bits": 4, "group": 64}, "int4 in groups of 64, head int6"),
        ({"bits": 4, "head_bits": 4, "offsets": False}, "int4 in groups of 64"),
        ({"bits": 8, "group": 32, "head_bits": 6}, "int8 in groups of 32, head int6"),
    ],
)
def test_a_format_says_what_it_is(given, said):
    assert str(Format(**given)) == said


def test_a_matrix_says_what_it_is():
    plain = QuantisedMatrix(17, 100, bits=6, dtype=torch.float32)
    assert plain.extra_repr() == "17, 100, bits=6, group=64"
    assert (plain.packed.shape, plain.scales.shape) == ((2, 2, 12, 16, 4), (2, 2, 16))
    assert not plain.fitted
    with_offsets = QuantisedMatrix(16, 32, bits=4, group=16, offsets=True, dtype=torch.float32)
    assert with_offsets.extra_repr() == "16, 32, bits=4, group=16, offsets=True"
    assert QuantisedMatrix(1, 1, bits=8, group=256, dtype=torch.float32).scales.shape == (1, 1, 16)
    for group in (0, 8, 17, 24, 257, 272):
        with pytest.raises(ValueError, match=f"groups of {group} weights: expected a multiple"):
            QuantisedMatrix(1, 1, bits=8, group=group, dtype=torch.float32)
    with pytest.raises(ValueError, match="weights of 5 bits"):
        QuantisedMatrix(1, 1, bits=5, dtype=torch.float32)


def test_wrong_formats_are_refused():
    with pytest.raises(ValueError, match="3 bits: expected 8, 6 or 4"):
        Format(bits=3)
    with pytest.raises(ValueError, match="groups of 48 weights: expected 32, 64 or 128"):
        Format(group=48)
    with pytest.raises(ValueError, match="groups of 129 weights: expected 32, 64 or 128"):
        Format(group=129)
    with pytest.raises(ValueError, match="offsets so with 4 bits"):
        Format(bits=4, offsets="so")
    with pytest.raises(ValueError, match="offsets True with 8 bits"):
        Format(offsets=True)
    quantised = quantise(random_model(CONFIGS["gpt2"], torch.float32), Format())
    with pytest.raises(ValueError, match="quantised already"):
        quantise(quantised, Format())
