"""Scores of texts in shared passes: the model's numbers, and the same bits in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, FEATURES, random_model

from pellucid.generate import Sampling, Together, score_texts
from pellucid.generate.prefixes import PIECE
from pellucid.models.quantised import Format, quantise

LENGTHS = (2, 9, 40, PIECE + 30)


def model_of(kind: str = "llama-gqa", dtype: torch.dtype = torch.float32, bits: int = 0):
    config = {**CONFIGS, **FEATURES}[kind]
    model = random_model(replace(config, context_length=PIECE + 64), dtype)
    return quantise(model, Format(bits=bits, group=32)) if bits else model


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def by_hand(model, ids: list[int]) -> list[float]:
    found = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return found[torch.arange(len(ids) - 1), ids[1:]].tolist()


@pytest.mark.parametrize(
    ("kind", "dtype", "bits", "fast", "atol"),
    [
        ("llama-gqa", torch.float32, 0, True, 1e-5),
        ("llama-gqa", torch.float64, 0, None, 1e-12),
        ("gpt2", torch.bfloat16, 0, True, 0.1),
        ("llama-gqa", torch.float32, 8, True, 1e-4),
        ("llama-gqa", torch.float32, 8, False, 1e-5),
        ("longrope", torch.float32, 0, True, 1e-5),
    ],
)
def test_scores_are_the_models_and_do_not_follow_the_company(kind, dtype, bits, fast, atol):
    """Alone, all at once, from a later token on, and after a text that begins alike."""
    model = model_of(kind, dtype, bits)
    texts = [ids_of(length, length) for length in LENGTHS]
    texts += [[*texts[-1][:-5], 1, 2, 3], [*texts[2][:-1], 7]]
    alone = [score_texts(model, [(ids, 1)], top=3, fast=fast)[0] for ids in texts]
    for ids, scored in zip(texts, alone, strict=True):
        assert [one.id for one in scored] == ids[1:]
        torch.testing.assert_close(
            [one.logprob for one in scored], by_hand(model, ids), atol=atol, rtol=0
        )
        assert all(one.top[0][1] >= one.top[1][1] >= one.top[2][1] for one in scored)
    assert score_texts(model, [(ids, 1) for ids in texts], top=3, at_once=4, fast=fast) == alone
    ends = [(ids, len(ids) - len(ids) // 5 - 1) for ids in texts if len(ids) > 2]
    found = score_texts(model, ends, top=3, at_once=2, fast=fast)
    assert found == [
        scored[first - 1 :] for scored, (_, first) in zip(alone[1:], ends, strict=True)
    ]


def test_the_number_of_threads_changes_nothing_in_c(monkeypatch):
    model, found = model_of("llama-gqa", bits=8), []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(score_texts(model, [(ids_of(length), 1) for length in LENGTHS], fast=True))
    assert found[0] == found[1]


def test_what_texts_begin_with_is_read_once_where_it_can_be():
    begin, model = ids_of(100), model_of("llama-gqa", bits=8)
    together = Together(model, fast=True)
    for number in range(3):
        row = together.score([*begin, *ids_of(7, number)], 100)
        together.join(row)
        while not row.ready:
            together.step()
        together.leave(row)
    assert together.prefixes.reused == 2 * 99


def test_scores_and_generations_share_steps_without_a_change():
    model, ids = model_of(), ids_of(30)
    together = Together(model, fast=True)
    texts = [ids_of(length, length) for length in LENGTHS]
    run = together.generate(ids, sampling=Sampling(temperature=0.0), max_new_tokens=9)
    rows = [together.score(text) for text in texts]
    for row in (run, *rows):
        together.join(row)
    written = []
    while run.is_live(0) or not all(row.ready for row in rows):
        together.step()
        written += next(run) if run.ready and run.is_live(0) else []
    alone = Together(model, fast=True).generate(
        ids, sampling=Sampling(temperature=0.0), max_new_tokens=9
    )
    assert written == [token for (token,) in alone]
    assert [row.scores for row in rows] == score_texts(model, [(t, 1) for t in texts], fast=True)


def test_what_cannot_be_scored_says_so():
    model = model_of()
    with pytest.raises(ValueError, match="a score of token 0 of 3: expected one with a context"):
        score_texts(model, [([1, 2, 3], 0)])
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the loss is not a number .*down_proj"):
        score_texts(model, [([1, 2, 3], 1)])
