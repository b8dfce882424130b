"""Two models held against each other over text, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens

from pellucid.evaluate import compare_models, scoring


def test_divergence_agreement_and_perplexities_are_those_of_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    a, b = random_model(LLAMA), random_model(CONFIGS["gpt2"], seed=1)
    with torch.no_grad():  # not too far apart
        b.embed.weight.copy_(a.embed.weight)
    windows = random_tokens(LLAMA, 7, 13)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 5 * LLAMA.vocab_size)
    found = compare_models(a, b, windows, batch=3)
    with torch.no_grad():
        p, q = (model(windows[:, :-1]).softmax(-1) for model in (a, b))
    kl = (p * (p / q).log()).sum(-1)
    chosen = windows[:, 1:, None]
    assert found == pytest.approx(
        {
            "kl_mean": kl.mean().item(),
            "kl_max": kl.max().item(),
            "top1": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
            "perplexity_a": math.exp(-p.gather(-1, chosen).log().mean().item()),
            "perplexity_b": math.exp(-q.gather(-1, chosen).log().mean().item()),
        },
        rel=1e-9,
    )


def test_a_model_agrees_with_itself_and_nearly_with_its_rounded_weights():
    model = random_model(LLAMA, torch.float32)
    windows = random_tokens(LLAMA, 3, 20)
    same = compare_models(model, model, windows)
    assert (same["kl_mean"], same["kl_max"], same["top1"]) == (0.0, 0.0, 1.0)
    assert same["perplexity_a"] == same["perplexity_b"]
    rounded = compare_models(model, random_model(LLAMA, torch.bfloat16), windows)
    assert 0 < rounded["kl_mean"] < rounded["kl_max"] < 0.5
    assert rounded["top1"] > 0.8


def test_models_of_different_vocabularies_are_refused():
    from dataclasses import replace

    other = random_model(replace(GPT, vocab_size=98))
    with pytest.raises(ValueError, match="vocabularies of 97 and 98 tokens"):
        compare_models(random_model(LLAMA), other, random_tokens(LLAMA, 1, 5))
