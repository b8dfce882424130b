"""From a token stream to batches: each window once in an epoch, and any step without history."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import GPT, LLAMA, random_model

from pellucid.models import Config
from pellucid.train import (
    Batches,
    TokenTensor,
    held_out_windows,
    next_token_objective,
    tokenise,
)
from pellucid.train.data.batches import copy_passage


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


def test_windows_lie_side_by_side_from_a_shift_below_the_context_on():
    # 83 = 10 windows of 8 and 3 tokens that an epoch leaves out: those before the first window.
    batches = Batches(torch.arange(83), context=8, batch=10, seed=4)
    shifts = set()
    for epoch in range(6):
        starts = batches.at(epoch)[0][:, 0].sort().values
        shifts.add(int(starts[0]))
        assert starts.tolist() == [int(starts[0]) + 8 * place for place in range(10)]
    assert len(shifts) > 1
    assert max(shifts) < 8


def test_a_batch_depends_on_its_step_and_the_seed_alone():
    def batches(seed: int) -> Batches:
        return Batches(torch.arange(100), context=7, batch=4, seed=seed)

    forwards, backwards = batches(1), batches(1)
    there = [forwards.at(step)[0] for step in range(9)]
    back = [backwards.at(step)[0] for step in reversed(range(9))]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    assert not torch.equal(there[0], batches(2).at(0)[0])


def test_ranks_read_their_rows_of_the_same_batch():
    stream = torch.arange(1000)
    for copies in (0.0, 0.5):
        batches = Batches(stream, context=20, batch=6, seed=1, copies=copies)
        for step in (0, 7, 8, 9, 30):  # an epoch is 8.3 steps
            whole = batches.at(step)
            parts = [batches.at(step, slice(rank * 2, rank * 2 + 2)) for rank in range(3)]
            assert torch.cat([part.inputs for part in parts]).equal(whole.inputs)
            assert torch.cat([part.targets for part in parts]).equal(whole.targets)
            strided = batches.at(step, slice(1, None, 3))
            assert strided.inputs.equal(whole.inputs[1::3])
            alone = [batches.at(step, slice(row, row + 1)).inputs for row in range(6)]
            assert torch.cat(alone).equal(whole.inputs)


def test_documents_name_the_place_in_the_row_where_each_begins():
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(1, 9, (400,), generator=generator)
    stream[0] = 0
    stream[torch.randint(0, 400, (40,), generator=generator)] = 0
    batches = Batches(TokenTensor(stream, 0), context=16, batch=5, seed=2, documents=True)
    wraps = 0
    for step in range(20):
        inputs, _, documents = batches.at(step)
        assert documents is not None
        for row, found in zip(inputs.tolist(), documents.tolist(), strict=True):
            begin, expected = 0, []
            for place, token in enumerate(row):
                begin = place if token == 0 else begin
                expected.append(begin)
            assert found == expected
        wraps += int((inputs == 0).sum())
    assert wraps > 50
    part = batches.at(3, slice(2, 4)).documents
    assert part is not None
    assert part.equal(batches.at(3).documents[2:4])
    plain = Batches(TokenTensor(stream, 0), context=16, batch=5, seed=2)
    assert plain.at(3).documents is None
    assert plain.at(3).inputs.equal(batches.at(3).inputs)
    with pytest.raises(ValueError, match="give copies or documents"):
        Batches(stream, context=16, batch=5, seed=2, documents=True, copies=0.1)


def test_the_ring_is_cut_between_documents():
    """A row that runs on from the end of the stream to its beginning begins a document there."""
    batches = Batches(torch.arange(17), context=16, batch=1, seed=0, documents=True)
    for step in range(30):
        inputs, targets, documents = batches.at(step)
        assert documents is not None
        [first] = (inputs[0] == 0).nonzero().flatten().tolist() or [16]
        assert documents[0].tolist() == [0] * first + [first] * (16 - first)
        assert targets.equal((inputs + 1) % 17)


class Letters:
    """A letter is a token."""

    vocab_size, specials = 128, {}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 128 for letter in text]

    def token_string(self, id: int) -> str:
        return chr(id)


def test_files_give_the_batches_of_the_same_tokens_in_memory(tmp_path: Path):
    for number in range(30):
        text = "".join(chr(97 + (place * number) % 26) for place in range(100 + number))
        (tmp_path / f"{number}.txt").write_text(text)
    corpus = tokenise([tmp_path], Letters(), tmp_path / "t", begin=0, workers=1, shard_bytes=500)
    tokens = corpus.training.read(0, len(corpus.training))
    options = {"context": 64, "batch": 4, "seed": 5, "documents": True}
    mapped, memory = Batches(corpus.training, **options), Batches(TokenTensor(tokens, 0), **options)
    for step in (0, 1, 10, 11, 12, 1000):
        for a, b in zip(mapped.at(step), memory.at(step), strict=True):
            assert a.equal(b)
    held_out = corpus.held_out.read(0, len(corpus.held_out))
    windows = held_out_windows(corpus.held_out, 16)
    assert windows.equal(held_out_windows(held_out, 16))
    assert held_out_windows(corpus.held_out, 16, 3).equal(held_out_windows(held_out, 16, 3))


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
    with pytest.raises(ValueError, match=r"8 tokens long: a context of 8 needs at least 9"):
        Batches(torch.arange(8), context=8, batch=1, seed=0)
    assert Batches(torch.arange(9), context=8, batch=1, seed=0).windows == 1


def test_held_out_windows_lie_side_by_side():
    windows = held_out_windows(torch.arange(21), context=5)
    assert windows[:, 0].tolist() == [0, 5, 10, 15]
    assert windows[:, -1].tolist() == [5, 10, 15, 20]
    assert held_out_windows(torch.arange(21), 5, limit=2)[:, 0].tolist() == [0, 15]
    assert held_out_windows(torch.arange(3), context=5).tolist() == [[0, 1, 2]]
    assert held_out_windows(torch.arange(2), context=5).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="1 tokens long"):
        held_out_windows(torch.arange(1), context=5)


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_the_loss_of_masked_rows_is_that_of_each_document_alone(config: Config):
    model = random_model(config)
    stream = torch.randint(1, 97, (300,), generator=torch.Generator().manual_seed(1))
    stream[torch.arange(0, 300, 11)] = 0
    batches = Batches(TokenTensor(stream, 0), context=30, batch=3, seed=1, documents=True)
    batch = batches.at(2)
    total, count = next_token_objective(model, batch)
    assert batch.documents is not None
    expected = 0.0
    for inputs, targets, documents in zip(*batch, strict=True):
        for begin in documents.unique().tolist():
            own = documents == begin
            logits = model(inputs[own][None])[0]
            expected += F.cross_entropy(logits, targets[own], reduction="sum").item()
    assert count == 90
    assert total.item() == pytest.approx(expected, rel=1e-10)
    plain, _ = next_token_objective(model, batch._replace(documents=None))
    assert abs(plain.item() - expected) > 1
