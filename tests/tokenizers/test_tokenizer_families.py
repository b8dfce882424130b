"""Tokenizers as the families' releases have them, and as GGUF files: ids, texts and chats."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from family_tokenizers import CHAT, FORMS, HARD, written
from tokenizer_samples import CORPUS

from pellucid import tokenizers
from pellucid.checkpoints.formats.gguf_tokenizer import tokenizer_keys
from pellucid.checkpoints.formats.gguf_writing import write_gguf
from pellucid.models import LlamaConfig, build
from pellucid.tokenizers.gguf import files_of, from_keys

sys.path.append(str(Path(__file__).parents[1] / "families"))
_SIZE = 640  # of a vocabulary with room
# llama.cpp does not bring letters and their accents together (NFC), as these tokenizers do
_NOT_NORMALISED = {"qwen2", "qwen3", "olmo", "command-r"}
_APART = "e\u0301 o\u0308"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("families")
    return {name: written(form, made / name) for name, form in FORMS.items()}


@pytest.fixture(scope="module")
def piece_folder(tmp_path_factory):
    """A SentencePiece model like Gemma's: no space in front, and pieces that are marks."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 3), model_writer=model, vocab_size=460,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, split_digits=True,
        character_coverage=0.98, hard_vocab_limit=False, minloglevel=3,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, control_symbols=["<ctl>"],
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "<table>", "\u2581\u2581"],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path.parent


def gguf_file(path: Path, keys, size: int) -> Path:
    sizes = {"width": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16}
    config = LlamaConfig(vocab_size=size, context_length=64, hidden_width=32, **sizes)
    state = build(config).to(torch.float32).state_dict()
    write_gguf(path, config, state.__getitem__, "F32", keys)
    return path


def same_ids(ours, other, texts=HARD) -> None:
    for text in texts:
        for specials in (True, False):
            ids = ours.encode(text, specials=specials)
            assert other.encode(text, specials=specials) == ids, (text, specials)
            assert other.decode(ids) == ours.decode(ids), text


@pytest.mark.parametrize("name", FORMS)
def test_a_gguf_file_keeps_ids_roles_and_chat(folders, tmp_path, name):
    ours = tokenizers.load(folders[name])
    keys = tokenizer_keys(ours, folders[name], _SIZE)
    again = tokenizers.load(gguf_file(tmp_path / "a.gguf", keys, _SIZE))
    same_ids(ours, again)
    assert (again.bos_id, again.eos_id, again.adds_bos) == (ours.bos_id, ours.eos_id, ours.adds_bos)
    assert ours.stop_ids <= again.stop_ids
    messages = list(CHAT)
    assert again.chat.encode(messages) == ours.chat.encode(messages)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.gguf])
def test_llama_cpps_own_word_cuts_alike(folders, name):
    ours = tokenizers.load(folders[name])
    keys = tokenizer_keys(ours, folders[name], _SIZE)
    assert keys["tokenizer.ggml.model"] == "gpt2"
    same_ids(ours, from_keys({**keys, "tokenizer.ggml.pre": FORMS[name].gguf}, "released.gguf"))


def test_a_sentencepiece_model_comes_back(piece_folder, tmp_path):
    import sentencepiece

    ours = tokenizers.load(piece_folder)
    keys = tokenizer_keys(ours, piece_folder, _SIZE)
    path = gguf_file(tmp_path / "a.gguf", keys, _SIZE)
    again = tokenizers.load(path)
    same_ids(ours, again)
    library = sentencepiece.SentencePieceProcessor(model_file=str(piece_folder / "tokenizer.model"))
    back = sentencepiece.SentencePieceProcessor()
    back.LoadFromSerializedProto(files_of(path)["tokenizer.model"])
    for text in HARD:
        assert back.encode(text) == library.encode(text), text
        if "</s>" not in text:  # which the library takes for text
            assert ours.encode(text, specials=True) == library.encode(text), text
    # a mark that a user spells is text, and says so again
    turn = library.piece_to_id("<start_of_turn>")
    for tokenizer in (ours, again):
        said = tokenizer.encode("a <start_of_turn> b")
        assert turn not in said and tokenizer.decode(said) == "a <start_of_turn> b"


@pytest.mark.assets
@pytest.mark.parametrize("name", ["llama2", "stories260K/hf"])
def test_real_sentencepiece_models_come_back(assets, tmp_path, name):
    import sentencepiece

    ours = tokenizers.load(assets / name)
    size = ours.vocab_size
    path = gguf_file(tmp_path / "a.gguf", tokenizer_keys(ours, assets / name, size), size)
    same_ids(ours, tokenizers.load(path))
    library = sentencepiece.SentencePieceProcessor(
        model_file=str(assets / name / "tokenizer.model")
    )
    for text in HARD:
        assert ours.encode(text) == library.encode(text)


@pytest.mark.peers
@pytest.mark.parametrize("name", FORMS)
def test_ids_and_chats_are_those_of_transformers(folders, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folders[name])
    ours = tokenizers.load(folders[name])
    for text in HARD:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, specials=True) == ids, text
        told = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == told, text
    messages = list(CHAT)
    for asks in (True, False):
        chat = theirs.apply_chat_template(
            messages, add_generation_prompt=asks, tokenize=True, return_dict=False
        )
        assert ours.chat.encode(messages, add_generation_prompt=asks) == chat


@pytest.mark.peers
@pytest.mark.parametrize("name", [*FORMS, "pieces", "Llama 2's file"])
def test_ids_are_those_of_llama_cpp(request, folders, tmp_path, name):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python")
    from llama_cpp_peer import LlamaCpp

    real = name == "Llama 2's file"
    folder = folders.get(name) or request.getfixturevalue("piece_folder")
    folder = request.getfixturevalue("assets") / "llama2" if real else folder
    ours, size = tokenizers.load(folder), 32000 if real else _SIZE
    path = gguf_file(tmp_path / "a.gguf", tokenizer_keys(ours, folder, size), size)
    left_out = {_APART} if name in _NOT_NORMALISED else set()
    with LlamaCpp(path, vocabulary_only=True) as peer:
        for text in HARD:
            if text not in left_out:
                assert peer.encode(text, specials=True) == ours.encode(text, specials=True), text


@pytest.mark.peers
@pytest.mark.assets
def test_llama2_as_transformers_writes_it(assets, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    theirs = transformers.LlamaTokenizer.from_pretrained(assets / "llama2")
    theirs.save_pretrained(tmp_path)
    ours = tokenizers.load(tmp_path)
    for text in HARD:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, specials=True) == ids, text
    with pytest.warns(UserWarning, match="a space in front of every text"):
        keys = tokenizer_keys(ours, tmp_path, 32000)
    again = from_keys(keys, "merges.gguf")
    for text in HARD:
        if not text.startswith((" ", "\u2581")):
            assert again.encode(text) == ours.encode(text), text
