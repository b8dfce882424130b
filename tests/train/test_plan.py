"""The plan against hand calculation: what each layout holds, and what it takes."""

from __future__ import annotations

import pytest
from tiny import GPT, LLAMA

from pellucid.families.shapes import SHAPES
from pellucid.models.census import census
from pellucid.train.objective import next_token_objective
from pellucid.train.parallel.layout import RankGrid, local_shapes
from pellucid.train.plan import Pace, Work, layouts, memory

LLAMA_8B = SHAPES["llama-3-8b"].config
WORK = Work(cards=4, rows=1, context=16, batch=4)


def test_one_card_holds_sixteen_bytes_per_parameter():
    one = Work(cards=1, rows=1, context=16, batch=1)
    found = memory(LLAMA, one, RankGrid(), next_token_objective, recompute=False)
    count = census(LLAMA).total
    assert found.parameters + found.gradients + found.optimizer == 16 * count
    assert found.gathered == 0
    assert found.total == 16 * count + found.activations + found.working


def test_8b_on_eight_cards():
    work = Work(cards=8, rows=1, context=64, batch=8)
    ddp, fsdp, tensor = (
        memory(LLAMA_8B, work, layout, next_token_objective, recompute=True)
        for layout in (RankGrid(data=8), RankGrid(data=8, sharded=True), RankGrid(tensor=8))
    )
    assert ddp.parameters == 4 * 8_030_261_248
    assert fsdp.parameters == 4 * 8_030_261_248 // 8  # every first axis divides by 8
    norms = 65 * 4096  # copies on each tensor-parallel rank
    assert tensor.parameters == 4 * ((8_030_261_248 - norms) // 8 + norms)
    block, head = 218_112_000, 525_336_576
    assert fsdp.gathered == (2 * block + 2 * head + 4096) * (2 + 4)
    assert fsdp.activations == 32 * 64 * 4096 * 2  # bfloat16 inputs of 32 blocks


def test_what_a_cut_leaves_on_the_first_rank():
    shapes = {"embed.weight": (97, 36), "layers.1.attn.o_proj.weight": (36, 40), "norm.bias": (36,)}
    assert local_shapes(shapes, RankGrid(tensor=2)) == {
        "embed.weight": (49, 36),
        "layers.1.attn.o_proj.weight": (36, 20),
        "norm.bias": (36,),
    }
    assert local_shapes(shapes, RankGrid(data=5, tensor=2, sharded=True)) == {
        "embed.weight": (10, 36),
        "layers.1.attn.o_proj.weight": (8, 20),
        "norm.bias": (8,),
    }


def test_layouts_by_name():
    assert layouts(LLAMA, 1) == {"one card": RankGrid()}
    assert list(layouts(GPT, 8)) == ["ddp", "fsdp", "fsdp 2 × tp 4"]
    assert list(layouts(LLAMA, 2)) == ["ddp", "fsdp", "tp 2"]
    assert list(layouts(LLAMA, 3)) == ["ddp", "fsdp"]
    with pytest.raises(ValueError, match="8 cards do not divide into groups of 3"):
        layouts(LLAMA, 8, 3)
    with pytest.raises(ValueError, match="key/value heads 2 do not divide among 4"):
        layouts(LLAMA, 8, 4)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="DDP does not take split matrices"):
        RankGrid(data=2, tensor=2)
    with pytest.raises(ValueError, match="0 × 1 ranks: expected 1 or more"):
        RankGrid(data=0)
    with pytest.raises(ValueError, match="context is 0: expected 1 or more"):
        Work(cards=1, rows=1, context=0, batch=1)
    with pytest.raises(ValueError, match="batch of 4 rows .* 3 data-parallel ranks: .* of 3"):
        memory(LLAMA, WORK, RankGrid(data=3), next_token_objective, recompute=False)
    with pytest.raises(ValueError, match="a utilisation of 40: expected a share"):
        Pace(flops_per_token=1, peak=1.0, mfu=40)


def test_the_pace():
    pace = Pace(flops_per_token=census(LLAMA_8B).flops(8192).training, peak=1e15, mfu=0.5)
    assert pace.flops_per_token == 6 * 7_504_658_432 + 12 * 32 * 4096 * 8192  # PaLM, appendix B
    assert pace.tokens_per_second(4) == pytest.approx(4 * 1e15 * 0.5 / 57_912_852_480)
    assert pace.seconds(10**9, 4) == pytest.approx(10**9 / pace.tokens_per_second(4))
