"""Held-out loss computed by several ranks: the loss of one, in as many passes on each."""

from __future__ import annotations

import pytest
import torch
from tiny import LLAMA, random_model, random_tokens

from pellucid.train import evaluate
from pellucid.train.ranks import Ranks

WINDOWS = random_tokens(LLAMA, 11, 9)


class OneOfMany(Ranks):
    """One of several ranks without the others; it keeps what it would add to theirs."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Anything: the test adds the parts up."""
        self.part = values
        return torch.ones_like(values)


@pytest.mark.parametrize("windows", [1, 3, 8, 11])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_the_windows_and_make_equally_many_passes(windows, world):
    model, passes = random_model(LLAMA), []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    some = WINDOWS[:windows]
    wanted = evaluate(model, some)
    everyone = [OneOfMany(rank, world) for rank in range(world)]
    computed = []
    for rank in everyone:
        passes.clear()
        evaluate(model, some, rows=2, ranks=rank)
        computed.append(list(passes))
    assert computed == [computed[0]] * world  # rows of each pass
    assert sum(computed[0]) == -(-windows // world)
    total, count = torch.stack([rank.part for rank in everyone]).sum(0).tolist()
    assert count == windows * 8
    assert total / count == pytest.approx(wanted, rel=1e-12)
