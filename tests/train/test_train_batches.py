"""From a token stream to batches: each window once in an epoch, and any step without history."""

from __future__ import annotations

import pytest
import torch

from pellucid.train import Batches, held_out_windows
from pellucid.train.batches import copy_passage


def test_targets_are_inputs_one_token_later():
    inputs, targets, _ = Batches(torch.arange(50), context=8, batch=3, seed=0).at(0)
    assert inputs.shape == targets.shape == (3, 8)
    assert torch.equal(targets, (inputs + 1) % 50)


def test_an_epoch_reads_every_window_once_and_the_next_in_another_order():
    stream = torch.arange(80)
    batches = Batches(stream, context=8, batch=2, seed=3)
    epochs = [torch.cat([batches.at(epoch * 5 + step)[0] for step in range(5)]) for epoch in (0, 1)]
    for rows in epochs:
        assert rows.flatten().sort().values.equal(stream)
    assert not torch.equal(*epochs)


def test_a_batch_depends_on_its_step_and_the_seed_alone():
    def batches(seed: int) -> Batches:
        return Batches(torch.arange(100), context=7, batch=4, seed=seed)

    forwards, backwards = batches(1), batches(1)
    there = [forwards.at(step)[0] for step in range(9)]
    back = [backwards.at(step)[0] for step in reversed(range(9))]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    assert not torch.equal(there[0], batches(2).at(0)[0])


def test_a_copied_passage_stands_twice_and_the_rest_is_as_it_was():
    generator = torch.Generator().manual_seed(0)
    lengths, firsts = set(), set()
    for _ in range(200):
        ids = torch.arange(65)
        copy_passage(ids, generator)
        changed = (ids != torch.arange(65)).nonzero().flatten()
        second, length = int(changed[0]), len(changed)
        first = int(ids[second])
        assert changed.tolist() == list(range(second, second + length))
        assert ids[second : second + length].tolist() == list(range(first, first + length))
        assert first + length <= second
        assert 16 <= length <= 32
        lengths.add(length)
        firsts.add(first)
    assert lengths == set(range(16, 33))
    assert len(firsts) > 20


def test_copies_are_put_into_their_share_of_rows_and_leave_the_stream_alone():
    stream = torch.arange(6500)
    plain = Batches(stream, context=64, batch=50, seed=0)
    copied = Batches(stream, context=64, batch=50, seed=0, copies=0.3)
    again = Batches(stream, context=64, batch=50, seed=0, copies=0.3)
    differ = 0
    for step in range(4):
        inputs, targets, _ = copied.at(step)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(inputs, again.at(step)[0])
        differ += int((inputs != plain.at(step)[0]).any(dim=1).sum())
    assert 40 <= differ <= 80  # 60 of 200 expected, standard deviation 6.5
    assert torch.equal(stream, torch.arange(6500))
    with pytest.raises(ValueError, match="expected a share"):
        Batches(stream, context=64, batch=1, seed=0, copies=1.5)


def test_text_shorter_than_the_context_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"5 tokens long: a context of 8 needs at least 9"):
        Batches(torch.arange(5), context=8, batch=1, seed=0)


def test_held_out_windows_lie_side_by_side():
    windows = held_out_windows(torch.arange(21), context=5)
    assert windows[:, 0].tolist() == [0, 5, 10, 15]
    assert windows[:, -1].tolist() == [5, 10, 15, 20]
    assert held_out_windows(torch.arange(21), 5, limit=2)[:, 0].tolist() == [0, 15]
    assert held_out_windows(torch.arange(3), context=5).tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="1 tokens long"):
        held_out_windows(torch.arange(1), context=5)
