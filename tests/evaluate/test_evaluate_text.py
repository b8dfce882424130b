"""Loss over text in a sliding window, against one pass for each token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import CONFIGS, LLAMA, random_model, random_tokens

from pellucid import tokenizers
from pellucid.evaluate import (
    TextScore,
    encode_texts,
    evaluate_texts,
    scoring,
    sliding_windows,
    token_losses,
)
from pellucid.evaluate.text import EncodedText
from pellucid.models import Model


def worked_out(model: Model, ids: list[int], context: int, stride: int) -> list[float]:
    """−ln p of each token but the first, each from a pass of its own over what its window shows."""
    losses = []
    for place in range(1, len(ids)):
        if place <= context:
            last = context  # of the first window
        else:
            last = context + math.ceil((place - context) / stride) * stride
        last = min(last, len(ids) - 1)
        seen = ids[max(0, last - context) : place]
        logits = model(torch.tensor([seen]))[0, -1]
        losses.append(-float(logits.double().log_softmax(-1)[ids[place]]))
    return losses


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (5, 2), (64, 64)])
def test_each_token_is_scored_once_in_its_window(family: str, context: int, stride: int):
    model = random_model(CONFIGS[family])
    texts = [random_tokens(LLAMA, n, seed=n).tolist() for n in (23, 1, 2, 9, 8, 64)]
    found = token_losses(model, texts, context=context, stride=stride, batch=3)
    with torch.no_grad():
        for ids, losses in zip(texts, found, strict=True):
            expected = worked_out(model, ids, context, stride)
            assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    encoded = [EncodedText(ids, 10) for ids in texts]
    score = evaluate_texts(model, encoded, context=context, stride=stride, batch=2)
    assert score.nats == pytest.approx(sum(float(some.sum()) for some in found), abs=1e-9)
    assert (score.tokens, score.text_bytes) == (sum(map(len, texts)) - len(texts), 60)


@pytest.mark.parametrize("context", [1, 4, 7])
def test_windows_score_every_token_once_with_the_context_that_the_stride_promises(context: int):
    for stride in range(1, context + 1):
        for length in range(25):
            scored: list[int] = []
            for text, start, stop, first in sliding_windows([0, length], context, stride):
                assert text == 1
                assert 0 <= start <= first < stop < length
                assert stop - start == min(context, length - 1)
                for place in range(first + 1, stop + 1):
                    assert place - start >= min(place, context - stride + 1)
                scored += range(first + 1, stop + 1)
            assert scored == list(range(1, length))


def test_windows_are_those_of_the_drawing():
    windows = list(sliding_windows([11], 4, 2))
    assert [window.start for window in windows] == [0, 2, 4, 6]
    assert [range(window.first + 1, window.stop + 1) for window in windows] == [
        range(1, 5),
        range(5, 7),
        range(7, 9),
        range(9, 11),
    ]


def test_chunks_of_logits_and_the_mode_leave_no_trace(monkeypatch: pytest.MonkeyPatch):
    model = random_model(LLAMA).train()
    texts = [random_tokens(LLAMA, 40).tolist()]
    before = token_losses(model, texts, context=16, stride=8)
    assert model.training
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 3 * LLAMA.vocab_size)
    assert torch.allclose(
        token_losses(model, texts, context=16, stride=8)[0], before[0], atol=1e-12
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_is_reported_to_the_end():
    reports: list[tuple[int, int]] = []
    texts = [EncodedText(random_tokens(LLAMA, 30).tolist(), 1)]
    evaluate_texts(
        random_model(LLAMA),
        texts,
        context=8,
        stride=4,
        batch=1,
        report=lambda done, total: reports.append((done, total)),
    )
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1] == (29, 29)


def test_the_three_numbers_of_a_score():
    score = TextScore(nats=8 * math.log(2), tokens=4, text_bytes=16)
    assert score.loss == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4)
    assert score.bits_per_byte == pytest.approx(0.5)
    assert TextScore(nats=1e4, tokens=1, text_bytes=1).perplexity == math.inf


def test_a_text_begins_with_its_begin_token_so_that_all_its_bytes_count(tmp_path):
    tokenizer = tokenizers.train_bpe(["ä b c ab ab"], 262, tmp_path)
    [text, other] = encode_texts(tokenizer, ["ab ä", ""])
    assert text.ids == [0, *tokenizer.encode("ab ä")]
    assert text.text_bytes == 5
    assert other == EncodedText([0], 0)
    tokenizer.bos_id = tokenizer.eos_id = None
    [text, other] = encode_texts(tokenizer, ["ab ä", ""])
    assert text.ids == tokenizer.encode("ab ä")
    assert text.text_bytes == 5 - len(tokenizer.decode_bytes(text.ids[:1]))
    assert other == EncodedText([], 0)


def test_what_cannot_be_scored_is_refused_in_one_line():
    model = random_model(LLAMA)

    def score(ids: list[int], context: int = 8, stride: int = 8) -> TextScore:
        return evaluate_texts(model, [EncodedText(ids, 1)], context=context, stride=stride)

    with pytest.raises(ValueError, match="no token to score: expected text of two tokens"):
        score([1])
    with pytest.raises(ValueError, match="a context of 65 tokens: expected 1 to the model's 64"):
        score([1, 2], context=65)
    with pytest.raises(ValueError, match="a stride of 9 tokens: expected 1 to the context of 8"):
        score([1, 2], stride=9)
    with pytest.raises(ValueError, match="token 97 is outside the model's vocabulary of 97"):
        score([1, 97])
