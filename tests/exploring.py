"""Runs of random models for the tests of the explorer, and each of their elements' places."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from tiny import random_model, random_tokens

import pellucid
from pellucid import tokenizers
from pellucid.explore import ExploredRun, Runs
from pellucid.language_model import LanguageModel
from pellucid.models import Config
from pellucid.tokenizers import Tokenizer

TEXT = ["the cat sat on the mat and the cat ran … naïve 日本"] * 9


@cache
def tokenizer() -> Tokenizer:
    """A byte-pair tokenizer of about 300 tokens."""
    return tokenizers.train_bpe(TEXT, 300, Path(mkdtemp()) / "bpe")


def language_model(config: Config, dtype=torch.float32, dialect: str = "hf") -> LanguageModel:
    """A random model of any config."""
    return LanguageModel(random_model(config, dtype, dialect), tokenizer())


def tiny_run(
    config: Config, dtype=torch.float32, dialect: str = "hf", tokens: int = 9
) -> ExploredRun:
    """A run of random tokens."""
    runs = Runs({"tiny": language_model(config, dtype, dialect)})
    return runs.run("tiny", random_tokens(config, tokens).tolist())


def elements(run: ExploredRun, name: str, count: int = 3) -> Iterator[str]:
    """Addresses of a few elements of a tensor, the same at each call."""
    chance = random.Random(name)
    for _ in range(count):
        places = [chance.randrange(size) for size in run.shape(name)]
        yield f"{name}[{','.join(map(str, places))}]"


def repeated(text: str, lm) -> dict:
    """What the text leaves behind, with `lm` in place of a loaded model."""
    scope: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pellucid, "load", lambda *words, **more: lm)
        exec(text, scope)
    return scope
