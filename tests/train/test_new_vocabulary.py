"""A trained model with another vocabulary: rows of its new tokens, and blocks that stay."""

from __future__ import annotations

import pytest
import torch

import pellucid
from pellucid import tokenizers
from pellucid.train.new_vocabulary import spellings, with_vocabulary

TEXT = "Mary and John went to the store, Zoë too. 42 is the answer. " * 9


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> tokenizers.Tokenizer:
    return tokenizers.train_bpe([TEXT], 300, tmp_path_factory.mktemp("new"))


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> tokenizers.Tokenizer:
    specials = ("<s>", "<|endoftext|>")
    return tokenizers.train_bpe([" Mary Paul" * 9], 268, tmp_path_factory.mktemp("old"), specials)


def test_each_new_token_is_spelt_with_old_ones(old, new):
    found = spellings(old, new)
    assert len(found) == new.vocab_size
    for token, ids in enumerate(found):
        assert old.decode_bytes(ids) == new.decode_bytes([token])
    assert found[new.specials["<|endoftext|>"]] == [old.specials["<|endoftext|>"]]
    assert len(found[new.encode(" Mary")[0]]) == 1 < len(found[new.encode(" John")[0]])


def test_the_rows_are_means_and_the_blocks_are_kept(new):
    lm = pellucid.load("stdlib-gpt2", dtype="float32")
    weights = dict(lm.model.state_dict())
    config, found = with_vocabulary(lm.config, weights, lm.tokenizer, new)
    assert config.vocab_size == new.vocab_size == len(found["embed.weight"])
    token = new.encode(" John")[0]
    pieces = lm.tokenizer.encode(" John")
    assert len(pieces) > 1
    torch.testing.assert_close(
        found["embed.weight"][token], lm.model.embed.weight[pieces].mean(0), rtol=0, atol=0
    )
    assert all(
        torch.equal(found[name], value) for name, value in weights.items() if "embed" not in name
    )


def test_a_run_learns_a_new_vocabulary(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 12)
    run = pellucid.train(
        data=[str(tmp_path / "text.txt")], init="stdlib", new_vocab=True, vocab=290, steps=2,
        batch=1, warmup=0, sample_every=0, plot=False, tensorboard=False, out=tmp_path / "run",
    )  # fmt: skip
    assert run.model.config.vocab_size == 290
    lm = pellucid.load(tmp_path / "run" / "last")
    assert lm.tokenizer.decode(lm.encode("Mary")) == "<|endoftext|>Mary"
    again = pellucid.train(out=tmp_path / "run", resume=True, stop=2)
    assert again.model.config.vocab_size == 290
    with pytest.raises(ValueError, match="--new-vocab is for the model of --init"):
        pellucid.train(stdlib=True, new_vocab=True, out=tmp_path / "other")
