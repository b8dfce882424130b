"""Training a vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import textbook_bpe
from tokenizer_samples import CORPUS

from pellucid import tokenizers
from pellucid.tokenizers.bytelevel import ByteLevelTokenizer
from pellucid.tokenizers.train import SPLIT


def test_it_loads_through_tiktoken(trained_folder: Path) -> None:
    tokenizer = tokenizers.load(trained_folder)
    assert isinstance(tokenizer, ByteLevelTokenizer)
    assert tokenizer._split is SPLIT
    assert tokenizer.vocab_size == 400
    assert tokenizer.specials == {"<|endoftext|>": 0}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 0, {0})
    assert tokenizer.chat is None
    ids = tokenizer.encode(CORPUS)
    assert len(ids) < len(CORPUS.encode()) * 0.7
    assert ids == textbook_bpe.encode(CORPUS, SPLIT.pattern, tokenizer._ranks)


def test_the_same_text_gives_the_same_files(trained_folder: Path, tmp_path: Path) -> None:
    tokenizers.train_bpe(iter([CORPUS] * 3), 400, tmp_path / "again")
    for file in trained_folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_several_special_tokens_or_none(tmp_path: Path) -> None:
    two = tokenizers.train_bpe([CORPUS], 300, tmp_path / "two", specials=("<s>", "</s>"))
    assert two.specials == {"<s>": 0, "</s>": 1}
    assert two.bos_id == 0
    none = tokenizers.train_bpe([CORPUS], 300, str(tmp_path / "none"), specials=())
    assert (none.bos_id, none.eos_id, none.specials) == (None, None, {})
    assert none.decode(none.encode(CORPUS)) == CORPUS


def test_little_text_gives_a_small_vocabulary(tmp_path: Path) -> None:
    tokenizer = tokenizers.train_bpe(["abab"], 1000, tmp_path)
    assert 257 < tokenizer.vocab_size < 270


def test_broken_characters_do_not_stop_it(tmp_path: Path) -> None:
    tokenizer = tokenizers.train_bpe(["a\ud800b" * 9], 300, tmp_path)
    assert tokenizer.decode(tokenizer.encode("a\ufffdb")) == "a\ufffdb"


def test_no_room_for_the_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 256 is too small: 256 bytes and 1 special"):
        tokenizers.train_bpe([CORPUS], 256, tmp_path)


def test_more_tokens_than_any_vocabulary_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 2,147,483,648: expected 4,194,304 or fewer"):
        tokenizers.train_bpe([CORPUS], 1 << 31, tmp_path)


@pytest.mark.peers
def test_transformers_reads_it(trained_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(trained_folder)
    ours = tokenizers.load(trained_folder)
    assert peer.encode(CORPUS) == ours.encode(CORPUS)
    assert peer.decode(peer.encode(CORPUS)) == CORPUS
    assert (peer.bos_token_id, peer.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_characters_as_tokens(tmp_path: Path) -> None:
    text = "to be, or\nnot to be: that's  \u00e9"
    made = tokenizers.train_characters([text[:9], text[9:]], tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    characters = sorted(set(text))
    assert tokenizer.vocab_size == made.vocab_size == len(characters)
    assert tokenizer.encode(text) == [characters.index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (None, None, set())
    stream = tokenizer.stream()
    assert [stream.push(id) for id in tokenizer.encode("to \u00e9")] == ["t", "o", " ", "\u00e9"]
    with pytest.raises(ValueError, match="the text cannot be encoded"):
        tokenizer.encode("Zzz")
    with pytest.raises(ValueError, match="no text to take characters from"):
        tokenizers.train_characters([""], tmp_path)
