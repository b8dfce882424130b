"""Activation checkpointing: the same gradients, nothing but inputs kept, and no tracing with it."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, random_model, random_tokens

from pellucid.trace import trace
from pellucid.train.data.batches import Batch
from pellucid.train.objective import next_token_objective
from pellucid.train.parallel import ranks_launched
from pellucid.train.parallel.layout import RankGrid
from pellucid.train.parallel.parallelize import check
from pellucid.train.parallel.recompute import recompute_blocks
from pellucid.train.parallel.run import layout
from pellucid.train.precision import training_precision
from pellucid.train.settings import resolve


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_gradients_are_the_same_to_the_bit(kind, bfloat16):
    config = CONFIGS[kind]
    plain, again = random_model(config, torch.float32), random_model(config, torch.float32)
    recompute_blocks(again)
    assert [name for name, _ in again.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    tokens = random_tokens(config, 2, 9)
    for model in (plain, again):
        with training_precision(model, bfloat16):
            loss, _ = next_token_objective(model, Batch(tokens, tokens))
        loss.backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_a_trace_with_gradients_is_refused_and_one_without_is_not():
    config = CONFIGS["llama-gqa"]
    model, plain = random_model(config), random_model(config)
    recompute_blocks(model)
    tokens = random_tokens(config, 1, 5)
    refused = pytest.raises(ValueError, match="activation checkpointing.*switch one of the two off")
    with refused, trace(model, gradients=True):
        model(tokens)
    with trace(model) as seen:
        model(tokens)
    with trace(plain) as wanted:
        plain(tokens)
    assert list(seen) == list(wanted)
    assert torch.equal(seen["logits"], wanted["logits"])


def settings(**given):
    return resolve({"stdlib": True, "batch": 8, **given})


def test_settings_make_a_layout():
    assert layout(settings(), 4) == RankGrid(data=4)
    assert layout(settings(parallel="fsdp"), 2) == RankGrid(data=2, sharded=True)
    assert layout(settings(parallel="tp"), 4) == RankGrid(tensor=4)
    wide = RankGrid(data=2, tensor=2, sharded=True)
    assert layout(settings(parallel="fsdp", tensor=2), 4) == wide


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({"parallel": "fsdp", "tensor": 3}, 4, "--tensor 3: expected a divisor of 4"),
        ({"tensor": 2}, 4, "DDP does not take split matrices"),
        ({"order": "dataloader"}, 2, "others on each of several data ranks"),
        ({"rank_timeout": 0.0}, 2, "--rank-timeout 0: expected more than 0 seconds"),
        ({}, 3, "a batch of 8 rows does not divide among 3 ranks: choose a multiple of 3"),
    ],
)
def test_settings_that_do_not_divide(given, ranks, message):
    with pytest.raises(ValueError, match=message):
        layout(settings(**given), ranks)


def test_cut_matrices_are_not_compiled():
    with pytest.raises(ValueError, match="train tensor-parallel without compile"):
        check(CONFIGS["llama-gqa"], RankGrid(tensor=2), compile=True)
    with pytest.raises(ValueError, match="key/value heads 2 do not divide among 4"):
        check(CONFIGS["llama-gqa"], RankGrid(tensor=4), compile=False)
    check(CONFIGS["llama-gqa"], RankGrid(data=4, sharded=True), compile=True)


def test_without_torchrun_there_are_no_ranks():
    assert ranks_launched({}) == 0
    assert ranks_launched({"WORLD_SIZE": "4"}) == 0  # some schedulers set that alone
    assert ranks_launched({"WORLD_SIZE": "4", "RANK": "2"}) == 4
