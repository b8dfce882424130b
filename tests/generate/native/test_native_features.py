"""The C decoder on every feature a decoder may have, against the model's own code and float64."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, FEATURES, in_turn, random_model, random_tokens
from torch import Tensor

from pellucid import graph
from pellucid.generate import Sampling, fast, generate_plain, generate_tokens
from pellucid.generate.native import NativeDecoder, instruction_sets, library, unsupported
from pellucid.generate.native.recording import LEAVES
from pellucid.models import Cache, Model
from pellucid.models.quantised import Format, quantise
from pellucid.trace import trace

FIRST, LENGTH = 7, 14  # tokens of the first pass, and in all: more than twice a window of 5
FLOAT32 = 5e-6  # largest difference of a logit, as a share of the largest logit
STARTS = [0, 9, 3]  # one text begins before the first pass ends, one after it, one with the row

every_feature = pytest.mark.parametrize("kind", FEATURES)


def difference(seen: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return float((seen.double() - expected).abs().max() / expected.abs().max())


def spread(seen: Tensor, expected: Tensor) -> float:
    """Root of the mean square of the differences, as a share of that of the expected values."""
    return float((seen.double() - expected).norm() / expected.norm())


@torch.no_grad()
def first_pass(model: Model, tokens: Tensor, starts: list[int] | None = None) -> Cache:
    """Keys and values of the first tokens, with room for the others."""
    cache = Cache(model.config.n_layers)
    model(tokens[:, :FIRST], cache=cache, starts=starts and torch.tensor(starts))
    cache.reserve(LENGTH)
    return cache


def decoded(
    made,
    model: Model,
    tokens: Tensor,
    threads: int,
    starts: list[int] | None = None,
    after: Cache | None = None,
) -> Tensor:
    """Logits after each token from FIRST on, (B, LENGTH - FIRST, V), by steps of one token.

    after  what `first_pass` gave, which stays as it is; None: it is made here
    """
    cache = deepcopy(after) if after else first_pass(model, tokens, starts)
    decoder = NativeDecoder(made, model, length=LENGTH, threads=threads)
    columns = tokens[:, FIRST:].T
    logits = [decoder.step(column[:, None].tolist(), cache, starts) for column in columns]
    decoder.close()
    return torch.stack(logits, dim=1)


@torch.no_grad()
def expected_logits(model: Model, tokens: Tensor, starts: list[int] | None = None) -> Tensor:
    """The same by one pass of the model's own code, as float64."""
    return model(tokens, starts=starts and torch.tensor(starts))[:, FIRST:].double()


def ways(*threads: int) -> list[tuple[str, int]]:
    """The best kernels with each number of threads, the others with the last one.

    How rows and heads are handed to threads does not depend on the kernels.
    """
    best, *others = instruction_sets()
    return [(best, number) for number in threads] + [(name, threads[-1]) for name in others]


def test_every_feature_is_decoded_in_c():
    configs = CONFIGS | FEATURES
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reasons = {kind: unsupported(random_model(configs[kind], dtype)) for kind in configs}
        assert set(reasons.values()) == {None}, reasons


@pytest.mark.parametrize("dialect", ["hf", "meta"])
@every_feature
def test_float32_equals_the_models_own(kind, dialect):
    model = random_model(FEATURES[kind], torch.float32, dialect)
    tokens = random_tokens(model.config, 3, LENGTH)
    expected, after = expected_logits(model, tokens), first_pass(model, tokens)
    for instructions, threads in ways(1, 2, 3) if dialect == "hf" else ways(2):
        seen = decoded(library(instructions), model, tokens, threads, after=after)
        assert difference(seen, expected) <= FLOAT32, (instructions, threads)


@pytest.mark.parametrize(
    ("kind", "dtype", "dialect"),
    in_turn(FEATURES, (torch.bfloat16, torch.float16), ("hf", "meta")),
)
def test_16_bits_are_as_near_to_float64_as_the_models_own(kind, dialect, dtype):
    model = random_model(FEATURES[kind], dtype, dialect)
    exact = random_model(FEATURES[kind], torch.float64, dialect)
    exact.load_state_dict(model.state_dict())
    tokens = random_tokens(model.config, 3, LENGTH)
    own, true = expected_logits(model, tokens), expected_logits(exact, tokens)
    after = first_pass(model, tokens)
    rounding = spread(own, true)  # of all logits: a single one may lie near a tie of attention
    for instructions, threads in ways(1, 3):
        seen = decoded(library(instructions), model, tokens, threads, after=after)
        assert spread(seen, true) <= 2 * rounding, (instructions, threads)
        assert spread(seen, own) <= 2 * rounding, (instructions, threads)


@pytest.mark.parametrize("kind", [kind for kind, c in FEATURES.items() if c.sinks or c.score_cap])
def test_scores_with_a_cap_or_sinks_round_as_the_named_steps_do(kind):
    model = random_model(FEATURES[kind], torch.bfloat16)
    tokens = random_tokens(model.config, 3, LENGTH)
    own = expected_logits(model, tokens)
    seen = decoded(library(), model, tokens, threads=2).double()
    assert (seen == own).double().mean() > 0.9  # without these roundings about a fifth are equal


@every_feature
def test_padded_rows_equal_the_models_own(kind):
    model = random_model(FEATURES[kind], torch.float32)
    tokens = random_tokens(model.config, 3, LENGTH)
    expected = expected_logits(model, tokens, STARTS)
    seen = decoded(library(), model, tokens, 2, STARTS)
    for row, start in enumerate(STARTS):
        begin = max(start - FIRST, 0)  # padding rows are ignored
        assert difference(seen[row, begin:], expected[row, begin:]) <= FLOAT32


@pytest.mark.parametrize(("kind", "bits"), in_turn(FEATURES, (8, 6, 4)))
def test_a_quantised_prompt_in_pieces(kind, bits):
    """All of it through the C code: several tokens of a row in one step, rows of other lengths."""
    model = quantise(random_model(FEATURES[kind], torch.float32), Format(bits=bits, group=32))
    tokens, starts = random_tokens(model.config, 3, LENGTH), [0, 6, 2]
    with torch.no_grad():
        expected = model(tokens, starts=torch.tensor(starts))[:, -1].double()
    for parts in ([LENGTH], [1, 6, 7], [1] * LENGTH):
        cache, steps = Cache(model.config.n_layers), fast.FastSteps(model, LENGTH, wanted=True)
        pieces = tokens.split(parts, dim=1)
        logits = [steps.step(piece.tolist(), cache, starts) for piece in pieces][-1]
        assert cache.length == LENGTH and logits is not None
        assert difference(logits, expected) <= FLOAT32, parts


@every_feature
def test_the_recording_holds_what_a_trace_holds(kind):
    model = random_model(FEATURES[kind], torch.float32)
    rows = random_tokens(model.config, 2, FIRST).tolist()
    seen = fast.trace_fast(model, rows, 2)
    cache = Cache(model.config.n_layers)
    with torch.no_grad():
        model(torch.tensor(rows), cache=cache)
    for step in (1, 2):
        with trace(model, fused=True) as expected:
            model(seen[f"step.{step}.tokens"], cache=cache)
        names = [name for name in graph.expand(model.config) if graph.leaf(name) in LEAVES]
        found = [name for name in seen if name.startswith(f"step.{step}.")]
        ends = [f"step.{step}.{name}" for name in ("tokens", "positions", "logits")]
        assert found == [*ends[:2], *(f"step.{step}.{name}" for name in names), ends[2]]
        for name in names:
            torch.testing.assert_close(
                seen[f"step.{step}.{name}"], expected[name], rtol=1e-4, atol=2e-5
            )


def with_original_context(kind: str, length: int, dtype: torch.dtype = torch.float32) -> Model:
    config = FEATURES[kind]
    assert config.rope is not None
    rope = replace(config.rope, original_context=length)
    return random_model(replace(config, rope=rope), dtype)


def test_long_texts_are_turned_by_longropes_long_divisors():
    model = with_original_context("longrope", FIRST - 2)
    tokens = random_tokens(model.config, 3, LENGTH)
    expected = expected_logits(model, tokens)
    assert difference(decoded(library(), model, tokens, 2), expected) <= FLOAT32
    model = quantise(model, Format(bits=8, group=32))  # its prompt is one pass in pieces
    with torch.no_grad():
        expected = model(tokens)[:, -1].double()
    steps = fast.FastSteps(model, LENGTH, wanted=True)
    rows = tokens.repeat(15, 1)  # 45: one token of each in a step
    logits = steps.step(rows.tolist(), Cache(model.config.n_layers), [0] * 45)
    assert logits is not None
    assert difference(logits[:3], expected) <= FLOAT32


@pytest.mark.parametrize("kind", ["longrope", "dynamic RoPE"])
@pytest.mark.parametrize("bits", [0, 8])
def test_rows_that_outgrow_the_original_context_one_after_another(kind, bits):
    model = with_original_context(kind, 10)
    model = quantise(model, Format(bits=bits, group=32)) if bits else model
    rows = [random_tokens(model.config, length, seed=length).tolist() for length in (4, 9, 7)]
    greedy = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 9}
    found = [list(generate_tokens(model, rows, fast=how, **greedy)) for how in (True, False)]
    assert found[0] == found[1]
    alone = [generate_plain(model, row, **greedy) for row in rows]
    assert [list(row) for row in zip(*found[0], strict=True)] == alone


def test_a_trace_beyond_dynamic_ropes_original_context_is_refused():
    model = with_original_context("dynamic RoPE", 10)
    assert fast.trace_fast(model, [[1] * 8], 2)
    with pytest.raises(ValueError, match="cannot trace 11 tokens.*dynamic RoPE"):
        fast.trace_fast(model, [[1] * 9], 2)


@pytest.mark.parametrize("how", [True, False])
def test_a_quantised_model_without_any_parameter_is_decoded(how):
    model = random_model(FEATURES["norm without weight"], torch.float32)
    quantise(model, Format(bits=8, group=32))
    assert not list(model.parameters())
    rows = random_tokens(model.config, 2, FIRST).tolist()
    greedy = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 6}
    found = list(generate_tokens(model, rows, fast=how, **greedy))
    with torch.no_grad():
        whole = [row + [step[i] for step in found] for i, row in enumerate(rows)]
        chosen = model(torch.tensor(whole)).argmax(-1)[:, FIRST - 1 : -1]
    assert chosen.T.tolist() == found


def test_what_a_recording_leaves_out_is_never_formed():
    leaves = {row.leaf for row in graph.ROWS} - set(LEAVES)
    tables = {"rope.cos", "rope.sin", "second_rope.cos", "second_rope.sin", "pos_embed"}
    tables |= {"query_growth"}
    scores = {"attn.scores", "attn.capped_scores", "attn.masked_scores", "attn.pattern"}
    given = {"tokens", "positions", "mask", "window_mask", "logits"}
    assert leaves == tables | scores | given
