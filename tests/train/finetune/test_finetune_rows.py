"""Examples in rows: what is learnt, what is cut, and that a row's neighbours do not matter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, LLAMA, random_model, random_tokens

from pellucid.train import IGNORED, next_token_objective
from pellucid.train.finetune.rows import Example, ExampleRows, filled, fitted, mean_loss


def example(length: int, answer: int, seed: int = 0) -> Example:
    """`length` random tokens, the last `answer` of them wanted."""
    return Example(random_tokens(LLAMA, length, seed=seed), torch.arange(length) >= length - answer)


EXAMPLES = [example(5 + 3 * n, 1 + n, seed=n) for n in range(5)]


def test_a_row_apart():
    ids, wanted = torch.tensor([7, 8, 9, 10]), torch.tensor([False, False, True, True])
    other = Example(torch.tensor([3, 4]), torch.tensor([False, True]))
    rows = ExampleRows([Example(ids, wanted), other], context=8, batch=2, seed=0, packed=False)
    (batch,) = rows.in_order(2)
    assert batch.inputs[:, 0].tolist() == [7, 3]
    assert batch.inputs[0].tolist() == [7, 8, 9]
    assert batch.targets.tolist() == [[IGNORED, 9, 10], [4, IGNORED, IGNORED]]
    assert batch.documents is None


def test_a_packed_row():
    first = Example(torch.tensor([1, 2, 3]), torch.tensor([False, True, True]))
    second = Example(torch.tensor([4, 5, 6]), torch.tensor([False, False, True]))
    long = Example(torch.arange(6), torch.ones(6, dtype=torch.bool))
    rows = ExampleRows([first, second, long], context=5, batch=1, seed=0)
    whole, both = rows.in_order(1)
    assert whole.inputs.tolist() == [[0, 1, 2, 3, 4]]
    assert both.inputs.tolist() == [[1, 2, 4, 5, 0]]
    assert both.targets.tolist() == [[2, 3, IGNORED, 6, IGNORED]]
    assert both.documents is not None
    assert both.documents.tolist() == [[0, 0, 2, 2, 4]]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_loss_is_that_of_each_example_alone(config, packed):
    """Packed or padded: only the answers count, and nothing else in the row is seen."""
    model = random_model(config)
    total, number = 0.0, 0
    for ids, wanted in EXAMPLES:
        losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        total += losses[wanted[1:]].sum().item()
        number += int(wanted.sum())
    rows = ExampleRows(EXAMPLES, context=30, batch=2, seed=0, packed=packed)
    assert (len(rows) < len(EXAMPLES)) == packed
    found = mean_loss(model, rows.in_order(2), next_token_objective)
    assert found == pytest.approx(total / number, abs=1e-12)


def test_every_epoch_has_every_row_once_in_another_order():
    rows = ExampleRows(EXAMPLES, context=30, batch=5, seed=3, packed=False)
    epochs = [[int((row != IGNORED).sum()) for row in rows.at(step).targets] for step in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [[1, 2, 3, 4, 5]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = ExampleRows(EXAMPLES, context=30, batch=5, seed=3, packed=False)
    assert torch.equal(again.at(2).inputs, rows.at(2).inputs)  # no history


def test_long_examples_are_cut_and_counted():
    kept, cut = fitted([example(5, 2), example(12, 9), example(12, 2), example(3, 0)], 8)
    assert (cut.kept, cut.truncated, cut.refused) == (2, 1, 2)
    assert [len(ids) for ids, _ in kept] == [5, 9]
    assert str(cut) == (
        "2 examples, 1 of them cut to the context, 2 left out: no answer within the context"
    )


def test_without_examples():
    with pytest.raises(ValueError, match="no examples to train on"):
        ExampleRows([], context=8, batch=1, seed=0)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_bins(sizes):
    bins = filled(sizes, 20)
    assert sorted(place for inside in bins for place in inside) == list(range(len(sizes)))
    loads = [sum(sizes[place] for place in inside) for inside in bins]
    assert max(loads) <= 20
    # no two bins would fit into one: at most twice the number there must be
    assert len(loads) < 2 or sum(sorted(loads)[:2]) > 20


def test_few_examples_make_as_many_rows_as_a_batch_asks_for():
    """Twelve that would fit into one row of 64 stand in four, and each once in a batch of four."""
    examples = [
        Example(torch.full((6,), number + 1), torch.ones(6, dtype=torch.bool))
        for number in range(12)
    ]
    rows = ExampleRows(examples, context=64, batch=4, seed=0)
    assert len(rows) == 4
    batch = rows.at(0)
    assert batch.inputs.shape == (4, 15)
    assert sorted(set(batch.inputs.flatten().tolist())) == list(range(1, 13))
