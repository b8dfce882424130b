"""Rows of one step in C: each has the bits that it has alone, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from test_native_decoder import DECODABLE
from tiny import CONFIGS, random_model, random_tokens
from torch import nn

from pellucid.generate.native import NativeDecoder, instruction_sets, library
from pellucid.generate.native.decoder import MOST, multiply
from pellucid.models import Cache
from pellucid.models.quantised import Format, QuantisedMatrix, quantise

KINDS = [torch.float32, torch.bfloat16, torch.float16, 8, 6, 4]


def model_in(kind: str, numbers: torch.dtype | int):
    """A random model in a dtype, or in float32 with matrices of so many bits."""
    if isinstance(numbers, torch.dtype):
        return random_model(CONFIGS[kind], numbers)
    return quantise(random_model(CONFIGS[kind], torch.float32), Format(bits=numbers, group=32))


def matrix_of(columns: int, numbers: torch.dtype | int) -> nn.Module:
    layer = nn.Linear(columns, 48, bias=False)
    if isinstance(numbers, torch.dtype):
        return layer.to(numbers)
    layers = nn.ModuleDict({"q_proj": layer})
    return next(m for m in quantise(layers, Format(bits=numbers, group=32)).modules()
                if isinstance(m, QuantisedMatrix))  # fmt: skip


@pytest.mark.parametrize("numbers", KINDS)
@pytest.mark.parametrize("columns", [1, 31, 64, 200, 515])
def test_a_product_does_not_see_its_neighbours(columns, numbers):
    """Widths below, at and between the pieces that sums are made of; 1 to 16 vectors."""
    torch.manual_seed(columns)
    layer, x = matrix_of(columns, numbers), torch.randn(16, columns)
    for instructions in instruction_sets():
        made = library(instructions)
        alone = torch.cat([multiply(made, layer, row[None]) for row in x])
        for count in range(2, 17):
            assert torch.equal(multiply(made, layer, x[:count]), alone[:count])


@pytest.mark.parametrize("numbers", KINDS)
@pytest.mark.parametrize("kind", DECODABLE)
def test_texts_of_any_length_share_a_step(kind, numbers):
    """Five texts, each with a cache of its own; one of them takes in several tokens at once."""
    model = model_in(kind, numbers)
    tokens = random_tokens(model.config, 5, 9)
    parts = [[6, 1], [2, 1], [1, 1], [5, 4], [3, 1]]  # tokens before the step, and in it
    texts = [row[: sum(part)].tolist() for row, part in zip(tokens, parts, strict=True)]
    made = library()
    for threads in (1, 2):
        decoder = NativeDecoder(made, model, length=16, threads=threads)
        found = []
        for together in (False, True):
            caches = []
            for text, (before, _) in zip(texts, parts, strict=True):
                caches.append(empty_cache(model, room=9 + 3 * len(caches)))
                decoder.step([text[:before]], caches[-1])
            rest = [text[before:] for text, (before, _) in zip(texts, parts, strict=True)]
            if together:
                found.append(decoder.step(rest, caches))
            else:
                pairs = zip(rest, caches, strict=True)
                found.append(torch.cat([decoder.step([row], cache) for row, cache in pairs]))
            assert [cache.length for cache in caches] == [len(text) for text in texts]
        decoder.close()
        assert torch.equal(*found)
        if threads == 1:
            first = found[0]
        assert torch.equal(found[0], first)


def empty_cache(model, room: int) -> Cache:
    cache, config = Cache(model.config.n_layers), model.config
    for layer in cache.layers:
        like = torch.empty(0, dtype=model.dtype)
        layer.begin(1, config.n_kv_heads, room, like, config.head_dim)
    return cache


def test_a_step_of_as_many_rows_as_there_can_be():
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    ids = random_tokens(model.config, 1, MOST)[0].tolist()
    decoder = NativeDecoder(library(), model, length=2)
    caches = [empty_cache(model, 1) for _ in range(2 * MOST)]
    together = decoder.step([[id] for id in ids], caches[:MOST])
    alone = [decoder.step([[id]], cache) for id, cache in zip(ids, caches[MOST:], strict=True)]
    decoder.close()
    assert torch.equal(together, torch.cat(alone))
