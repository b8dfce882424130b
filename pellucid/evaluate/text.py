"""How well a model predicts text: loss, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pellucid.evaluate.scoring import score_rows
from pellucid.evaluate.windows import batch_windows, sliding_windows
from pellucid.models import Model, evaluating
from pellucid.tokenizers import Tokenizer

Report = Callable[[int, int], None]


class EncodedText(NamedTuple):
    """Token ids of a text, and the bytes of it that the tokens after the first stand for."""

    ids: list[int]
    text_bytes: int


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """What a model makes of some text.

    nats        sum of −ln p(token | tokens before it) over the scored tokens
    tokens      how many were scored
    text_bytes  bytes of UTF-8 that they stand for
    """

    nats: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e^loss: among how many equally likely tokens the model is in doubt; of one tokenizer."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, comparable between models of different tokenizers."""
        return self.nats / math.log(2) / self.text_bytes


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> list[EncodedText]:
    """Token ids of texts, each behind the token that begins a text, so that all of it is scored.

    That is the tokenizer's begin token, else the one that ends a text. Where there is neither, the
    first token of a text is context only and its bytes do not count.
    """
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    encoded = []
    for text in texts:
        ids, size = tokenizer.encode(text), len(text.encode("utf-8", "replace"))
        if begin is None:
            encoded.append(EncodedText(ids, size - len(tokenizer.decode_bytes(ids[:1]))))
        else:
            encoded.append(EncodedText([begin, *ids], size))
    return encoded


def evaluate_texts(
    model: Model,
    texts: Sequence[EncodedText],
    *,
    context: int,
    stride: int,
    batch: int = 4,
    report: Report | None = None,
) -> TextScore:
    """Loss over texts; each token but a text's first is scored once, in a sliding window.

    context  tokens in view; stride  tokens between windows: at least context - stride + 1 tokens
             stand before each scored one
    batch    windows in one pass
    report   called with tokens scored so far and all to score, after each pass

    Sums are in float64. Raises ValueError where there is no token to score, for a context that is
    longer than the model's and for tokens outside its vocabulary.
    """
    ids = [text.ids for text in texts]
    check(model, ids, context)
    total, nats, done = sum(max(0, len(text) - 1) for text in ids), 0.0, 0
    if not total:
        raise ValueError("no token to score: expected text of two tokens or more")
    windows = sliding_windows([len(text) for text in ids], context, stride)
    with evaluating(model):
        for rows in batch_windows(ids, windows, batch):
            losses, _ = score_rows(model, rows)
            nats += losses.double().sum().item()
            done += len(losses)
            if report:
                report(done, total)
    text_bytes = sum(text.text_bytes for text in texts)
    return TextScore(nats=nats, tokens=done, text_bytes=text_bytes)


def token_losses(
    model: Model, texts: Sequence[Sequence[int]], *, context: int, stride: int, batch: int = 4
) -> list[Tensor]:
    """−ln p of each token of each text but the first, in nats, on the CPU: a tensor (n - 1) each.

    Raises ValueError as `evaluate_texts` does; a text of one token gives an empty tensor.
    """
    check(model, texts, context)
    found = [torch.zeros(max(0, len(text) - 1), dtype=torch.float64) for text in texts]
    windows = sliding_windows([len(text) for text in texts], context, stride)
    with evaluating(model):
        for rows in batch_windows(texts, windows, batch):
            losses, _ = score_rows(model, rows)
            for (text, place), loss in zip(rows.places, losses.tolist(), strict=True):
                found[text][place - 1] = loss
    return found


def check(model: Model, texts: Sequence[Sequence[int]], context: int) -> None:
    """ValueError for a context or tokens that the model cannot take."""
    longest, size = model.config.context_length, model.config.vocab_size
    if not 1 <= context <= longest:
        raise ValueError(f"a context of {context} tokens: expected 1 to the model's {longest}")
    for ids in texts:
        if ids and not 0 <= min(ids) <= max(ids) < size:
            raise ValueError(
                f"token {max(ids)} is outside the model's vocabulary of {size}: do the model and "
                "the tokenizer belong together?"
            )
