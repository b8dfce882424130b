"""tokenizer.json: the same ids as the tokenizers library, whichever engine does it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid import tokenizers
from pellucid.tokenizers import bytelevel, llama3
from pellucid.tokenizers.bytelevel import ByteLevelTokenizer
from pellucid.tokenizers.hf import LibraryTokenizer

texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("the 's\n\r\t  1!🦙é<|>"),
    max_size=60,
)


def _library(path: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _check_against_the_library(ours: tokenizers.Tokenizer, path: Path, examples: int = 150) -> None:
    library = _library(path)

    @settings(max_examples=examples, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, specials=True) == ids
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, True) == library.decode(ids, skip_special_tokens=True)
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)

    check()


def _changed(folder: Path, to: Path, **changes: Any) -> Path:
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        place[key] = value
    path = to / "tokenizer.json"
    path.write_text(json.dumps(document), "utf-8")
    return path


@pytest.mark.parametrize("split", bytelevel.KNOWN_SPLITS, ids=["gpt2", "llama3", "single-digit"])
def test_byte_level_goes_through_tiktoken(
    trained_folder: Path, tmp_path: Path, split: bytelevel.Split
) -> None:
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    before: dict[str, Any] = {**step, "use_regex": True}
    if split is not bytelevel.GPT2_SPLIT:
        cut = {"type": "Split", "pattern": {"Regex": split.pattern}}
        cut |= {"behavior": "Isolated", "invert": False}
        before = {"type": "Sequence", "pretokenizers": [cut, {**step, "use_regex": False}]}
    path = _changed(trained_folder, tmp_path, pre_tokenizer=before)
    ours = tokenizers.load(path)
    assert isinstance(ours, ByteLevelTokenizer)
    assert ours._split is split
    _check_against_the_library(ours, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer__pretokenizers": []},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"\s+|\S+"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ],
    ids=["normalizer", "no split", "prefix space", "other pattern"],
)
def test_anything_else_goes_through_the_library(
    trained_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = _changed(trained_folder, tmp_path, **changes)
    ours = tokenizers.load(path)
    assert isinstance(ours, LibraryTokenizer)
    _check_against_the_library(ours, path, examples=60)


def test_an_added_token_is_inert_in_text_whether_or_not_it_is_called_special(
    trained_folder: Path, tmp_path: Path
) -> None:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": 0, "content": "<|endoftext|>", "special": True, **plain},
        {"id": 400, "content": "<tool>", "special": False, **plain},
    ]
    path = _changed(trained_folder, tmp_path, added_tokens=added)
    ours = tokenizers.load(path)
    assert isinstance(ours, LibraryTokenizer)
    assert ours.specials == {"<|endoftext|>": 0}
    assert ours.controls == {"<|endoftext|>": 0, "<tool>": 400}
    ids = ours.encode("a<tool><|endoftext|>")
    assert not {0, 400} & set(ids)
    assert ours.decode(ids) == "a<tool><|endoftext|>"
    allowed = ours.encode("a<tool><|endoftext|>", specials=True)
    assert allowed == [*ours.encode("a"), 400, 0]
    assert ours.decode(allowed, skip_specials=True) == "a<tool>"  # only what is called special
    _check_against_the_library(ours, path, examples=60)
    # The library reads such a name as bytes (é is one of the 256 characters) and gives U+FFFD.
    added[1]["content"] = "<é>"
    ours = tokenizers.load(_changed(trained_folder, tmp_path, added_tokens=added))
    assert ours.decode([400]) == ours.token_string(400) == "<é>"


def test_llama2_as_tokenizer_json(small_piece_file: Path, tmp_path: Path) -> None:
    """As transformers converts a SentencePiece model: pieces, byte tokens, a space in front."""
    document = _llama2_document(small_piece_file)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), "utf-8")
    ours = tokenizers.load(path)
    assert isinstance(ours, LibraryTokenizer)
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (1, 2, {2})
    assert ours.adds_bos
    assert ours.encode("a 🐪 the", bos=True) == tokenizers.load(small_piece_file).encode(
        "a 🐪 the", bos=True
    )
    stream = ours.stream(after=ours.encode("the"))
    assert stream.push(ours.encode("other")[0]).startswith(" ")
    library = _library(path)
    for text in ("the other", "  spaced   out ", "a 🐪 the", "日本語 naïve\n\n", ""):
        ids = library.encode(text).ids
        assert ours.encode(text, bos=True) == ids
        for skip in (False, True):
            assert ours.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)


def _llama2_document(model: Path) -> dict[str, Any]:
    import sentencepiece

    engine = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [engine.id_to_piece(id) for id in range(engine.vocab_size())]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    merges = sorted(
        (
            (vocab[piece], piece[:cut], piece[cut:])
            for piece in pieces[259:]
            for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab
        ),
        key=lambda merge: merge[0],
    )
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": pieces[id], "special": True, **plain} for id in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in merges],
        },
    }


def test_a_word_level_tokenizer_decodes_through_the_library(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "fox": 2}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizers.load(tmp_path)
    ids = ours.encode("the fox flies", eos=True)
    assert ids == [1, 2, 0, 3]
    assert ours.decode(ids) == "the fox <unk> </s>"
    assert ours.decode(ids, skip_specials=True) == "the fox <unk>"
    assert ours.encode("the </s>", specials=True) == [1, 3]
    stream = ours.stream(after=ids[:1])
    assert [stream.push(id) for id in ids[1:]] + [stream.flush()] == [" fox", " <unk>", " </s>", ""]
    with pytest.raises(ValueError, match="token id 4 is outside"):
        ours.decode([4])


def _llama3_document(ranks: dict[bytes, int]) -> dict[str, Any]:
    """As Meta's tokenizer.json: every way to make a token from two others is a merge."""
    written = {byte: character for character, byte in bytelevel.byte_characters().items()}

    def text(token: bytes) -> str:
        return "".join(written[byte] for byte in token)

    merges = [
        (text(token[:cut]), text(token[cut:]))
        for token in sorted(ranks, key=lambda token: ranks[token])
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    specials = llama3.special_tokens("3.1", first_id=len(ranks))
    cut = {"type": "Split", "pattern": {"Regex": bytelevel.LLAMA3_SPLIT.pattern}}
    cut |= {"behavior": "Isolated", "invert": False}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    step |= {"use_regex": False}
    begin = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    ids = {"id": "<|begin_of_text|>", "ids": [len(ranks)], "tokens": ["<|begin_of_text|>"]}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, sequence],
        "pair": [begin, sequence],
        "special_tokens": {"<|begin_of_text|>": ids},
    }
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": name, "special": True, **plain} for name, id in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, step]},
        "post_processor": {"type": "Sequence", "processors": [step, template]},
        "decoder": {**step, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {text(token): id for token, id in ranks.items()},
            "merges": [" ".join(merge) for merge in merges],
        },
    }


@pytest.mark.assets
def test_llama3_as_tokenizer_json(assets: Path, tmp_path: Path) -> None:
    """The first 6,000 real ranks, in the form of Meta's tokenizer.json."""
    real = llama3.read_ranks(assets / "llama3" / "tokenizer.model")
    ranks = {token: id for token, id in real.items() if id < 6000}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_llama3_document(ranks)), "utf-8")
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6001, 6008, 6009]}')
    ours, meta = tokenizers.load(tmp_path), llama3.from_ranks(ranks)
    assert isinstance(ours, ByteLevelTokenizer)
    assert ours.specials == meta.specials
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (6000, 6009, True)
    assert ours.stop_ids == meta.stop_ids == {6001, 6008, 6009}
    assert ours.chat is not None and ours.chat.name == "llama3"
    _check_against_the_library(ours, path)
    # The one place where the two engines may differ: text that a token's merges do not reach.
    for token in real:
        if 6000 <= real[token] < 7000:
            text = token.decode("utf-8", "replace")
            assert ours.encode(text) == meta.encode(text)


def test_roles_from_the_files_beside(trained_folder: Path, tmp_path: Path) -> None:
    def load(**files: object) -> tokenizers.Tokenizer:
        for old in tmp_path.iterdir():
            old.unlink()
        _changed(trained_folder, tmp_path)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tokenizers.load(tmp_path)

    alone = load()
    assert (alone.bos_id, alone.eos_id, alone.adds_bos) == (0, 0, False)
    none = load(tokenizer_config={"bos_token": None, "eos_token": "<|endoftext|>"})
    assert (none.bos_id, none.eos_id) == (None, 0)
    mapped = load(special_tokens_map={"bos_token": {"content": "the"}})
    assert mapped.bos_id == none.encode("the")[0]
    numbers = load(config={"bos_token_id": 5, "eos_token_id": 6}, generation_config={})
    assert (numbers.bos_id, numbers.eos_id) == (5, 6)
    stops = load(generation_config={"eos_token_id": [7, 8, 10_000]}, config={"eos_token_id": 9})
    assert stops.stop_ids == {0, 7, 8, 9}
    assert load(tokenizer_config={"add_bos_token": True}).adds_bos
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected a JSON object"):
        load(tokenizer_config=[])


def test_malformed_files_are_one_clear_error(trained_folder: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"model__merges": [["a", "b", "c"]]}, "refuses it"),
        ({"model__type": "Unheard"}, "refuses it"),
        ({"added_tokens": [{"id": 0}]}, 'expected an "id" and a "content"'),
        ({"model__vocab": 3}, 'in it "vocab"'),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            tokenizers.load(_changed(trained_folder, tmp_path, **changes))
        assert str(tmp_path) in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("id", [400_000_000, 2**32 - 1, -1, 1.5, "7", True, None])
def test_an_id_that_cannot_be_is_refused_before_a_table_is_made(
    trained_folder: Path, tmp_path: Path, id: object
) -> None:
    vocab = json.loads((trained_folder / "tokenizer.json").read_text())["model"]["vocab"]
    added = [{"id": id, "content": "<x>", "special": True}]
    for changes in ({"added_tokens": added}, {"model__vocab": vocab | {"the": id}}):
        started = time.process_time()
        with pytest.raises(ValueError, match="a token has the id .*expected a whole") as raised:
            tokenizers.load(_changed(trained_folder, tmp_path, **changes))
        assert time.process_time() - started < 5
        assert "\n" not in str(raised.value)


def test_gaps_in_a_vocabulary_are_known(trained_folder: Path, tmp_path: Path) -> None:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": name, "special": True, **plain}
        for id, name in ((0, "<|endoftext|>"), (403, "<x>"))
    ]
    ours = tokenizers.load(_changed(trained_folder, tmp_path, added_tokens=added))
    assert (ours.vocab_size, ours.unused_ids) == (404, {400, 401, 402})
