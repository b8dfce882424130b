"""Byte-level BPE: against the textbook, and on input that breaks engines."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from unittest import mock

import pytest
import textbook_bpe
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_samples import long_texts

from pellucid import tokenizers
from pellucid.tokenizers import bytelevel
from pellucid.tokenizers.bytelevel import (
    GPT2_SPLIT,
    KNOWN_SPLITS,
    LLAMA3_SPLIT,
    ByteLevelTokenizer,
    Split,
    ranks_from_merges,
    token_bytes,
)

# Characters of every class the patterns tell apart. Python's `regex` has a few more white-space
# characters (U+001C … U+001F) and newer letters than tiktoken; both are left out.
CHARACTERS = "aabceé日жſ'sStTdmrlvLL  \t\n\n\r\v\x85\u00a0\u2028\u300012345٣!?.,-()#🦙\u0301"
texts = st.text(st.sampled_from(CHARACTERS), max_size=80)


@pytest.mark.parametrize("split", KNOWN_SPLITS, ids=["gpt2", "llama3", "single-digit"])
def test_encodes_as_the_textbook_does(small_ranks: dict[bytes, int], split: Split) -> None:
    tokenizer = _tokenizer(small_ranks, split)

    @settings(max_examples=250, deadline=None)
    @given(texts)
    @example("it's They'RE don'T 'S  x\n\n  y\r\n\r\n z   ")
    def check(text: str) -> None:
        assert tokenizer.encode(text) == textbook_bpe.encode(text, split.pattern, small_ranks)

    check()


@pytest.fixture(scope="module")
def space_ranks() -> dict[bytes, int]:
    """Ranks rich in white space, so that every other way to cut it gives other ids."""
    draw = random.Random(0)
    spaces = ["".join(draw.choices(" \t\n\r", k=draw.randint(2, 6))) for _ in range(400)]
    return textbook_bpe.train("x".join(spaces), r"\s+|\S", merges=200)


def _limit(characters: int):
    """The limit for long white space, lowered."""
    short = re.compile(bytelevel._LONG_SPACE.pattern.replace("25000", str(characters)))
    return mock.patch.multiple(bytelevel, LONGEST_SPACE=characters, _LONG_SPACE=short)


@pytest.mark.parametrize("split", KNOWN_SPLITS, ids=["gpt2", "llama3", "single-digit"])
def test_long_white_space_is_cut_where_the_pattern_cuts_it(
    space_ranks: dict[bytes, int], split: Split
) -> None:
    """With the limit at 3 characters, against the engine on the uncut text."""
    tokenizer = _tokenizer(space_ranks, split)

    @settings(max_examples=500, deadline=None)
    @given(st.text(st.sampled_from("a1!é🦙'  \t\n\r\u2028\x85"), max_size=40))
    @example("!\n\n\n x")
    @example("   ")
    @example("\n   b")
    @example("a\n\n\n\n")
    @example("\n\n \n  b!")
    @example("a\n\r\t\r b")
    def check(text: str) -> None:
        with _limit(3):
            cut = tokenizer.encode(text)
        assert cut == tokenizer._engine.encode_ordinary(text)

    check()


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \t\n"), max_size=60), st.integers(2, 9))
@example("a  b", 2)
@example("abc     abc", 5)
def test_no_long_white_space_is_overlooked(text: str, limit: int) -> None:
    with _limit(limit):
        if bytelevel._LONG_SPACE.search(text):
            assert bytelevel._may_hold_long_space(text)
    assert not bytelevel._may_hold_long_space("a" * 24_999 + " " + "a" * 24_999)


def test_white_space_means_what_the_engine_means(small_ranks: dict[bytes, int]) -> None:
    import tiktoken

    engine = tiktoken.Encoding("s", pat_str=r"\s", mergeable_ranks=small_ranks, special_tokens={})
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    ours = "".join(re.findall(f"[{bytelevel._SPACE}]", everything))
    assert engine.decode(engine.encode_ordinary(everything)) == ours


@pytest.mark.parametrize(
    ("split", "size"), [(GPT2_SPLIT, 300_000), (LLAMA3_SPLIT, 1_000_000)], ids=["gpt2", "llama3"]
)
def test_long_input(small_ranks: dict[bytes, int], split: Split, size: int) -> None:
    tokenizer = _tokenizer(small_ranks, split)
    for name, text in long_texts(size).items():
        started = time.process_time()
        ids = tokenizer.encode(text)
        # Linear is a second each; quadratic, as in tiktoken before 0.13, minutes.
        assert time.process_time() - started < 10, name
        assert tokenizer.decode(ids) == text, name


@pytest.mark.assets
def test_long_input_in_llama3(assets: Path) -> None:
    tokenizer = tokenizers.load(assets / "llama3")
    for name, text in long_texts(200_000).items():
        started = time.process_time()
        ids = tokenizer.encode(text)
        assert time.process_time() - started < 10, name
        assert tokenizer.decode(ids) == text, name
    # The white space that tiktoken alone panics at.
    assert len(tokenizer.encode(" " * 1_000_000)) == 7813


def _vocab(merges: list[tuple[str, str]]) -> dict[str, int]:
    tokens = [*bytelevel.byte_characters(), *(left + right for left, right in merges)]
    return {token: id for id, token in enumerate(dict.fromkeys(tokens))}


def test_merges_become_ranks_only_where_that_is_the_same() -> None:
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocab = _vocab(merges)
    ranks = ranks_from_merges(vocab, merges)
    assert ranks is not None
    assert ranks[b" the"] == 258
    assert len(ranks) == 259
    assert ranks_from_merges(vocab, merges[::-1]) is None, "made out of order"
    assert ranks_from_merges(vocab | {"he": 259}, merges) is None, "a token that no merge makes"
    assert ranks_from_merges(vocab, [*merges, ("x", "y")]) is None, "a merge without a token"
    for order in (["he", "the"], ["the", "he"]):  # "he", which no merge makes, comes first or last
        odd = _vocab([]) | {token: 256 + place for place, token in enumerate(order)}
        assert ranks_from_merges(odd, [("t", "he")]) is None
    lacking = {token: id for token, id in vocab.items() if token != "a"}
    assert ranks_from_merges(lacking, merges) is None, "a byte is missing"
    assert ranks_from_merges(vocab | {"日": 259}, merges) is None, "no way to write bytes"
    torn = [("a", "b"), ("b", "c"), ("a", "bc")]
    assert ranks_from_merges(_vocab(torn), torn) is None, "(a, b) merges first: abc is never made"
    # Ranks would make abc of ab and c; the list would not.
    assert ranks_from_merges(_vocab(torn), torn, whole_pieces=True) is None
    assert ranks_from_merges(_vocab(torn), [*torn, ("ab", "c")], whole_pieces=True) is not None


@pytest.mark.parametrize("whole_pieces", [False, True])
def test_ranks_made_of_merges_do_what_the_merges_do(whole_pieces: bool) -> None:
    """Lists made up at random: most are refused, and the others must agree on every text."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abc", k=draw.randint(1, 12))) for _ in range(150)]
    accepted = 0
    for _ in range(400):
        tokens, merges = ["a", "b", "c"], []
        for _ in range(draw.randint(1, 6)):
            pair = draw.choice(tokens), draw.choice(tokens)
            tokens.append("".join(pair))
            merges.append(pair)
        if whole_pieces:
            tokens = list(dict.fromkeys(tokens))
            merges = [
                (token[:cut], token[cut:])
                for token in tokens
                for cut in range(1, len(token))
                if token[:cut] in tokens and token[cut:] in tokens
            ]
        ranks = ranks_from_merges(_vocab(merges), merges, whole_pieces)
        if ranks is None:
            continue
        accepted += 1
        written = [(left.encode(), right.encode()) for left, right in merges]
        for text in texts:
            listed = textbook_bpe.encode_by_list(text.encode(), written)
            assert textbook_bpe.encode(text, r".+", ranks) == [ranks[part] for part in listed]
    assert accepted > 50


def test_tokens_as_written_in_files() -> None:
    assert token_bytes("Ġthe") == b" the"
    assert token_bytes("Ċ") == b"\n"
    assert sorted(bytelevel.byte_characters().values()) == list(range(256))
    assert all(character.isprintable() for character in bytelevel.byte_characters())
    with pytest.raises(KeyError):
        token_bytes("日")


def test_incomplete_ranks_are_refused(small_ranks: dict[bytes, int]) -> None:
    lacking = {token: id for token, id in small_ranks.items() if token != b"a"}
    with pytest.raises(ValueError, match=r"1 of the 256 single bytes .* 0x61"):
        _tokenizer(lacking, GPT2_SPLIT)
    with pytest.raises(ValueError, match="share"):
        ByteLevelTokenizer(
            small_ranks, GPT2_SPLIT, {"<x>": 5}, kind="clash", bos_id=None, eos_id=None
        )


def test_ids_without_a_token_are_refused(small_ranks: dict[bytes, int]) -> None:
    gapped = ByteLevelTokenizer(
        small_ranks, GPT2_SPLIT, {"<x>": 1000}, kind="gapped", bos_id=None, eos_id=None
    )
    assert gapped.vocab_size == 1001
    with pytest.raises(ValueError, match="no token has the id 999"):
        gapped.decode([999])


def _tokenizer(ranks: dict[bytes, int], split: Split) -> ByteLevelTokenizer:
    return ByteLevelTokenizer(ranks, split, {}, kind="test", bos_id=None, eos_id=None)
