"""Tokenised once: the shards hold what tokenising in memory gives, whatever happens on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pellucid import tokenizers
from pellucid.tokenizers import Tokenizer
from pellucid.train import (
    TextFormat,
    hold_out,
    open_corpus,
    read_documents,
    stdlib_documents,
    token_stream,
    tokenise,
)
from pellucid.train.data.shards import tokenizer_digest
from pellucid.train.data.token_source import TokenFiles, token_dtype

DEMO = Path(tokenizers.__file__).parents[1] / "demos" / "stdlib"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.load(DEMO)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are one document each, and files of several."""
    folder = tmp_path_factory.mktemp("text")
    documents = stdlib_documents()[:60]
    for number, document in enumerate(documents[:30]):
        (folder / f"{number:02}.py").write_text(document.text, encoding="utf-8")
    lines = [json.dumps({"id": n, "text": doc.text}) for n, doc in enumerate(documents[30:])]
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def all_of(source: TokenFiles) -> list[int]:
    return source.read(0, len(source)).tolist()


def in_memory(
    paths, tokenizer: Tokenizer, layout: TextFormat | None = None, every: int = 40, end=None
):
    sides = hold_out(read_documents(paths, layout), every)
    return [token_stream(side, tokenizer.encode, 0, end).tolist() for side in sides]


@pytest.mark.parametrize("end", [None, 1])
@pytest.mark.parametrize("shard_bytes", [100_000, 64 << 20])
def test_shards_hold_the_tokens_of_the_documents_in_order(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, shard_bytes: int, end: int | None
):
    options = {"begin": 0, "end": end, "workers": 1, "shard_bytes": shard_bytes}
    corpus = tokenise([text], tokenizer, tmp_path, **options)
    training, held_out = in_memory([text], tokenizer, end=end)
    assert all_of(corpus.training) == training
    assert all_of(corpus.held_out) == held_out
    assert corpus.training.documents + corpus.held_out.documents == 60
    sides = hold_out(read_documents([text]))
    for side, source in zip(sides, corpus, strict=True):
        assert source.text_bytes == sum(len(document.text.encode()) for document in side)
    shards = len(list(tmp_path.glob("shard-*.json")))
    assert shards == 1 if shard_bytes > 1 << 20 else shards > 5
    assert not list(tmp_path.glob("*.part"))


def test_a_file_is_raw_little_endian_tokens(text: Path, tokenizer: Tokenizer, tmp_path: Path):
    corpus = tokenise([text], tokenizer, tmp_path, begin=0, workers=1)
    raw = np.fromfile(tmp_path / "training-00000.bin", "<u2")
    assert raw.tolist() == all_of(corpus.training)
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")


def test_document_starts_are_where_the_begin_tokens_are(
    text: Path, tokenizer: Tokenizer, tmp_path: Path
):
    source = tokenise([text], tokenizer, tmp_path, begin=0, workers=1, shard_bytes=50_000).training
    tokens = source.read(0, len(source))
    expected = (tokens == 0).nonzero().flatten()
    assert source.document_starts(0, len(source)).equal(expected)
    for first, last in [(0, 1), (5, 5), (1000, 40_000), (len(source) - 3, len(source))]:
        some = expected[(expected >= first) & (expected < last)]
        assert source.document_starts(first, last).equal(some)
        assert source.read(first, last).equal(tokens[first:last])


def test_a_long_document_is_cut_where_the_tokenizer_cuts(tokenizer: Tokenizer, tmp_path: Path):
    from pellucid.train.data.documents import find_files
    from pellucid.train.data.spans import plan_spans

    book = "\n".join(document.text for document in stdlib_documents()[:25])
    chinese = "汉字 。\u3000\n\n  测试\n文本 中文\n" * 500
    for name, text in [("book.txt", book), ("chinese.txt", chinese), ("dense.txt", "é" * 999)]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        planned = plan_spans(find_files([tmp_path / name]), TextFormat(), 0, span_bytes=1000)
        pieces = [piece for span in planned.spans for piece in planned.pieces(span)]
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        if name != "dense.txt":  # no place is good there
            assert len(pieces) > 5
            joined = [token for piece in pieces for token in tokenizer.encode(piece.text)]
            assert joined == tokenizer.encode(text)


def test_of_few_documents_the_last_tenth_is_held_out_of_each(tokenizer: Tokenizer, tmp_path: Path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.txt").write_text("é one two\n" * 321, encoding="utf-8")
    (files / "b.jsonl").write_text('{"body": "äöü 123"}\n\n{"body": "second"}', encoding="utf-8")
    layout = TextFormat(text_key="body")
    for end, shard_bytes in ((None, 64 << 20), (1, 64 << 20), (1, 100)):
        folder = tmp_path / f"{end}-{shard_bytes}"
        options = {"end": end, "layout": layout, "workers": 1, "shard_bytes": shard_bytes}
        corpus = tokenise([files], tokenizer, folder, begin=0, **options)
        training, held_out = in_memory([files], tokenizer, layout, end=end)
        assert all_of(corpus.training) == training
        assert all_of(corpus.held_out) == held_out
        assert held_out.count(0) == training.count(0) == 3
        assert held_out.count(1) == training.count(1) == (0 if end is None else 3)


def test_documents_apart_by_a_separator(tokenizer: Tokenizer, tmp_path: Path):
    file = tmp_path / "stories.txt"
    stories = [f"Story {number}.\nIt ends." for number in range(50)]
    file.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    layout = TextFormat(separator="<|endoftext|>")
    assert [document.text for document in read_documents([file], layout)] == stories
    corpus = tokenise([file], tokenizer, tmp_path / "t", begin=0, layout=layout, hold_out=7)
    training, held_out = in_memory([file], tokenizer, layout, 7)
    assert (all_of(corpus.training), all_of(corpus.held_out)) == (training, held_out)
    with pytest.raises(ValueError, match="expected something that can be seen"):
        TextFormat(separator="\n")


def test_a_vocabulary_is_learnt_from_pieces_as_from_whole_documents(text: Path, tmp_path: Path):
    from pellucid.train.data.spans import plan_spans, training_texts

    documents, _ = hold_out(read_documents([text]))
    tokenizers.train_bpe((document.text for document in documents), 500, tmp_path / "documents")
    tokenizers.train_bpe(training_texts([text], TextFormat(), 40), 500, tmp_path / "pieces")
    learnt = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("documents", "pieces")]
    assert learnt[0] == learnt[1]
    some = sum(len(piece.encode()) for piece in training_texts([text], TextFormat(), 40, 200_000))
    whole = sum(file.stat().st_size for file in text.iterdir())
    assert whole > 800_000
    assert 100_000 < some < 300_000
    assert len(plan_spans([], TextFormat(), 40).spans) == 0


def test_nothing_is_held_out_with_0(text: Path, tokenizer: Tokenizer, tmp_path: Path):
    corpus = tokenise([text / "00.py"], tokenizer, tmp_path, begin=0, hold_out=0)
    whole = [0, *tokenizer.encode((text / "00.py").read_text(encoding="utf-8"))]
    assert all_of(corpus.training) == whole
    assert len(corpus.held_out) == 0


# ── Processes, kills, damage ─────────────────────────────────────────────────────────────────────


def test_what_a_killed_process_had_begun_is_cleared(text, tokenizer, tmp_path: Path):
    for name in ("index.json.0123abcd.part", "training-00000.bin.89abcdef.part", "notes.part"):
        (tmp_path / name).write_text("half")
    tokenise([text], tokenizer, tmp_path, begin=0, workers=1)
    assert [path.name for path in tmp_path.glob("*.part")] == ["notes.part"]


@pytest.mark.slow
def test_processes_write_the_same_files(text: Path, tokenizer: Tokenizer, tmp_path: Path):
    reports: list[tuple[int, int]] = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        tokenise(
            [text],
            tokenizer,
            folder,
            begin=0,
            workers=workers,
            shard_bytes=300_000,
            report=lambda done, total: reports.append((done, total)),
        )
    for file in sorted((tmp_path / "1").iterdir()):
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()
    done, total = reports[-1]
    assert done == total == sum(file.stat().st_size for file in text.iterdir())


class Killed(BaseException):
    """As if the process had ended here."""


class Mortal:
    """A tokenizer whose process ends at the so-many-th text."""

    def __init__(self, tokenizer: Tokenizer, texts: int) -> None:
        self.tokenizer, self.left = tokenizer, texts

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def encode(self, text: str) -> list[int]:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return self.tokenizer.encode(text)


def test_a_killed_run_goes_on_after_its_last_whole_shard(
    text: Path, tokenizer: Tokenizer, tmp_path: Path
):
    options = {"begin": 0, "workers": 1, "shard_bytes": 200_000}
    tokenise([text], tokenizer, tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        tokenise([text], Mortal(tokenizer, 30), folder, **options)
    done = sorted(folder.glob("shard-*.json"))
    assert 0 < len(done) < len(list((tmp_path / "whole").glob("shard-*.json")))
    with pytest.raises(ValueError, match=r"is not whole: shard-0000\d.json of \d+ shards is missi"):
        open_corpus(folder, tokenizer)
    # What a kill leaves: a half of a token file under its temporary name.
    (folder / "training-00005.bin.1.part").write_bytes(b"\0\1")
    times = {path: path.stat().st_mtime_ns for path in done}
    counter = Mortal(tokenizer, 10_000)
    tokenise([text], counter, folder, **options)
    assert 10_000 - counter.left < 60
    assert {path: path.stat().st_mtime_ns for path in done} == times
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()


def test_a_whole_folder_is_opened_and_not_tokenised_again(
    text: Path, tokenizer: Tokenizer, tmp_path: Path
):
    first = tokenise([text], tokenizer, tmp_path, begin=0, workers=1)
    again = tokenise([text], Mortal(tokenizer, 1), tmp_path, begin=0)  # one for its digest
    assert all_of(again.training) == all_of(first.training)


@pytest.mark.parametrize(
    "name", ["training-00001.bin", "held_out-00000.bin", "training-00001.starts"]
)
def test_damage_is_found_and_said_in_one_line(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, name: str
):
    options = {"begin": 0, "workers": 1, "shard_bytes": 300_000, "hold_out": 3}
    whole = tokenise([text], tokenizer, tmp_path, **options)
    expected = all_of(whole.training)
    file = tmp_path / name
    data = file.read_bytes()
    file.write_bytes(data[:-2])
    with pytest.raises(ValueError, match=rf"{name} has [\d,]+ bytes, expected .*delete .*shard-"):
        open_corpus(tmp_path, tokenizer, verify=False)
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    open_corpus(tmp_path, tokenizer, verify=False)
    with pytest.raises(ValueError, match=r"other content than was written \(SHA-256\)") as caught:
        tokenise([text], tokenizer, tmp_path, **options)
    assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        open_corpus(tmp_path, tokenizer)
    (tmp_path / f"shard-{file.stem[-5:]}.json").unlink()  # as the message says
    assert all_of(tokenise([text], tokenizer, tmp_path, **options).training) == expected


def test_shards_of_something_else_are_refused(text: Path, tokenizer: Tokenizer, tmp_path: Path):
    file = tmp_path / "some.txt"
    file.write_text("text " * 100, encoding="utf-8")
    folder = tmp_path / "tokens"
    tokenise([file], tokenizer, folder, begin=0)
    other = tokenizers.train_bpe(["abc abc"], 300, tmp_path / "bpe")
    with pytest.raises(ValueError, match="tokens was written with another tokenizer: give another"):
        tokenise([file], other, folder, begin=0)
    with pytest.raises(ValueError, match="another tokenizer"):
        open_corpus(folder, other)
    with pytest.raises(ValueError, match="written with hold_out 40, not 5"):
        tokenise([file], tokenizer, folder, begin=0, hold_out=5)
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match="holds other files of text, or they have changed since"):
        tokenise([file], tokenizer, folder, begin=0)
    (folder / "index.json").write_text('{"half', encoding="utf-8")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        open_corpus(folder, tokenizer)
    with pytest.raises(ValueError, match="holds no tokenised text"):
        open_corpus(tmp_path, tokenizer)


def test_the_digest_of_a_tokenizer_is_of_what_it_does(tokenizer: Tokenizer, tmp_path: Path):
    digest = tokenizer_digest(tokenizer)
    assert digest == tokenizer_digest(tokenizers.load(DEMO))
    assert digest == tokenizer_digest(tokenizers.load(DEMO / "tokenizer.json"))
    one = tokenizers.train_bpe(["abab cdcd"], 259, tmp_path / "one")
    two = tokenizers.train_bpe(["abab cdcd"], 260, tmp_path / "two")
    assert len({digest, tokenizer_digest(one), tokenizer_digest(two)}) == 3


def test_text_that_is_none_is_named(tokenizer: Tokenizer, tmp_path: Path):
    def tokenise_one(name: str, data: bytes):
        (tmp_path / name).write_bytes(data)
        return tokenise([tmp_path / name], tokenizer, tmp_path / f"{name}.tokens", begin=0)

    with pytest.raises(ValueError, match="no text to train on"):
        tokenise_one("empty.txt", b"")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        tokenise_one("latin.txt", b"caf\xe9")
    with pytest.raises(ValueError, match=r"a.jsonl \(line at byte 15\) is not JSON"):
        tokenise_one("a.jsonl", b'{"text": "ok"}\n{"text"\n')
    with pytest.raises(ValueError, match=r"b.jsonl .* has no text under 'text': found 'body'"):
        tokenise_one("b.jsonl", b'{"body": "ok"}\n')
    assert not list(tmp_path.rglob("*.part"))


def test_a_disk_that_is_full_is_named(
    text: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*tokens"):
        tokenise([text / "00.py"], tokenizer, tmp_path / "tokens", begin=0)


def test_text_for_every_kind_of_source_is_int64(text: Path, tokenizer: Tokenizer, tmp_path: Path):
    source = tokenise([text / "00.py"], tokenizer, tmp_path, begin=0).training
    assert source.read(3, 9).dtype == torch.int64
    assert source.read(3, 3).shape == (0,)
