"""Which file is read, and what is said where none can be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pellucid import tokenizers


def test_the_same_name_is_told_apart_by_content(small_piece_file: Path, tmp_path: Path) -> None:
    assert tokenizers.load(small_piece_file).kind == "sentencepiece"
    assert tokenizers.load(small_piece_file.parent).kind == "sentencepiece"
    renamed = tmp_path / "anything.bin"
    shutil.copy(small_piece_file, renamed)
    assert tokenizers.load(str(renamed)).kind == "sentencepiece"


def test_tokenizer_json_comes_first_except_in_metas_layout(
    small_piece_file: Path, trained_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(small_piece_file, tmp_path / "tokenizer.model")
    shutil.copy(trained_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    assert tokenizers.load(tmp_path).kind == "tokenizer.json"
    (tmp_path / "params.json").write_text("{}")
    assert tokenizers.load(tmp_path).kind == "sentencepiece"
    (tmp_path / "config.json").write_text("{}")
    assert tokenizers.load(tmp_path).kind == "tokenizer.json"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist; expected a model folder or"):
        tokenizers.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer; expected tokenizer\.json"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no tokenizer of a known format"),
        (b"\x80\x02PK garbage", "no tokenizer of a known format"),
        (b"hello\nworld\n", "no tokenizer of a known format"),
        (b"<html>404</html>", "no tokenizer of a known format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b'{"model": ', "is not JSON"),
        (b"{}", "half of a GPT-2 tokenizer"),
        (b'{"model": {}}', '"model" and in it "vocab"'),
    ],
)
def test_unknown_content_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        tokenizers.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
