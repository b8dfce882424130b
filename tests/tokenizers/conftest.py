"""Small tokenizers of every kind, made here, so that these tests need no asset."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import textbook_bpe
from tokenizer_samples import CORPUS

from pellucid import tokenizers
from pellucid.tokenizers import bytelevel, llama3, sentence_piece


@pytest.fixture(scope="session")
def small_ranks() -> dict[bytes, int]:
    return textbook_bpe.train(CORPUS, bytelevel.LLAMA3_SPLIT.pattern, merges=150)


@pytest.fixture(scope="session")
def small_llama3(small_ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
    return llama3.from_ranks(small_ranks)


@pytest.fixture(scope="session")
def small_piece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with Llama 2's settings."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 3),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def small_pieces(small_piece_file: Path) -> tokenizers.Tokenizer:
    return sentence_piece.from_file(small_piece_file)


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tokenizers.train_bpe([CORPUS] * 3, 400, folder)
    return folder


@pytest.fixture(scope="session")
def trained(trained_folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.load(trained_folder)


@pytest.fixture(params=["small_llama3", "small_pieces", "trained"])
def small(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    """One tokenizer per engine."""
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True, scope="session")
def _quiet_library() -> None:
    # The tokenizers library warns when a process that used its threads is forked by another test.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
