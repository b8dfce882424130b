"""A cache in blocks: what is shared stands once, and whoever writes on writes into its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, FEATURES, random_model

from pellucid.generate import Sampling, Together, generate_tokens, native
from pellucid.generate.native import NativeDecoder
from pellucid.generate.paged import BLOCK, PagedCache
from pellucid.models import Cache

GREEDY = Sampling(temperature=0.0)


def model_of(kind="llama-gqa", dtype=torch.float32):
    config = {**CONFIGS, **FEATURES}[kind]
    return random_model(replace(config, context_length=400), dtype)


def tokens_of(model, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2", "window", "sinks"])
def test_c_reads_blocks_and_one_piece_to_the_same_bits(kind, dtype):
    model = model_of(kind, dtype)
    decoder = NativeDecoder(native.library(), model, length=400)
    ids, found = tokens_of(model, 2 * BLOCK + 9), []
    for cache in (Cache(model.config.n_layers), PagedCache(model)):
        with torch.no_grad():
            logits = [model(torch.tensor([ids[:100]]), cache=cache, last=True)[:, -1].float()]
        cache.reserve(len(ids))
        for first in range(100, len(ids), 5):
            logits.append(decoder.step([ids[first : first + 5]], cache))
        found.append(torch.cat(logits))
    assert torch.equal(*found)


def test_pytorch_is_given_all_tokens_so_far():
    model, ids = model_of(), None
    ids, cache = tokens_of(model, 3 * BLOCK), PagedCache(model)
    with torch.no_grad():
        parts = [
            model(torch.tensor([part]), cache=cache) for part in (ids[:70], ids[70:71], ids[71:])
        ]
        whole = model(torch.tensor([ids]))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert len(cache.blocks) == 3


def test_whole_blocks_are_shared_and_what_is_written_on_is_copied():
    model = model_of()
    decoder = NativeDecoder(native.library(), model, length=400)
    first, ids = PagedCache(model), tokens_of(model, 2 * BLOCK + 10)
    with torch.no_grad():
        model(torch.tensor([ids]), cache=first)
    second = first.shared(BLOCK + 20)
    assert [a is b for a, b in zip(first.blocks, second.blocks, strict=False)] == [True, False]
    before = [block.clone() for block in first.blocks]
    second.reserve(BLOCK + 30)
    decoder.step([[1, 2, 3]], second)
    for block, as_it_was in zip(first.blocks[:2], before[:2], strict=True):
        assert torch.equal(block, as_it_was)
    alone = Cache(model.config.n_layers)
    with torch.no_grad():
        model(torch.tensor([ids[: BLOCK + 20]]), cache=alone)
    alone.reserve(BLOCK + 30)
    again = first.shared(BLOCK + 20)
    again.reserve(BLOCK + 30)
    torch.testing.assert_close(decoder.step([[5]], alone), decoder.step([[5]], again))


def test_memory_follows_the_tokens_held():
    """Eight texts with one beginning of four blocks hold it once."""
    model = model_of()
    together = Together(model, fast=True)
    begin = tokens_of(model, 4 * BLOCK)
    block = PagedCache(model)
    block.reserve(1)
    runs = [
        together.generate([*begin, number], sampling=GREEDY, max_new_tokens=4)
        for number in range(8)
    ]
    for run in runs:
        together.join(run)
        while not run.ready:
            together.step()
    held = {id(one): one for run in runs for one in run._cache.tensors}
    assert sum(one.nbytes for one in held.values()) == (4 + 8) * block.nbytes
    logits = sum(entry.logits.nbytes for entry in together.prefixes._entries.values())
    assert together.prefixes.nbytes == (4 + 8) * block.nbytes + logits
    for number, run in enumerate(runs):
        options = {"sampling": GREEDY, "max_new_tokens": 1, "fast": True}
        alone = generate_tokens(model, [[*begin, number]], **options)
        assert next(run) == next(alone)
        assert torch.equal(run.logits, alone.logits)
