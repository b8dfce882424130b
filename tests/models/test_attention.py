"""Attention: the named steps against the fused kernel, the mask, grouped heads, padding."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens

from pellucid.models import Cache, RopeConfig
from pellucid.models.attention import last_of, positions_and_mask, repeat_heads, softmax
from pellucid.trace import trace

# Fused attention sums in another order; float32 keeps 24 bits of numbers up to about 10 here.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def close(a, b, dtype):
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["hf", "meta"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_named_steps_equal_fused_attention(kind, name, dtype):
    config = CONFIGS[kind]
    model = random_model(config, dtype, name)
    tokens = random_tokens(config, 2, 11)
    with torch.no_grad():
        fused = model(tokens)
    with trace(model, only="logits"):
        named = model(tokens)
    close(fused, named, dtype)


@pytest.mark.parametrize(("mask", "low"), [("-inf", float("-inf")), ("min", -3.3895e38)])
def test_what_is_masked_has_the_value_of_the_dialect(mask, low):
    model = random_model(CONFIGS["llama-gqa"], torch.bfloat16)
    model.dialect = style = replace(model.dialect, mask=mask)
    for layer in model.layers:
        layer.attn.dialect = style
    with trace(model, only="*masked_scores") as recorded:
        model(random_tokens(CONFIGS["llama-gqa"], 1, 5))
    for scores in recorded.values():
        later = scores[..., torch.ones(5, 5, dtype=torch.bool).triu(1)].float()
        torch.testing.assert_close(later, torch.full_like(later, low), rtol=1e-3, atol=0)


def test_shares_are_rounded_where_the_dialect_rounds():
    scores = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    style = random_model(CONFIGS["llama-gqa"]).dialect
    wide = softmax(scores, None, replace(style, softmax="float32"))
    narrow = softmax(scores, None, replace(style, softmax="x"))
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    exact = scores.double().softmax(-1)
    torch.testing.assert_close(wide.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(narrow.double(), exact, rtol=2**-7, atol=0)


def test_a_head_s_sink_takes_a_share_and_is_left_out():
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    sinks = torch.tensor([0.0, 1.0, -2.0])
    shares = softmax(scores, sinks, random_model(CONFIGS["llama-gqa"]).dialect)
    total = scores.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None]
    torch.testing.assert_close(shares, scores.exp() / total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_a_trace_may_watch_the_fused_kernel(kind):
    config = CONFIGS[kind]
    model = random_model(config, torch.float32)
    tokens = random_tokens(config, 2, 11)
    with torch.no_grad():
        expected = model(tokens)
    with trace(model, fused=True) as fused:
        logits = model(tokens)
    with trace(model) as named:
        model(tokens)
    assert torch.equal(logits, expected)
    unseen = {"attn.scores", "attn.masked_scores", "attn.pattern"}
    assert list(fused) == [n for n in named if n.split(".", 2)[-1] not in unseen]
    for name in fused:
        close(fused[name], named[name], torch.float32)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("parts", [[5, 6], [1] * 11, [10, 1], [1, 10]])
def test_named_steps_equal_fused_attention_with_a_cache(kind, parts):
    config = CONFIGS[kind]
    model = random_model(config)
    tokens = random_tokens(config, 2, 11)
    runs = []
    for traced in (False, True):
        cache, pieces = Cache(config.n_layers), []
        for part in tokens.split(parts, dim=1):
            if traced:
                with trace(model, only="logits"):
                    pieces.append(model(part, cache=cache))
            else:
                with torch.no_grad():
                    pieces.append(model(part, cache=cache))
        runs.append(torch.cat(pieces, dim=1))
    close(*runs, torch.float64)


def test_two_tokens_alone_are_causal():
    model = random_model(LLAMA)
    tokens = random_tokens(LLAMA, 2, 2)
    with torch.no_grad():
        close(model(tokens)[:, :1], model(tokens[:, :1]), torch.float64)


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_named_steps_equal_fused_attention_on_padded_rows(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    tokens = random_tokens(config, 3, 9)
    padding = torch.tensor([0, 2, 8])
    with torch.no_grad():
        fused = model(tokens, starts=padding)
    with trace(model, only="logits"):
        named = model(tokens, starts=padding)
    close(fused, named, torch.float64)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-book", "llama-gqa", "llama-mqa", "dynamic"])
def test_left_padded_rows_equal_the_rows_alone(kind):
    dynamic = RopeConfig(type="dynamic", factor=2.0, original_context=4)
    config = replace(LLAMA, rope=dynamic) if kind == "dynamic" else CONFIGS[kind]
    model = random_model(config)
    tokens = random_tokens(config, 3, 9)
    padding = torch.tensor([0, 3, 8])
    with torch.no_grad():
        batch = model(tokens, starts=padding)
        assert torch.isfinite(batch).all()
        for row, skip in enumerate(padding.tolist()):
            alone = model(tokens[row : row + 1, skip:])
            close(batch[row : row + 1, skip:], alone, torch.float64)


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_what_stands_in_the_padding_does_not_matter(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    tokens, other = random_tokens(config, 1, 6), random_tokens(config, 1, 6, seed=1)
    other[:, 2:] = tokens[:, 2:]
    padding = torch.tensor([2])
    with torch.no_grad():
        one, two = model(tokens, starts=padding), model(other, starts=padding)
    assert torch.equal(one[:, 2:], two[:, 2:])
    assert not torch.equal(one[:, :2], two[:, :2])


def test_the_mask_by_hand():
    positions, allowed = positions_and_mask(torch.zeros(1, 2, dtype=torch.long), 2, None)
    assert positions.tolist() == [2, 3]
    assert allowed.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_window_ends_so_many_tokens_back():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    _, allowed = positions_and_mask(tokens, 2, None)
    assert last_of(allowed, 2).int().tolist() == [
        [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]
    ]  # fmt: skip
    # A static cache of 7 places, of which the pass has filled 2, 3 and 4.
    wide = torch.ones(3, 7, dtype=torch.bool).tril(2)
    assert torch.equal(last_of(wide, 2, torch.tensor(4))[:, :5], last_of(allowed, 2))


def test_the_mask_of_padded_rows_by_hand():
    positions, allowed = positions_and_mask(
        torch.zeros(2, 3, dtype=torch.long), 0, torch.tensor([0, 2])
    )
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert allowed.shape == (2, 1, 3, 3)
    assert allowed[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    # Padding looks at itself, so that no softmax is empty; the real token sees itself alone.
    assert allowed[1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_token_sees_the_future(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    tokens = random_tokens(config, 1, 8)
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % config.vocab_size
    with torch.no_grad():
        one, two = model(tokens), model(changed)
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.equal(one[:, 5:], two[:, 5:])


@pytest.mark.parametrize("kind", CONFIGS)
def test_patterns_are_causal_and_sum_to_one(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    with trace(model) as seen:
        model(random_tokens(config, 2, 7))
    pattern = seen["layers.1.attn.pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    assert (pattern[..., ~seen["mask"]] == 0).all()
    z = torch.einsum(
        "bhts,bhsd->bhtd", pattern, repeat_heads(seen["layers.1.attn.v"], config.n_heads)
    )
    close(seen["layers.1.attn.z"], z, torch.float64)


def test_query_head_h_reads_key_head_h_over_group():
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert repeat_heads(x, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert repeat_heads(x, 3) is x


def test_grouped_heads_equal_full_heads_with_repeated_weights():
    model = random_model(LLAMA)
    full = random_model(replace(LLAMA, n_kv_heads=LLAMA.n_heads))
    weights = dict(model.state_dict())
    for name in list(weights):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weights[name].view(LLAMA.n_kv_heads, LLAMA.head_dim, -1)
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = random_tokens(LLAMA, 2, 7)
    with torch.no_grad():
        close(model(tokens), full(tokens), torch.float64)


def test_dropout_in_attention_acts_in_training_only():
    model = random_model(replace(GPT, attn_dropout=0.5))
    tokens = random_tokens(GPT, 1, 8)
    with torch.no_grad():
        quiet = model(tokens)
        assert torch.equal(model(tokens), quiet)
        model.train()
        torch.manual_seed(0)
        assert not torch.allclose(model(tokens), quiet)


def test_a_trace_in_training_drops_out_too():
    model = random_model(replace(GPT, attn_dropout=0.5)).train()
    tokens = random_tokens(GPT, 1, 8)
    with trace(model) as seen:
        model(tokens)
    z = seen["layers.0.attn.pattern"] @ seen["layers.0.attn.v"]
    assert not torch.allclose(seen["layers.0.attn.z"], z)


@pytest.mark.parametrize("kind", CONFIGS)
def test_texts_that_share_a_row_do_not_see_each_other(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    tokens = random_tokens(config, 2, 9)
    starts = torch.tensor([[0, 0, 0, 0, 4, 4, 4, 4, 4], [0, 1, 1, 1, 1, 1, 1, 7, 7]])
    with torch.no_grad():
        together = model(tokens, starts=starts)
        for row, cuts in enumerate([(0, 4, 9), (0, 1, 7, 9)]):
            alone = [model(tokens[row : row + 1, a:b]) for a, b in pairwise(cuts)]
            close(together[row : row + 1], torch.cat(alone, dim=1), torch.float64)
