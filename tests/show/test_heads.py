"""Head scores on patterns drawn by hand, on a trace, and on a model that has learnt nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import GPT, LLAMA, random_model

from pellucid.evaluate.heads import (
    head_scores,
    induction_score,
    previous_token_score,
    repeated_random_tokens,
    strongest,
)
from pellucid.trace import trace


def drawn(tokens: int, looks_at: dict[int, int]) -> torch.Tensor:
    """A pattern (1, 1, T, T): query -> the one key it looks at; the others look at themselves."""
    pattern = torch.eye(tokens)[None, None].clone()
    for query, key in looks_at.items():
        pattern[0, 0, query] = torch.nn.functional.one_hot(torch.tensor(key), tokens).float()
    return pattern


def test_a_perfect_induction_head_scores_one_and_any_other_offset_nothing():
    # begin | a b c | a b c : the second a (place 4) looks at b (place 2), and so on.
    perfect = drawn(7, {4: 2, 5: 3, 6: 4})
    assert induction_score(perfect, length=3, begin=1).tolist() == [1.0]
    same_token = drawn(7, {4: 1, 5: 2, 6: 3})  # looks at its own first occurrence
    assert induction_score(same_token, length=3, begin=1).tolist() == [0.0]
    partly = drawn(7, {4: 2})
    assert induction_score(partly, length=3, begin=1).item() == pytest.approx(1 / 3)


def test_a_previous_token_head_scores_one_and_no_induction():
    previous = drawn(6, {query: query - 1 for query in range(1, 6)})
    assert previous_token_score(previous).tolist() == [1.0]
    assert induction_score(previous, length=3).tolist() == [0.0]
    assert previous_token_score(drawn(6, {})).tolist() == [0.0]


def test_scores_are_kept_apart_by_head_and_averaged_over_rows():
    perfect, nothing = drawn(6, {3: 1, 4: 2, 5: 3}), drawn(6, {})
    pattern = torch.cat((torch.cat((perfect, nothing), 1), torch.cat((nothing, nothing), 1)))
    assert induction_score(pattern, length=3).tolist() == [0.5, 0.0]


def test_the_tokens_stand_twice_after_the_beginning():
    tokens = repeated_random_tokens(50, length=4, rows=3, seed=0, begin=[7])
    assert tokens.shape == (3, 9)
    assert (tokens[:, 0] == 7).all()
    assert torch.equal(tokens[:, 1:5], tokens[:, 5:])
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_a_model_that_has_learnt_nothing_has_no_induction_head(config):
    model = random_model(config, torch.float32)
    scores = head_scores(model, length=16, rows=4)
    assert scores.induction.shape == scores.previous.shape == (config.n_layers, config.n_heads)
    assert scores.induction.max() < 0.25


def test_scores_of_a_model_are_those_of_its_patterns_one_query_at_a_time():
    model = random_model(LLAMA)
    tokens = repeated_random_tokens(LLAMA.vocab_size, length=5, rows=2, seed=3, begin=[1])
    with trace(model) as seen:
        model(tokens)
    wanted = torch.zeros(LLAMA.n_layers, LLAMA.n_heads)
    for layer in range(LLAMA.n_layers):
        pattern = seen[f"layers.{layer}.attn.pattern"]
        for head in range(LLAMA.n_heads):
            looks = [pattern[row, head, 6 + i, 1 + i + 1] for row in (0, 1) for i in range(5)]
            wanted[layer, head] = torch.stack(looks).mean()
    scores = head_scores(model, seed=3, length=5, rows=2, begin=[1]).induction
    torch.testing.assert_close(scores, wanted, atol=1e-6, rtol=0)


def test_copies_longer_than_the_context_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="80 tokens: expected at most the context of 64"):
        head_scores(random_model(GPT), length=40)


def test_the_strongest_head():
    assert strongest(torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.1, 0.9]])) == (1, 2)
