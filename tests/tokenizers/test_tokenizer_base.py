"""What holds for every tokenizer: round trips, specials, streams, errors."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pellucid import tokenizers
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.base import ChatFormat

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@quick
@given(text=texts)
def test_any_text_comes_back(small: Tokenizer, text: str) -> None:
    if small.kind == "sentencepiece":
        # SentencePiece writes a space as this character, and so reads it as one.
        text = text.replace("▁", "_")
    assert small.decode(small.encode(text)) == text
    if small.bos_id is not None:
        assert small.decode(small.encode(text, bos=True, eos=True), skip_specials=True) == text


@quick
@given(data=st.data(), skip=st.booleans())
def test_a_stream_gives_what_decode_gives(
    small: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1), max_size=30))
    _check_stream(small, ids, skip)


@quick
@given(text=texts, cut=st.integers(0, 60))
def test_a_stream_goes_on_after_a_prompt(small: Tokenizer, text: str, cut: int) -> None:
    ids = small.encode(text)
    before, after = ids[:cut], ids[cut:]
    stream = small.stream(after=before)
    pushed = "".join(stream.push(id) for id in after) + stream.flush()
    # The prompt may have ended inside a character: its bytes then come with what follows.
    whole = small.decode_bytes(ids)
    shown = small.decode_bytes(before).decode("utf-8", "ignore").encode()
    assert pushed.encode() == whole[len(shown) :]


def _check_stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    whole = tokenizer.decode(ids, skip)
    stream = tokenizer.stream(skip)
    pieces = [stream.push(id) for id in ids] + [stream.flush()]
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


def test_no_half_character_leaves_a_stream(small: Tokenizer) -> None:
    ids = small.encode("ㄱ🐪ß")
    stream = small.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) == "ㄱ🐪ß"
    assert stream.flush() == ""
    assert len(ids) > 3 and "" in pieces, "the example should need several tokens per character"


def test_a_cut_character_is_replaced_at_the_flush(small: Tokenizer) -> None:
    ids = small.encode("🐪")[:-1]
    stream = small.stream()
    assert "".join(stream.push(id) for id in ids) == ""
    assert stream.flush() == small.decode(ids) == "\ufffd"


def test_text_that_spells_a_special_token_stays_text(small: Tokenizer) -> None:
    for name, id in list(small.specials.items())[:12]:
        ids = small.encode(f"a{name}b")
        assert id not in ids
        assert small.decode(ids) == f"a{name}b"
        allowed = small.encode(f"a{name}b", specials=True)
        assert allowed.count(id) == 1
        assert small.decode(allowed, skip_specials=True).replace(" ", "") == "ab"


def test_begin_and_end_tokens(small: Tokenizer) -> None:
    ids = small.encode("x", bos=True, eos=True)
    assert (ids[0], ids[-1]) == (small.bos_id, small.eos_id)
    assert ids[1:-1] == small.encode("x")
    assert small.eos_id in small.stop_ids
    assert small.encode("") == []
    assert small.decode([]) == ""


def test_a_text_stops_at_what_ends_a_turn_and_nowhere_else() -> None:
    plain = {"kind": "k", "table": [b"x"] * 9, "bos_id": 0}
    names = {"<|begin|>": 0, "<|eot_id|>": 1, "<|end|>": 2, "<|python_tag|>": 3}
    assert Tokenizer(**plain, specials=names, eos_id=None).stop_ids == {1}
    marked = Tokenizer(**plain, specials={"<|end|>": 2}, eos_id=2, marks={"</s>": 4, "<s>": 5})
    assert marked.stop_ids == {2, 4}
    assert Tokenizer(**plain, specials={}, eos_id=3, stop_ids=[7]).stop_ids == {3, 7}
    assert not Tokenizer(**plain, specials={}, eos_id=3, adds_bos=False).adds_bos
    assert Tokenizer(**plain, specials={}, eos_id=3, adds_bos=True).adds_bos
    assert not Tokenizer(**plain | {"bos_id": None}, specials={}, eos_id=3, adds_bos=True).adds_bos


def test_of_special_tokens_that_begin_alike_the_longest_is_meant() -> None:
    names = {"<|a|>": 0, "<|a|>b": 1, "<|a|>bc": 2}
    tokenizer = Tokenizer(kind="k", table=[b"x"] * 3, specials=names, bos_id=None, eos_id=None)
    assert tokenizer.split_specials("<|a|>bcd<|a|>b<|a|>") == [2, "d", 1, 0]
    assert tokenizer.split_specials("plain") == ["plain"]
    assert tokenizer.split_specials("") == []


class Numbered(ChatFormat):
    """Says how many messages there are."""

    name = "numbered"

    def _encode(self, messages, add_generation_prompt, tools):
        return [len(messages), add_generation_prompt, len(tools or ())]


def test_a_conversation_is_checked_before_a_format_writes_it(small: Tokenizer) -> None:
    told, message, tool = Numbered(small), {"role": "user", "content": "a"}, {"name": "f"}
    assert told.encode([message]) == [1, True, 0]
    assert told.encode([message, message], add_generation_prompt=False, tools=[]) == [2, False, 0]
    with pytest.raises(ValueError, match="at least one message, got none"):
        told.encode([])
    for key in ("role", "content"):
        lacking = {name: value for name, value in message.items() if name != key}
        for wrong in (lacking, message | {key: 5}):
            with pytest.raises(ValueError, match=f"message 1: '{key}' is .*; expected text"):
                told.encode([message, wrong])
    called = message | {"tool_calls": [tool]}
    for given_tools, messages in (([tool], [message]), (None, [message, called])):
        with pytest.raises(ValueError, match="numbered has no place for tools"):
            told.encode(messages, tools=given_tools)
    told.tells_tools = True
    assert told.encode([message, called], tools=[tool]) == [2, True, 1]


def test_surrogates_join_or_become_the_replacement_character(small: Tokenizer) -> None:
    assert small.encode("\ud83e\udd99") == small.encode("🦙")
    assert small.decode(small.encode("a\ud83eb")) == "a\ufffdb"


def test_ids_outside_the_vocabulary_are_refused_with_both_numbers(small: Tokenizer) -> None:
    for id in (-1, small.vocab_size):
        for call in (
            lambda id=id: small.decode([id]),
            lambda id=id: small.decode_bytes([0, id]),
            lambda id=id: small.token_string(id),
            lambda id=id: small.stream().push(id),
        ):
            with pytest.raises(ValueError, match=rf"token id {id} .* 0 … {small.vocab_size - 1}"):
                call()


def test_token_strings_show_parts_of_characters_as_escapes(small: Tokenizer) -> None:
    strings = [small.token_string(id) for id in small.encode("a 🐪")]
    assert "".join(strings).replace(" ", "") == "a\\xf0\\x9f\\x90\\xaa"
    for name, id in small.specials.items():
        assert small.token_string(id) == name


def test_ids_may_be_numpy_or_torch_integers(small: Tokenizer) -> None:
    import numpy as np
    import torch

    ids = small.encode("the other")
    assert small.decode(np.array(ids)) == small.decode(torch.tensor(ids)) == "the other"
    stream = small.stream()
    assert "".join(stream.push(id) for id in np.array(ids)) == "the other"


def test_tokenizers_go_to_other_processes(small: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(small))
    assert copy.encode("the other", bos=True) == small.encode("the other", bos=True)


def test_a_missing_begin_token_is_an_error(small_ranks: dict[bytes, int]) -> None:
    from pellucid.tokenizers.bytelevel import GPT2_SPLIT, ByteLevelTokenizer

    bare = ByteLevelTokenizer(small_ranks, GPT2_SPLIT, {}, kind="bare", bos_id=None, eos_id=None)
    with pytest.raises(ValueError, match="names no bos token"):
        bare.encode("x", bos=True)
    assert bare.encode("<x>", specials=True) == bare.encode("<x>")
    assert bare.stop_ids == frozenset()


def test_import_is_light() -> None:
    program = (
        "import sys, pellucid.tokenizers; "
        "print({'torch', 'tiktoken', 'sentencepiece', 'tokenizers', 'jinja2'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"


@pytest.mark.assets
@pytest.mark.parametrize("name", ["llama3", "llama2", "gpt2", "stories260K/hf", "stories260K/meta"])
def test_real_tokenizers_stream(assets: Path, name: str) -> None:
    tokenizer = tokenizers.load(assets / name)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        _check_stream(tokenizer, ids, skip)

    check()


@pytest.mark.assets
@pytest.mark.parametrize("name", ["llama3", "llama2", "gpt2"])
def test_real_tokenizers_give_any_text_back(assets: Path, name: str) -> None:
    tokenizer = tokenizers.load(assets / name)

    @settings(max_examples=60, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        if name == "llama2":
            text = text.replace("▁", "_")
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()
