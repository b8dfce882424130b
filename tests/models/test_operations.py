"""How many operations a pass takes: what a timing on a shared machine cannot show.

The limits are what the two models of the version before the one decoder took (commit a847fd2), one
class a family, at these shapes; the operations themselves are the same kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pellucid.models import Cache, Config, build
from tests.tiny import GPT, LLAMA


class Count(TorchDispatchMode):
    """How many operations PyTorch dispatches while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "forward", "step", "training"),
    [
        (replace(GPT, n_layers=3), 148, 191, 487),
        (replace(LLAMA, n_layers=3), 270, 313, 735),
    ],
    ids=["gpt2", "llama"],
)
def test_a_pass_takes_no_more_operations_than_a_model_of_one_family_did(
    config: Config, forward: int, step: int, training: int
):
    torch.manual_seed(0)
    model, tokens = build(config), torch.arange(8)[None]
    cache = Cache(config.n_layers)
    with torch.no_grad():
        with Count() as whole:
            model(tokens)
        model(tokens, cache=cache)
        with Count() as one:
            model(tokens[:, :1], cache=cache)
    with Count() as both_ways:
        model.train()(tokens).sum().backward()
    assert whole.seen <= forward
    assert one.seen <= step
    assert both_ways.seen <= training
