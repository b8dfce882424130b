"""What is read to train on: nothing twice, nothing that is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from pellucid.train import (
    Document,
    Layout,
    hold_out,
    read_documents,
    stdlib_documents,
    token_stream,
)


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


def test_half_a_character_in_an_escape_is_replaced_as_everywhere(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    assert [document.text for document in read_documents([tmp_path])] == ["a\ufffd", "\U0001f642"]


def test_lines_of_json_and_separated_texts_are_documents_with_a_place(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(
        '{"n": 1, "body": "one"}\n\n{"body": "two"}', encoding="utf-8"
    )
    (tmp_path / "b.txt").write_text("x\n---\ny\n---\n", encoding="utf-8")
    found = read_documents([tmp_path], Layout(text_key="body", separator="---"))
    assert [document.text for document in found] == ["one", "two", "x", "y"]
    assert [document.name.rpartition("/")[2] for document in found] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "b.txt:1",
        "b.txt:2",
    ]
    with pytest.raises(ValueError, match=r"a.jsonl \(line at byte 0\) has no text under 'text'"):
        read_documents([tmp_path])
