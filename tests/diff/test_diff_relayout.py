"""Weights that differ: every known way is named from the two tensors alone."""

from __future__ import annotations

import pytest
import torch
from tiny import LLAMA, random_model

from pellucid.diff.relayout import explain

Q = "layers.0.attn.q_proj.weight"
O = "layers.0.attn.o_proj.weight"
DOWN = "layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def weights():
    return dict(random_model(LLAMA, torch.float32).state_dict())


def _explained(weights, name, changed):
    return explain(name, weights, {**weights, name: changed}, LLAMA)


def test_rows_of_q_in_the_interleaved_order(weights):
    x = weights[Q]
    pairs = x.reshape(4, 2, 5, 36).transpose(1, 2).reshape(x.shape)
    assert _explained(weights, Q, pairs)[0] == "q/k not permuted"


def test_rows_of_k_permuted_with_another_head_count(weights):
    name = "layers.0.attn.k_proj.weight"
    x = weights[name]  # (2 heads · 10, 36)
    stored = x.unflatten(0, (2, 2, 5)).transpose(1, 2).reshape(x.shape)
    changed = stored.unflatten(0, (1, -1, 2)).transpose(1, 2).reshape(x.shape)
    cause, finding, kind = _explained(weights, name, changed)
    assert cause == "q/k permuted with the wrong head count" and "as 1 heads" in finding
    assert kind == "fault"


def test_rows_of_a_joined_matrix_taken_apart_wrongly(weights):
    parts = [weights[f"layers.0.attn.{letter}_proj.weight"] for letter in "qkv"]
    every = torch.cat(parts)[::2]  # (80 / 2, 36): as many rows as q has
    cause, finding, _ = _explained(weights, Q, every)
    assert cause == "fused qkv split wrongly" and "20 of q, 10 of k, 10 of v" in finding
    gate, up = (weights[f"layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    between = torch.stack((gate, up), 1).flatten(0, 1)[: len(gate)]
    cause, finding, _ = _explained(weights, "layers.1.mlp.gate_proj.weight", between)
    assert cause == "gate and up split wrongly" and "28 of gate, 28 of up" in finding


def test_heads_that_changed_places(weights):
    heads = weights[Q].reshape(4, 10, 36)
    cause, finding, _ = _explained(weights, Q, heads[[0, 2, 1, 3]].reshape(40, 36))
    assert cause == "heads reordered" and "1 and 2" in finding


def test_a_transposed_matrix(weights):
    square = {O: torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
    assert explain(O, square, {O: square[O].T})[0] == "transposed weight"
    assert explain(O, weights, {O: weights[O].T.contiguous()})[0] == "transposed weight"


def test_shards_joined_on_the_wrong_dimension_and_in_the_wrong_order(weights):
    x = weights[O]
    wrong = torch.cat(x.chunk(2, 1)).reshape(x.shape)
    assert _explained(weights, O, wrong)[0] == "shards joined wrongly"
    cause, finding, _ = _explained(weights, O, torch.cat(x.chunk(4)[::-1]))
    assert cause == "shards joined wrongly" and "reverse" in finding


def test_the_tensor_of_another_layer_by_name(weights):
    cause, finding, _ = _explained(weights, DOWN, weights["layers.0.mlp.down_proj.weight"])
    assert cause == "tensor of another layer" and "layers.0.mlp.down_proj" in finding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bit", [0, 6, 9, -2, -1])
def test_a_flipped_bit_by_its_place_and_number(weights, dtype, bit):
    x = weights[Q].to(dtype)
    integers, width = (torch.int32, 32) if dtype == torch.float32 else (torch.int16, 16)
    y = x.clone()
    bit %= width
    flat = y.view(integers)
    mask = 1 << bit if bit < width - 1 else -(1 << (width - 1))
    flat[3, 5] ^= mask
    cause, finding, kind = explain(Q, {Q: x}, {Q: y})
    if not y.isfinite().all():
        assert cause == "not finite" and kind == "fault"
        return
    assert (cause, kind) == ("one bit flipped", "fault")
    assert "[3,5]" in finding and f"(bit {bit})" in finding


def test_values_rounded_or_stored_in_another_dtype_are_explained(weights):
    x = weights[Q]
    assert _explained(weights, Q, x.bfloat16())[::2] == ("other dtype", "explained")
    assert _explained(weights, Q, x.bfloat16().float())[::2] == ("rounded weights", "explained")


def _through(x, bits, group):
    groups = x.unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).flatten(1), step.flatten(1)


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (4, 64)])
def test_quantised_weights_are_explained(bits, group):
    x = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    cause, _, kind = explain(O, {O: x}, {O: _through(x, bits, group)[0]})
    assert (cause, kind) == ("quantised weights", "explained")


@pytest.mark.parametrize("levels", [1, -1, 8])
@pytest.mark.parametrize("from_int4", [True, False])
def test_one_group_with_a_wrong_zero_point_is_a_fault(levels, from_int4):
    x = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    quantised, step = _through(x, 4, 32)
    wrong = quantised.clone()
    wrong[7, 32:64] += levels * step[7, 1]
    cause, finding, kind = explain(O, {O: quantised if from_int4 else x}, {O: wrong})
    assert (cause, kind) == ("quantised group with a wrong zero point", "fault")
    assert "[7, 32:64]" in finding


def test_weights_that_have_nothing_to_do_with_each_other(weights):
    drawn = torch.randn(weights[Q].shape, generator=torch.Generator().manual_seed(9))
    assert _explained(weights, Q, drawn)[0] == "unrelated weights"


def test_weights_that_were_trained_further_are_other_weights(weights):
    near = weights[Q] + torch.randn(weights[Q].shape, generator=torch.Generator()) / 8
    assert _explained(weights, Q, near)[0] == "other weights"


def test_infinities_where_float16_ends(weights):
    x = weights[Q].clone()
    x[0, 0] = 1e6
    cause, finding, _ = explain(Q, {Q: x}, {Q: x.half().float()})
    assert cause == "float16 overflow" and "1e+06" in finding
