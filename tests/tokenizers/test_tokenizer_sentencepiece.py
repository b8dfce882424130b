"""SentencePiece: held against the sentencepiece library itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import long_texts

from pellucid import tokenizers
from pellucid.tokenizers import Tokenizer, sentence_piece

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


def _engine(path: Path):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _check_against_the_library(path: Path) -> None:
    ours, library = tokenizers.load(path), _engine(path)
    size = library.vocab_size()

    @settings(max_examples=150, deadline=None)
    @given(texts, st.lists(st.integers(0, size - 1), max_size=20))
    def check(text: str, ids: list[int]) -> None:
        encoded = ours.encode(text, bos=True)
        assert encoded == [library.bos_id(), *library.encode(text)]
        assert ours.decode(encoded, skip_specials=True) == library.decode(encoded)
        # Any ids at all; byte tokens only where they are whole characters, because the library
        # writes one U+FFFD per wrong byte and Python one per cut character.
        whole = [id for id in ids if not library.is_byte(id)]
        assert ours.decode(whole, skip_specials=True) == library.decode(whole)

    check()


def test_ids_and_text_are_the_librarys(small_piece_file: Path) -> None:
    _check_against_the_library(small_piece_file)


@pytest.mark.assets
@pytest.mark.parametrize("name", ["llama2", "stories260K/hf", "stories260K/meta"])
def test_ids_and_text_are_the_librarys_on_real_files(assets: Path, name: str) -> None:
    _check_against_the_library(assets / name / "tokenizer.model")


@pytest.mark.assets
def test_known_ids_of_llama2(assets: Path) -> None:
    tokenizer = tokenizers.load(assets / "llama2")
    assert tokenizer.encode("Hello world", bos=True) == [1, 15043, 3186]
    assert (tokenizer.kind, tokenizer.vocab_size) == ("sentencepiece", 32_000)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, {2})
    assert tokenizer.specials == {"<s>": 1, "</s>": 2}
    assert tokenizer.adds_bos
    assert tokenizer.token_string(0) == "<unk>"


def test_a_space_in_front_is_dropped_once_and_only_in_front(small_pieces: Tokenizer) -> None:
    ids = small_pieces.encode("the other")
    assert small_pieces.decode(ids) == "the other"
    assert small_pieces.decode(small_pieces.encode("  the")) == "  the"
    bos = small_pieces.bos_id
    assert bos is not None
    assert small_pieces.decode([bos, *ids], skip_specials=True) == "the other"
    # Shown, the begin token stands in front of the space.
    assert small_pieces.decode([bos, *ids]) == "<s> the other"
    stream = small_pieces.stream(skip_specials=True, after=[bos, *ids])
    assert "".join(map(stream.push, ids)) == " the other"


def test_byte_tokens_join_into_characters(small_pieces: Tokenizer) -> None:
    ids = small_pieces.encode("🐪")
    assert [small_pieces.token_string(id) for id in ids[-4:]] == [
        "\\xf0",
        "\\x9f",
        "\\x90",
        "\\xaa",
    ]
    stream = small_pieces.stream()
    assert [stream.push(id) for id in ids[-4:]] == ["", "", "", "🐪"]
    assert small_pieces.decode_bytes(ids[-4:-1]) == b"\xf0\x9f\x90"


def test_specials_separate_stretches_of_text(small_pieces: Tokenizer) -> None:
    ids = small_pieces.encode("the</s>the", specials=True)
    the = small_pieces.encode("the")
    assert ids == [*the, small_pieces.eos_id, *the]


@pytest.mark.assets
def test_long_input(assets: Path) -> None:
    tokenizer = tokenizers.load(assets / "llama2")
    for name, text in long_texts(300_000).items():
        started = time.process_time()
        ids = tokenizer.encode(text)
        assert time.process_time() - started < 10, name
        assert tokenizer.decode(ids) == text, name


def test_damaged_models_are_one_clear_error(tmp_path: Path, small_piece_file: Path) -> None:
    content = small_piece_file.read_bytes()
    path = tmp_path / "tokenizer.model"
    for damaged in (content[: len(content) // 2], content[:100], content[:3] + b"\xff" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="fetch it again") as raised:
            sentence_piece.from_file(path)
        assert "\n" not in str(raised.value)


def beside(folder: Path, model: Path, **files: object) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return tokenizers.load(folder)


@pytest.mark.parametrize("where", ["added_tokens", "tokenizer_config"])
def test_added_tokens_beside_the_model_count(
    tmp_path: Path, small_piece_file: Path, where: str
) -> None:
    size = tokenizers.load(small_piece_file).vocab_size
    decoder = {
        "1": {"content": "<s>", "special": True},  # what the model has already
        str(size): {"content": "<|end|>", "special": False},
        str(size + 2): {"content": "<pad>", "special": True},
    }
    files: dict[str, dict[str, object]] = {
        "added_tokens": {"<|end|>": size, "<pad>": size + 2},
        "tokenizer_config": {"added_tokens_decoder": decoder, "eos_token": "<|end|>"},
    }
    config = {"tokenizer_config": {"eos_token": {"content": "<|end|>"}}}
    tokenizer = beside(tmp_path, small_piece_file, **{**config, where: files[where]})
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size + 3, 1, size)
    assert tokenizer.stop_ids == {2, size}  # </s> ends a text by its name
    assert tokenizer.unused_ids == {size + 1}
    ids = tokenizer.encode("the<|end|><pad>")
    assert max(ids) < size and tokenizer.decode(ids) == "the<|end|><pad>"
    ids = tokenizer.encode("the<|end|><pad>", specials=True)
    assert ids == [*tokenizer.encode("the"), size, size + 2]
    assert tokenizer.decode(ids) == "the<|end|><pad>"
    assert tokenizer.decode([size + 2, *tokenizer.encode("the")], skip_specials=True) == "the"


@pytest.mark.parametrize("content", [{}, {"<s>": 1, "</s>": 2}])
def test_a_list_of_added_tokens_may_add_nothing(
    tmp_path: Path, small_piece_file: Path, content: dict[str, int]
) -> None:
    tokenizer = beside(tmp_path, small_piece_file, added_tokens=content)
    assert (tokenizer.eos_id, tokenizer.unused_ids) == (2, frozenset())
    assert tokenizer.specials == {"<s>": 1, "</s>": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<pad>": 5}, "the added token '<pad>' has the id 5, but the model has"),
        ({"<s>": 2}, "'<s>' has the id 2, but the model has '</s>' there"),
        ({"<pad>": 400_000_000}, "a token has the id 400000000; expected a whole number from 0 to"),
        ({"<pad>": "x"}, "the added token '<pad>' has the id 'x'"),
        ({"word": 5000}, "adds the word 'word' to the tokens"),
    ],
)
def test_added_tokens_that_cannot_be_are_one_line(
    tmp_path: Path, small_piece_file: Path, content: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        beside(tmp_path, small_piece_file, added_tokens=content)
    assert "\n" not in str(raised.value)


def test_roles_in_files_beside_count(tmp_path: Path, small_piece_file: Path) -> None:
    config: dict[str, object] = {"bos_token": None, "eos_token": "<s>"}
    tokenizer = beside(tmp_path, small_piece_file, tokenizer_config=config)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (None, 1, False)
    for wrong in ([], {"x": {"content": "<a>"}}, {"5": "<a>"}):
        if wrong:
            with pytest.raises(ValueError, match="added_token"):
                beside(tmp_path, small_piece_file, tokenizer_config={"added_tokens_decoder": wrong})
