"""The KV cache and left padding: any way of running a text gives the logits of one full pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, FEATURES, GPT, LLAMA, random_model, random_tokens
from torch import Tensor

from pellucid.models import Cache, Config, Model, RopeConfig
from pellucid.trace import trace

SCALED = {
    "llama-" + rope.type: replace(LLAMA, rope=rope)
    for rope in (
        RopeConfig(type="linear", factor=4.0),
        RopeConfig(type="llama3", factor=8.0, original_context=16),
        RopeConfig(type="yarn", factor=4.0, original_context=16),
        RopeConfig(type="dynamic", factor=4.0, original_context=64),
    )
}
ALL: dict[str, Config] = CONFIGS | SCALED | FEATURES
MODELS: dict[str, Model] = {}

name_of_a_model = pytest.mark.parametrize("name", ALL)


def model_of(name: str) -> Model:
    if name not in MODELS:
        MODELS[name] = random_model(ALL[name])
    return MODELS[name]


def in_pieces(model: Model, tokens: Tensor, sizes: list[int], padding: Tensor | None) -> Tensor:
    cache, logits = Cache(model.config.n_layers), []
    for piece in tokens.split(sizes, dim=1):
        logits.append(model(piece, cache=cache, starts=padding))
    assert cache.length == tokens.shape[1]
    return torch.cat(logits, dim=1)


@name_of_a_model
@settings(max_examples=8, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_any_split_equals_one_pass(name: str, data: st.DataObject) -> None:
    model = model_of(name)
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    rows = data.draw(st.integers(1, 3))
    pads = data.draw(st.lists(st.integers(0, sum(sizes) - 1), min_size=rows, max_size=rows))
    padding = torch.tensor(pads) if data.draw(st.booleans()) else None
    tokens = random_tokens(model.config, rows, sum(sizes), seed=sum(sizes))
    expected = model(tokens, starts=padding)
    difference = (in_pieces(model, tokens, sizes, padding) - expected).abs()
    for row in range(rows):  # what stands at padding is nobody's business
        begin = pads[row] if padding is not None else 0
        assert difference[row, begin:].max() <= 1e-12


@name_of_a_model
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(name: str) -> None:
    model = model_of(name)
    lengths = [11, 1, 4, 10]
    alone = [random_tokens(model.config, 1, length, seed=length) for length in lengths]
    batch = torch.cat([torch.nn.functional.pad(row, (11 - row.shape[1], 0)) for row in alone])
    padding = torch.tensor([11 - length for length in lengths])
    together = model(batch, starts=padding)
    for row, tokens in enumerate(alone):
        length = tokens.shape[1]
        assert (together[row, -length:] - model(tokens)[0]).abs().max() <= 1e-12
    assert torch.equal(model(batch, starts=padding, last=True), together[:, -1:])


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_named_steps_with_cache_and_padding_equal_fused(config: Config) -> None:
    model = random_model(config)
    tokens, padding = random_tokens(config, 2, 9), torch.tensor([0, 4])
    expected = in_pieces(model, tokens, [6, 1, 2], padding)
    caches, logits = Cache(config.n_layers), []
    for piece in tokens.split([6, 1, 2], dim=1):
        with trace(model) as seen:
            logits.append(model(piece, cache=caches, starts=padding))
        assert seen["layers.1.attn.pattern"].shape[-2:] == (piece.shape[1], caches.length)
    assert (torch.cat(logits, 1) - expected).abs()[:, 4:].max() <= 1e-12


@name_of_a_model
@torch.no_grad()
def test_crop_forgets_exactly_the_end(name: str) -> None:
    model = model_of(name)
    first, second = (random_tokens(model.config, 1, 12, seed=seed) for seed in (1, 2))
    for kept in (0, 1, 7, 12):
        cache = Cache(model.config.n_layers)
        model(first, cache=cache)
        cache.crop(kept)
        assert cache.length == kept
        joined = torch.cat((first[:, :kept], second), dim=1)
        logits = model(second, cache=cache)
        assert (logits - model(joined)[:, kept:]).abs().max() <= 1e-12


@torch.no_grad()
def test_crop_and_rewrite_leave_a_trace_as_it_was() -> None:
    model, cache = model_of("llama-gqa"), Cache(LLAMA.n_layers)
    with trace(model) as seen:
        model(random_tokens(LLAMA, 1, 8), cache=cache)
    before = seen["layers.0.attn.k_rotated"].clone()
    cache.crop(2)
    model(random_tokens(LLAMA, 1, 3, seed=1), cache=cache)
    assert torch.equal(seen["layers.0.attn.k_rotated"], before)


def test_crop_refuses_what_is_not_there() -> None:
    cache = Cache(2)
    for length in (-1, 1):
        with pytest.raises(ValueError, match=f"cache of 0 tokens to {length}"):
            cache.crop(length)
