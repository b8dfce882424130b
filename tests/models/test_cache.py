"""The KV cache: what it remembers, how it grows, what `crop` forgets."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, random_model, random_tokens

from pellucid.models import Cache
from pellucid.models.cache import LayerCache


def pieces(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 4, generator=generator) for n in lengths]


def test_appending_gives_all_so_far():
    cache, parts = LayerCache(), pieces(5, 1, 1, 7, 1)
    for i, part in enumerate(parts):
        k, v = cache.append(part, -part)
        assert torch.equal(k, torch.cat(parts[: i + 1], dim=2))
        assert torch.equal(v, -k)
    assert cache.length == 15


def test_growth_doubles():
    cache = LayerCache()
    capacities = []
    for part in pieces(*[1] * 17):
        cache.append(part, part)
        capacities.append(cache.k.shape[2])
    assert sorted(set(capacities)) == [1, 2, 4, 8, 16, 32]


def test_appending_leaves_what_was_given_alone():
    cache, (first, second) = LayerCache(), pieces(4, 2)
    before = first.clone()
    cache.append(first, first)
    cache.length = 1
    cache.append(second, second)
    assert torch.equal(first, before)


def test_gradients_flow_through_a_cache():
    model = random_model(CONFIGS["llama-gqa"])
    tokens = random_tokens(model.config, 1, 9)
    model(tokens)[:, 4:].logsumexp(-1).sum().backward()
    expected = model.embed.weight.grad.clone()
    model.zero_grad()
    cache = Cache(model.config.n_layers)
    model(tokens[:, :4], cache=cache)
    logits = [model(part, cache=cache) for part in tokens[:, 4:].split([3, 1, 1], dim=1)]
    torch.cat(logits, dim=1).logsumexp(-1).sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", CONFIGS)
def test_crop_forgets_the_rest(kind):
    model = random_model(CONFIGS[kind])
    tokens = random_tokens(model.config, 2, 9)
    cache = Cache(model.config.n_layers)
    with torch.no_grad():
        model(random_tokens(model.config, 2, 9, seed=1), cache=cache)
        cache.crop(0)
        model(tokens[:, :6], cache=cache)
        model(random_tokens(model.config, 2, 3, seed=2), cache=cache)
        cache.crop(4)
        assert cache.length == 4
        again = model(tokens[:, 4:], cache=cache)
        torch.testing.assert_close(again, model(tokens)[:, 4:], rtol=0, atol=1e-12)


def test_crop_refuses_what_it_does_not_hold():
    cache = Cache(2)
    for length in (-1, 1):
        with pytest.raises(ValueError, match=f"a cache of 0 tokens to {length}"):
            cache.crop(length)


def test_bytes_are_counted():
    cache = Cache(2)
    assert cache.nbytes == 0
    for layer in cache.layers:
        layer.append(*pieces(5, 5))
    assert cache.nbytes == 2 * 2 * (2 * 3 * 5 * 4) * 4
