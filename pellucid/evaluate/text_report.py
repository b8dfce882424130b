"""A language model over text, as one report: the call behind ``pellucid eval --text``.

lm = pellucid.load("demo")
report = text_report(lm, read_texts(["notes.txt"]), context=256)
report["perplexity"], report["bits_per_byte"]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pellucid.evaluate.agreement import compare_models
from pellucid.evaluate.text import Report, encode_texts, evaluate_texts
from pellucid.train import TextFormat, held_out_windows, hold_out, read_documents, stdlib_documents
from pellucid.train.data.documents import note_spelt_specials

if TYPE_CHECKING:
    from pellucid.language_model import LanguageModel

LONGEST_DEFAULT = 2048  # tokens: a context of 131,072 is seldom meant, and costs its square


def read_texts(
    paths: Sequence[str | Path], *, layout: TextFormat | None = None, limit: int | None = None
) -> list[str]:
    """The texts of files, of folders of files, and of the lines of JSON files.

    layout  the key of the text in those lines, and what stands between documents of a text file
    limit  the first so many of them. ValueError where there is none, OSError for an absent file.
    """
    documents = read_documents([str(path) for path in paths], layout)
    if not documents:
        named = " ".join(map(str, paths))
        raise ValueError(f"no text in {named}: expected files with text in them")
    return [document.text for document in documents[:limit]]


def stdlib_texts(limit: int | None = None) -> list[str]:
    """The modules of Python's standard library that ``pellucid train --stdlib`` does not train on.

    limit  the first so many of them
    """
    _, documents = hold_out(stdlib_documents())
    return [document.text for document in documents[:limit]]


def text_report(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch: int = 8,
    against: LanguageModel | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte over texts; the object of ``pellucid eval --json``.

    context   tokens in view; None: the model's context, 2048 at most
    stride    tokens between windows; None: half of the context
    batch     windows in a pass
    against   a model with the same tokenizer: adds how far its predictions are from those of `lm`
    progress  called with tokens scored so far and all to score

    ``loss`` is in nats per token. Raises ValueError for a context or stride that the model cannot
    take, text without a token to score, and two models of different tokenizers.
    """
    longest = min(lm.config.context_length, LONGEST_DEFAULT)
    context = longest if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    if against is not None:
        _check_tokenizers(lm, against, texts[0])
    began = time.perf_counter()
    note_spelt_specials(texts, lm.tokenizer)
    encoded = encode_texts(lm.tokenizer, texts)
    score = evaluate_texts(
        lm.model, encoded, context=context, stride=stride, batch=batch, report=progress
    )
    seconds = time.perf_counter() - began
    report = {
        "model": lm.name,
        "texts": len(encoded),
        "tokens": score.tokens,
        "bytes": score.text_bytes,
        "context": context,
        "stride": stride,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "seconds": seconds,
        "tokens_per_second": score.tokens / seconds,
    }
    if against is not None:
        shared = min(context, against.config.context_length)
        line = torch.tensor(list(chain.from_iterable(text.ids for text in encoded)))
        windows = held_out_windows(line, shared)  # (N, shared + 1), side by side
        agreement = compare_models(lm.model, against.model, windows, batch=4)
        report["against"] = {"model": against.name, **agreement}
    return report


def _check_tokenizers(lm: LanguageModel, other: LanguageModel, text: str) -> None:
    if other.tokenizer.encode(text) != lm.tokenizer.encode(text):
        raise ValueError(f"{other.name} has another tokenizer than {lm.name}: nothing to compare")
