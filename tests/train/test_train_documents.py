"""What is read to train on: nothing twice, nothing that is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pellucid import tokenizers
from pellucid.generate import encode_prompt
from pellucid.train import (
    Document,
    TextFormat,
    TrainSettings,
    held_out_windows,
    hold_out,
    read_documents,
    stdlib_documents,
    token_stream,
    tokenise,
)
from pellucid.train.data.documents import begin_and_end, decoded, note_spelt_specials
from pellucid.train.finetune.tasks import TaskOptions, text_task
from pellucid.train.prepare import around_texts


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


# What generation begins a text with, and what ends one: the ids that the papers' code has for them.
AROUND = {"gpt2": (50256, None), "llama2": (1, 2), "llama3": (128000, 128001)}


@pytest.mark.assets
@pytest.mark.parametrize("family", AROUND)
def test_a_text_begins_in_training_as_in_generation(family, assets: Path, tmp_path: Path):
    tokenizer = tokenizers.load(assets / family)
    begin, end = AROUND[family]
    assert begin_and_end(tokenizer) == (begin, end)
    if family != "gpt2":
        assert encode_prompt(tokenizer, "One day")[0] == begin
    assert encode_prompt(tokenizer, "") == [begin]
    texts = ["One day", "Another"]
    behind = [] if end is None else [end]
    expected = [id for text in texts for id in (begin, *tokenizer.encode(text), *behind)]
    documents = [Document("", text) for text in texts]
    around = around_texts(TrainSettings(), tokenizer)  # train
    assert token_stream(documents, tokenizer.encode, *around).tolist() == expected
    task = text_task(documents, documents, tokenizer, TaskOptions(context=2, batch=1))  # finetune
    assert task.facts["training_tokens"] == len(expected)
    batch = next(iter(held_out_windows(torch.tensor(expected), 2)))
    assert task.batches.stream.read(0, 3).tolist() == batch.tolist()
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    corpus = tokenise(
        [tmp_path / "lines.jsonl"], tokenizer, tmp_path / "t", begin=begin, end=end, hold_out=0
    )
    assert corpus.training.read(0, len(corpus.training)).tolist() == expected


def test_a_tokenizer_without_the_tokens(tmp_path: Path):
    tokenizer = tokenizers.train_characters(["abc"], tmp_path)
    with pytest.raises(ValueError, match="no token that begins or ends a text: give another, or "):
        around_texts(TrainSettings(), tokenizer)
    assert around_texts(TrainSettings(begin=False), tokenizer) == (None, None)


def test_half_a_character_in_an_escape_is_replaced_as_everywhere(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    assert [document.text for document in read_documents([tmp_path])] == ["a\ufffd", "\U0001f642"]


def test_lines_of_json_and_separated_texts_are_documents_with_a_place(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(
        '{"n": 1, "body": "one"}\n\n{"body": "two"}', encoding="utf-8"
    )
    (tmp_path / "b.txt").write_text("x\n---\ny\n---\n", encoding="utf-8")
    found = read_documents([tmp_path], TextFormat(text_key="body", separator="---"))
    assert [document.text for document in found] == ["one", "two", "x", "y"]
    assert [document.name.rpartition("/")[2] for document in found] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "b.txt:1",
        "b.txt:2",
    ]
    with pytest.raises(ValueError, match=r"a.jsonl \(line at byte 0\) has no text under 'text'"):
        read_documents([tmp_path])


def test_a_byte_order_mark_is_no_text(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_bytes(b"\xef\xbb\xbfone---two")
    lines.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert [d.text for d in read_documents([text], TextFormat(separator="---"))] == ["one", "two"]
    assert [d.text for d in read_documents([text, lines])] == ["one---two", "one"]
    assert decoded(b"\xef\xbb\xbf\xef\xbb\xbfa", "f") == "\ufeffa"  # one of them, at byte 0
    with pytest.raises(ValueError, match=r"f is not UTF-8 text \(byte 4\)"):
        decoded(b"\xef\xbb\xbfa\xff", "f")


def test_a_special_token_that_a_text_spells_often_is_noted():
    class Tokenizer:
        def __init__(self) -> None:
            self.specials = {"<end>": 0, "<pad>": 1}

    with pytest.warns(UserWarning, match="spells '<end>' 4 times.*give --separator '<end>'"):
        note_spelt_specials(["a<end>b<end>", "c<end><end>"], Tokenizer())
    note_spelt_specials(["a<end>b<end>c<end>"], Tokenizer(), "<end>")
    note_spelt_specials(["a<end>b<pad>", "c<end>"], Tokenizer())
