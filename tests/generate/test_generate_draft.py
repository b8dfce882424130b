"""Drafted tokens: greedy text bit for bit, drawn text from exactly the model's own distribution."""

from __future__ import annotations

import itertools
import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, FEATURES, random_model

import pellucid
from pellucid.cli import main
from pellucid.generate import Sampling, Together, draft, generate_tokens, native
from pellucid.generate.draft import Draft, Guess, is_copy
from pellucid.generate.fast import FastSteps
from pellucid.generate.lookup import PassTimes
from pellucid.generate.sample import accept_or_draw, probabilities, warp
from pellucid.models.quantised import Format, quantise

GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(autouse=True)
def built():
    native.library()


def near(model, amount=0.2):
    """A draft that often, but not always, says what the model says."""
    other = deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += (amount * weight.float().std().nan_to_num() * noise).to(weight.dtype)
    return other


@pytest.fixture
def always(monkeypatch):
    """As many drafted tokens as fit, up to three in each pass."""
    monkeypatch.setattr(PassTimes, "best", lambda self, most, right, each=0.0: min(most, 3))


def written(model, draft, sampling=GREEDY, tokens=40, **options):
    run = generate_tokens(
        model, [PROMPT], sampling=sampling, max_new_tokens=tokens, seed=3, fast=True, lookup=False,
        draft=draft, **options,
    )  # fmt: skip
    found = [(token, run.logits.clone()) for (token,) in run]
    return [token for token, _ in found], torch.cat([logits for _, logits in found]), run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "like gemma2", "sinks"])
def test_greedy_text_and_its_logits_are_those_of_plain_decoding(kind, dtype, always):
    model = random_model({**CONFIGS, **FEATURES}[kind], dtype)
    plain, bits, none = written(model, None)
    assert none.proposed == 0
    guessed = proposed = 0
    for amount in (0.1, 2.0):
        text, drafted_bits, run = written(model, near(model, amount))
        assert text == plain
        assert torch.equal(drafted_bits, bits)
        guessed, proposed = guessed + run.guessed, proposed + run.proposed
    assert 0 < guessed <= proposed
    assert guessed < proposed or kind == "like gemma2"  # which repeats one token, as any draft does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_in_fewer_bits_reads_the_models_own_cache(dtype, always, monkeypatch):
    model = random_model(CONFIGS["llama-gqa"], dtype)
    copy, read = quantise(deepcopy(model), Format(bits=4, group=32)), []
    steps = FastSteps.read
    monkeypatch.setattr(
        FastSteps, "read",
        lambda self, tokens, cache: read.append(len(tokens)) or steps(self, tokens, cache),
    )  # fmt: skip
    plain, bits, _ = written(model, None)
    text, drafted_bits, run = written(model, copy)
    assert text == plain
    assert torch.equal(drafted_bits, bits)
    assert 0 < run.guessed < run.proposed == len(read)
    assert set(read) == {1}, "it never reads the prompt"
    assert is_copy(model, copy) and not is_copy(model, near(model))


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The statistic over its degrees of freedom, cells of less than five expected joined."""
    few = expected < 5
    if expected[few].sum() > 0:
        counts = torch.cat([counts[~few], counts[few].sum()[None]])
        expected = torch.cat([expected[~few], expected[few].sum()[None]])
    else:
        counts, expected = counts[~few], expected[~few]
    return float(((counts - expected) ** 2 / expected).sum()) / (len(counts) - 1)


def test_an_accepted_or_redrawn_token_has_the_models_distribution():
    """Draft and model nearly disagree, so that any other rule would show."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, 1.5]])
    other = torch.tensor([[-1.0, 1.0, 2.0, 0.0, 0.0, -3.0]])
    sampling = Sampling(temperature=0.9, top_k=5)
    p, q = (probabilities(warp(one, sampling))[0] for one in (logits, other))
    generator, draws = torch.Generator().manual_seed(0), 1500
    proposed = torch.multinomial(q, draws, replacement=True, generator=generator).tolist()
    chosen = [accept_or_draw(logits, sampling, generator, None, token, q) for token in proposed]
    counts = torch.bincount(torch.tensor(chosen), minlength=6).double()
    assert counts[3] == 0  # top_k rules it out, whatever the draft says
    assert chi_square(counts, p * draws) < 2.5
    assert chi_square(torch.bincount(torch.tensor(proposed), minlength=6).double(), p * draws) > 100


def test_drawn_texts_have_the_models_distribution(always):
    """All texts of three tokens over four ids, against the product of their probabilities."""
    config = replace(CONFIGS["llama-gqa"], vocab_size=4, n_layers=1)
    model = random_model(config, torch.float32)
    sampling, prompt = Sampling(temperature=0.7), [1, 2]
    texts = list(itertools.product(range(4), repeat=3))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *text] for text in texts]))[:, 1:4]
    each = (logits / 0.7).softmax(-1).gather(-1, torch.tensor(texts)[..., None])[..., 0]
    expected = each.double().prod(-1)
    shared = {"fast": FastSteps(model, 8, True), "draft": FastSteps(near(model, 1.0), 8, True)}
    counts, drawn, proposed, guessed = torch.zeros(64).double(), 250, 0, 0
    for seed in range(drawn):
        run = generate_tokens(
            model, [prompt], sampling=sampling, max_new_tokens=3, seed=seed, lookup=False, **shared
        )
        counts[texts.index(tuple(token for (token,) in run if token is not None))] += 1
        proposed, guessed = proposed + run.proposed, guessed + run.guessed
    assert 0.2 < guessed / proposed < 0.95
    assert chi_square(counts, expected * drawn) < 1.6


@pytest.fixture
def small(monkeypatch):
    """Whatever the draft, it counts as having a tenth of the model's weights."""
    sizes = iter([1, 10] * 9)
    monkeypatch.setattr(draft, "weight_bytes", lambda model: next(sizes))


def test_a_seed_means_the_same_text_however_long_passes_take(small, monkeypatch):
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    found = []
    for each in (0.0, 50.0):
        monkeypatch.setattr(
            PassTimes, "took", lambda self, n, s, e=each: self._seconds.update({n: 1 + e * n})
        )
        text, _, run = written(model, near(model), DRAWN)
        assert run.guessed > 0
        found.append(text)
    assert found[0] == found[1] != written(model, None, DRAWN)[0]


def test_a_draft_that_is_never_right_is_left_alone(small, monkeypatch):
    model = random_model(replace(CONFIGS["llama-gqa"], context_length=600), torch.float32)
    plain, *_ = written(model, None, tokens=500)

    def wrong(self, text, seen, cache):
        return Guess((([*PROMPT, *plain, 0])[len(text)] + 1) % 90, "draft")

    monkeypatch.setattr(Draft, "_next", wrong)
    monkeypatch.setattr(PassTimes, "took", lambda self, n, s: self._seconds.update({n: 1.0}))
    text, _, run = written(model, near(model), tokens=500)
    assert text == plain
    assert run.guessed == 0 < run.proposed < 200


def test_it_ends_with_the_text_and_with_the_drafts_own_context(always):
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    short = random_model(replace(CONFIGS["llama-gqa"], context_length=16), torch.float32)
    plain, *_ = written(model, None, tokens=27)
    text, _, run = written(model, short, tokens=27)
    assert text == plain
    assert 0 < run.proposed <= 3 * (16 - len(PROMPT))


def test_a_vocabulary_padded_to_another_size(always):
    config = CONFIGS["llama-gqa"]
    model = random_model(config, torch.float32)
    for size in (config.vocab_size - 8, config.vocab_size + 8):
        other = random_model(replace(config, vocab_size=size), torch.float32)
        options = {"vocab_size": config.vocab_size - 10}
        for sampling in (GREEDY, DRAWN):
            text, _, run = written(model, other, sampling, tokens=12, **options)
            assert run.proposed > 0
            assert max(text) < config.vocab_size - 10


def test_a_request_alone_is_drafted_and_one_of_several_is_not(always):
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    options = {"sampling": GREEDY, "max_new_tokens": 12}
    together = Together(model, fast=True, draft=near(model))
    plain, *_ = written(model, None, tokens=12)
    first, second = (together.generate(PROMPT, **options) for _ in range(2))
    together.join(first)
    texts = {first: [], second: []}
    for _ in range(60):
        together.step()
        for run, text in texts.items():
            if run.ready:
                text += next(run)
        if len(texts[first]) == 6 and second not in together:
            alone = first.proposed
            together.join(second)
        for run in texts:
            if not run.is_live(0):
                together.leave(run)
    assert texts[first] == texts[second] == plain
    assert alone > 0
    assert first.proposed == alone, "it drafted beside another"


def test_what_cannot_be_drafted_is_said_in_one_line():
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    with pytest.raises(ValueError, match=r"^a draft is checked by the decoder in C[^\n]*$"):
        generate_tokens(model, [PROMPT], sampling=GREEDY, fast=False, draft=model)
    wide = random_model(CONFIGS["llama-gqa"], torch.float64)
    for pair in ((model, wide), (wide, model)):
        with pytest.raises(ValueError, match=r"^a draft needs both models decoded in C[^\n]*$"):
            generate_tokens(pair[0], [PROMPT], sampling=GREEDY, draft=pair[1])
    lm = pellucid.load("stdlib")
    with pytest.raises(ValueError, match=r"^the draft has another tokenizer \(token [^\n]*$"):
        lm.generate("a", draft="demo")
    with pytest.raises(ValueError, match="quantised already"):
        pellucid.LanguageModel(lm.draft_model("int8"), lm.tokenizer).draft_model("int4")


def test_generate_says_which_tokens_were_drafted(always, capsys):
    command = ["generate", "import ", "-m", "stdlib", "-n", "24", "--temperature", "0", "--json"]
    main(command)
    plain = json.loads(capsys.readouterr().out)
    main([*command, "--draft", "int8"])
    drafted = json.loads(capsys.readouterr().out)
    assert drafted["tokens"] == plain["tokens"]
    assert not {"drafted", "looked_up", "proposed"} & set(plain)
    places = {*drafted["drafted"], *drafted["looked_up"]}
    assert drafted["drafted"] and places < set(range(24))
    assert len(drafted["drafted"]) <= drafted["proposed"]
    lm = pellucid.load("stdlib", dtype="float32")
    assert lm.draft_model("stdlib").dtype == torch.float32, "a draft computes in the model's dtype"
    options = {"max_new_tokens": 24, "temperature": 0.0}
    assert lm.generate("import ", draft=lm, **options) == lm.generate("import ", **options)
