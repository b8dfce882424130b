"""What a pass holds, measured without memory, against passes that really run and allocate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, GPT, LLAMA, random_tokens
from torch.profiler import ProfilerActivity, profile

from pellucid.models import build
from pellucid.train.data.batches import Batch
from pellucid.train.footprint import Pass, footprint, peaks
from pellucid.train.objective import next_token_objective, plain_next_token_objective
from pellucid.train.parallel.layout import RankGrid

ROWS, CONTEXT = 3, 32


def work(**changes) -> Pass:
    plain = Pass(rows=ROWS, context=CONTEXT, objective=next_token_objective, layout=RankGrid())
    return replace(plain, **changes)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("bfloat16", "sharded"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("kind", "objective"),
    [("gpt2", next_token_objective), ("llama-gqa", plain_next_token_objective)],
)
def test_the_line_through_two_depths_is_what_a_deep_model_allocates(
    kind, objective, bfloat16, sharded, recompute
):
    layout = RankGrid(sharded=sharded)
    one = work(objective=objective, bfloat16=bfloat16, recompute=recompute, layout=layout)
    deep = replace(CONFIGS[kind], n_layers=5)
    assert footprint(deep, one).total(5) == max(peaks(deep, one, fake=False))


def saved_bytes(config, layers: int) -> int:
    """Bytes that autograd saves for backward, counted with its own hooks; no weights."""
    model = build(replace(config, n_layers=layers))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tokens = random_tokens(config, ROWS, CONTEXT)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(tokens)
    total = sum(size for place, size in kept.items() if place not in own)
    del hidden
    return total


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_block_keeps_is_what_autograd_saves(kind):
    config = CONFIGS[kind]
    saved = saved_bytes(config, 3) - saved_bytes(config, 2)
    assert footprint(config, work()).per_block == saved


def test_what_a_block_keeps_written_out():
    """Float32 numbers per token of a Llama block, from the formulas of its operations."""
    C, H, D, F = LLAMA.width, LLAMA.n_heads, LLAMA.head_dim, LLAMA.hidden_width
    Hkv = LLAMA.n_kv_heads
    norm = C + 1 + C + C  # x, the root, x / root twice: as it is multiplied, and after the weight
    attention = 2 * H * D + 2 * Hkv * D + H  # q and z, k and v, the sums of the softmax
    swiglu = 4 * F  # gate, act, up, hidden
    numbers = 2 * norm + attention + swiglu
    assert footprint(LLAMA, work()).per_block == 4 * ROWS * CONTEXT * numbers
    recomputed = footprint(LLAMA, work(recompute=True)).per_block
    assert recomputed == 4 * ROWS * CONTEXT * C  # the block's input, nothing else


@pytest.mark.parametrize("config", [LLAMA, GPT])
def test_the_allocator_agrees_within_a_tenth(config):
    """Kernels take a little more inside themselves than the tensors that they return."""
    wide = replace(config, vocab_size=997, context_length=256)
    model = build(wide)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = random_tokens(wide, 4, 256)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        next_token_objective(model, Batch(tokens, tokens))[0].backward()
    now = highest = 0
    events = watched.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    assert highest > 1_000_000
    measured = footprint(wide, work(rows=4, context=256)).total(wide.n_layers)
    assert measured == pytest.approx(highest, rel=0.1)
