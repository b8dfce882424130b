"""Guessed tokens: the same text, bit for bit, by fewer passes over the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, FEATURES, random_model

from pellucid.generate import KeptCache, Sampling, generate_tokens, native
from pellucid.generate.fast import FastSteps
from pellucid.generate.lookup import Lookup, PassTimes

GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.05)
PROMPT = [5, 6, 7, 8, 9, 10, 11] * 3


@pytest.fixture(autouse=True)
def built():
    native.library()


def guess_from(monkeypatch, right):
    """Guess seven tokens of `right`, in every third pass one of them wrong; the passes that ran."""
    passes, plain = [], FastSteps.step_ahead

    def guess(self, text, most):
        tokens = list(right[len(text) : len(text) + min(most, 7)])
        if len(passes) % 3 == 2 and len(tokens) > 3:
            tokens[3] = (tokens[3] + 1) % 90
        return tokens

    def counted(self, tokens, cache):
        passes.append(len(tokens))
        return plain(self, tokens, cache)

    monkeypatch.setattr(Lookup, "guess", guess)
    monkeypatch.setattr(FastSteps, "step_ahead", counted)
    return passes


def written(model, lookup, sampling=GREEDY, tokens=40, **options):
    """The tokens, the logits of each step, and how many had been guessed."""
    generation = generate_tokens(
        model, [PROMPT], sampling=sampling, max_new_tokens=tokens, seed=3, fast=True, lookup=lookup,
        **options,
    )  # fmt: skip
    found, logits = [], []
    for (token,) in generation:
        found.append(token)
        logits.append(generation.logits.clone())
    return found, torch.cat(logits), generation.guessed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "like gemma2", "sinks"])
def test_the_same_text_and_bits_by_fewer_passes(kind, sampling, dtype, monkeypatch):
    model = random_model({**CONFIGS, **FEATURES}[kind], dtype)
    plain, bits, none = written(model, False, sampling)
    passes = guess_from(monkeypatch, PROMPT + plain)
    text, guessed_bits, guessed = written(model, True, sampling)
    assert text == plain
    assert torch.equal(guessed_bits, bits)
    assert none == 0 < guessed
    assert len(passes) == 39 - guessed < 12  # the first of 40 is the prompt's


def test_no_pass_runs_past_the_context_before_it_slides(monkeypatch):
    config = replace(CONFIGS["llama-gqa"], context_length=len(PROMPT) + 20)
    model = random_model(config, torch.float32)
    plain, bits, _ = written(model, False, slide=True)
    passes = guess_from(monkeypatch, PROMPT + plain)
    text, guessed_bits, guessed = written(model, True, slide=True)
    assert text == plain and torch.equal(guessed_bits, bits)
    assert guessed and sum(passes) - 4 * (len(passes) // 3) <= 20  # what a wrong guess undid


def test_until_the_compiler_is_done_every_token_is_a_pass_of_the_model(monkeypatch):
    model, asked = random_model(CONFIGS["llama-gqa"], torch.float32), []

    def not_yet(self, tokens, cache):
        asked.append(tokens)
        assert len(asked) < 9, "asked again and again"

    options = {"sampling": GREEDY, "max_new_tokens": 8}
    plain = [token for (token,) in generate_tokens(model, [PROMPT], fast=False, **options)]
    monkeypatch.setattr(FastSteps, "step_ahead", not_yet)
    monkeypatch.setattr(FastSteps, "_ready_decoder", lambda self: None)
    assert [token for (token,) in generate_tokens(model, [PROMPT], **options)] == plain
    assert len(asked) == 7  # after the prompt's own


def test_what_a_pass_took_is_noted_under_its_tokens(monkeypatch):
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    plain, *_ = written(model, False)
    noted, took = [], PassTimes.took
    monkeypatch.setattr(
        PassTimes, "took", lambda self, *told: (noted.append(told), took(self, *told))
    )
    passes = guess_from(monkeypatch, PROMPT + plain)
    written(model, True)
    assert [tokens for tokens, _ in noted] == passes
    assert all(seconds > 0 for _, seconds in noted)
    assert max(passes) == 8  # seven guesses and the token before them


def test_a_kept_cache_holds_no_token_that_was_only_guessed(monkeypatch):
    model, kept = random_model(CONFIGS["llama-gqa"], torch.float32), KeptCache()
    plain, *_ = written(model, False, tokens=20)
    guess_from(monkeypatch, PROMPT + plain)
    first, *_ = written(model, True, tokens=9, kept=kept)
    longer = [*PROMPT, *first, 3, 4, 5]
    options = {"sampling": GREEDY, "max_new_tokens": 8, "fast": True}
    again = [token for (token,) in generate_tokens(model, [longer], kept=kept, **options)]
    alone = [token for (token,) in generate_tokens(model, [longer], lookup=False, **options)]
    assert again == alone


def test_text_that_does_not_repeat_is_not_guessed():
    lookup = Lookup()
    lookup.times.took(1, 1.0)
    assert lookup.guess(list(range(50)), 9) == []


def test_a_guess_is_what_followed_the_longest_stretch_of_the_texts_end():
    lookup = Lookup()
    lookup.times.took(1, 1.0)
    long = [1, 2, 3, 4, 5, 6, 7, 8]
    text = [*long, 20, 21, 22, 6, 7, 8, 30, 31, 32, *long]
    assert lookup.guess(text, 3) == [20, 21, 22]


def test_guesses_end_where_they_cost_more_than_they_bring():
    lookup = Lookup()
    for tokens, seconds in ((1, 1.0), (2, 1.9), (4, 3.8), (8, 7.9), (16, 16.0)) * 9:
        lookup.times.took(tokens, seconds)
    assert lookup.guess([1, 2, 3, 4] * 4, 15) == []  # half of them right, nearly at full price
    cheap = Lookup()
    for tokens in (1, 2, 4, 8, 16):
        cheap.times.took(tokens, 1.0)
    assert len(cheap.guess([1, 2, 3, 4] * 5, 15)) > 1


def test_wrong_guesses_are_given_up_and_right_ones_come_back():
    lookup = Lookup()
    for tokens, seconds in ((1, 1.0), (2, 1.3), (4, 1.6)):
        lookup.times.took(tokens, seconds)
    text = [1, 2, 3]
    for number in range(40):  # after each `1 2 3` comes something else
        text += [100 + number, 1, 2, 3]
        lookup.guess(text, 3)
    assert lookup.guess(text, 3) == []
    for _ in range(40):
        text += [7, 8, 9, 10]
        lookup.guess(text, 3)
    assert lookup.guess(text, 3) == [7, 8, 9]
