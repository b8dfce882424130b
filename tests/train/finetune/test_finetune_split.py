"""What is held out: as large a share as was asked for, and nothing of it is learnt from."""

from __future__ import annotations

import pytest

from pellucid.train import Document
from pellucid.train.finetune.tasks import split, split_texts


@pytest.mark.parametrize(
    ("share", "held"), [(0.1, 5), (0.4, 20), (0.3, 15), (0.001, 1), (0.999, 49)]
)
def test_a_share_of_examples(share: float, held: int):
    items = list(range(50))
    training, held_out = split(items, share, seed=3)
    assert len(held_out) == held
    assert sorted(training + held_out) == items
    assert (training, held_out) == (sorted(training), sorted(held_out))
    assert split(items, share, seed=3) == (training, held_out)
    assert held_out != split(items, share, seed=4)[1]


def test_texts_are_held_out_whole_where_there_are_enough():
    texts = [Document(str(number), "x" * number) for number in range(10)]
    training, held_out = split_texts(texts, 0.4, seed=0)
    assert len(held_out) == 4
    assert sorted(training + held_out) == texts


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
def test_of_few_texts_the_end(share: float):
    texts = [Document("a", "0123456789" * 10), Document("b", "abcdefghij" * 20)]
    training, held_out = split_texts(texts, share, seed=0)
    assert [len(text.text) for text in held_out] == [round(100 * share), round(200 * share)]
    joined = [one.text + other.text for one, other in zip(training, held_out, strict=True)]
    assert joined == [text.text for text in texts]


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5])
def test_no_share(share: float):
    texts = [Document("a", "text")] * 3
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        split_texts(texts, share, seed=0)
