"""From text to batches: nothing is read twice, nothing held out is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pellucid.train import (
    Batches,
    Document,
    held_out_windows,
    hold_out,
    read_documents,
    stdlib_documents,
    token_stream,
)
from pellucid.train.data import copy_passage


def test_a_folder_is_read_in_order_of_names_and_a_named_file_whatever_its_ending(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee", encoding="utf-8")
    (tmp_path / "sub" / "a.md").write_text("ä", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    other = tmp_path / "notes.xyz"
    other.write_text("notes", encoding="utf-8")
    texts = [document.text for document in read_documents([tmp_path, other])]
    assert texts == ["bee", "ä", "notes"]


def test_unreadable_text_says_which_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_documents([tmp_path / "nowhere"])
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        read_documents([tmp_path])


def test_the_standard_library_has_code_and_prose_and_no_tests():
    documents = stdlib_documents()
    names = [document.name for document in documents]
    assert {"argparse.py", "json/decoder.py", "topics/lambda"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "encodings", "__pycache__"}
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert len(names) == len(set(names))
    assert documents == stdlib_documents()


def test_whole_documents_are_held_out():
    documents = [Document(str(number), f"text {number}") for number in range(10)]
    training, held_out = hold_out(documents, every=4)
    assert [document.name for document in held_out] == ["3", "7"]
    assert sorted(training + held_out) == documents


def test_of_few_documents_the_end_of_each_is_held_out():
    training, held_out = hold_out([Document("a", "0123456789"), Document("b", "x" * 30)], every=3)
    assert [document.text for document in training] == ["012345678", "x" * 27]
    assert [document.text for document in held_out] == ["9", "xxx"]
    with pytest.raises(ValueError, match="expected 2 or more"):
        hold_out([], every=1)


def test_the_stream_puts_the_end_token_before_each_document():
    documents = [Document("a", "ab"), Document("b", "c")]
    stream = token_stream(documents, lambda text: [ord(letter) for letter in text], 0)
    assert stream.tolist() == [0, 97, 98, 0, 99]


def test_targets_are_inputs_one_token_later():
    inputs, targets = Batches(torch.arange(50), context=8, batch=3, seed=0).at(0)
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
        inputs, targets = copied.at(step)
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
