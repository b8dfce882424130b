"""The engine against the plain loop: batches, seeds, windows, limits, traces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens

from pellucid.generate import (
    KeptCache,
    Sampling,
    context_limit,
    generate_plain,
    generate_tokens,
    row_seed,
)
from pellucid.models import Config, Model, RopeConfig
from pellucid.trace import trace

GREEDY = Sampling(temperature=0.0)
LIVELY = Sampling(temperature=1.5, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
DYNAMIC = replace(
    LLAMA,
    context_length=16,
    rope=RopeConfig(theta=100.0, type="dynamic", factor=2.0, original_context=16),
)
SHORT: dict[str, Config] = {
    name: replace(config, context_length=16) for name, config in CONFIGS.items()
} | {"llama-dynamic": DYNAMIC}
MODELS: dict[str, Model] = {}


def model_of(name: str) -> Model:
    if name not in MODELS:
        MODELS[name] = random_model(SHORT[name])
    return MODELS[name]


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_tokens(LLAMA, length, seed=seed).tolist()


def rows_of(steps: object, count: int) -> list[list[int]]:
    """The steps of a generation as one list per row; None must come last and stay."""
    rows: list[list[int]] = [[] for _ in range(count)]
    ended: set[int] = set()
    for step in steps:  # type: ignore[attr-defined]
        assert len(step) == count and any(token is not None for token in step)
        for row, token in enumerate(step):
            if token is None:
                ended.add(row)
            else:
                assert row not in ended
                rows[row].append(token)
    return rows


def text_alone(model: Model, tokens: list[int], **options: object) -> list[int]:
    return rows_of(generate_tokens(model, [tokens], **options), 1)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("sampling", [GREEDY, LIVELY], ids=["greedy", "lively"])
def test_equals_the_plain_loop_inside_and_past_the_context(name: str, sampling: Sampling) -> None:
    model = model_of(name)
    limit = context_limit(model.config)
    for length in (1, 7, limit, limit + 5):
        options = {"sampling": sampling, "max_new_tokens": limit + 4, "seed": length}
        expected = generate_plain(model, prompt(length), **options)
        assert text_alone(model, prompt(length), slide=True, **options) == expected
        assert len(expected) == limit + 4


def test_the_plain_loop_is_the_books() -> None:
    """The loop of "Build an LLM from scratch", written out, with argmax."""
    model, tokens = model_of("gpt2-book"), torch.tensor([prompt(5)])
    for _ in range(30):
        with torch.no_grad():
            logits = model(tokens[:, -16:])
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert (
        text_alone(model, prompt(5), sampling=GREEDY, max_new_tokens=30) == tokens[0, 5:].tolist()
    )


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-dynamic"])
@pytest.mark.parametrize("sampling", [GREEDY, LIVELY], ids=["greedy", "lively"])
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), new=st.integers(1, 24))
def test_each_row_of_a_batch_is_the_row_alone(
    name: str, sampling: Sampling, lengths: list[int], new: int
) -> None:
    model = model_of(name)
    prompts = [prompt(length, seed=row) for row, length in enumerate(lengths)]
    stops = frozenset(range(0, 97, 12))  # so that rows end at different steps
    options = {"sampling": sampling, "max_new_tokens": new, "stop_ids": stops, "slide": True}
    together = rows_of(generate_tokens(model, prompts, seed=9, **options), len(prompts))
    for row, tokens in enumerate(prompts):
        seed = row_seed(9, row)
        assert together[row] == text_alone(model, tokens, seed=seed, **options)
        assert together[row] == generate_plain(
            model, tokens, sampling=sampling, max_new_tokens=new, stop_ids=stops, seed=seed
        )


def test_seeds_reproduce_and_rows_differ() -> None:
    model = model_of("llama-gqa")

    def run(seed: int | list[int] | None) -> list[list[int]]:
        steps = generate_tokens(
            model, [prompt(3)] * 3, sampling=Sampling(), max_new_tokens=10, seed=seed
        )
        return rows_of(steps, 3)

    first = run(1)
    assert run(1) == first and run(2) != first
    assert first[0] != first[1] != first[2]
    assert run([1, 1, 1]) == [first[0]] * 3
    assert run(None) != run(None)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_without_a_number_rows_write_to_the_end_of_the_context(name: str) -> None:
    model = model_of(name)
    prompts = [prompt(15), prompt(3), prompt(9)]
    rows = rows_of(generate_tokens(model, prompts, sampling=GREEDY), 3)
    assert [len(row) for row in rows] == [1, 13, 7]
    for tokens, row in zip(prompts, rows, strict=True):
        plain = generate_plain(model, tokens, sampling=GREEDY, max_new_tokens=len(row))
        assert row == plain


def test_a_long_row_that_has_finished_costs_the_others_one_more_pass_only() -> None:
    model = model_of("gpt2")
    with trace(model, "tokens") as seen:
        rows_of(generate_tokens(model, [prompt(15), prompt(3)], sampling=GREEDY), 2)
    widths = [tokens.shape[1] for tokens in seen.values()]
    # The prompts; one more column; then the window is full, and row 1 is run anew without row 0.
    assert widths == [15, 1, 5] + [1] * 10


def test_stops_on_the_first_token_and_when_all_rows_have() -> None:
    model = model_of("llama-gqa")
    everything = range(97)
    steps = generate_tokens(
        model, [prompt(3), prompt(5)], sampling=GREEDY, max_new_tokens=9, stop_ids=everything
    )
    assert [len(row) for row in rows_of(steps, 2)] == [1, 1]
    assert next(steps, "over") == "over"
    endless = text_alone(model, prompt(3), sampling=GREEDY, max_new_tokens=9)
    stop = endless[4]
    ended = text_alone(model, prompt(3), sampling=GREEDY, max_new_tokens=9, stop_ids=[stop])
    assert ended == endless[: endless.index(stop) + 1]


def test_a_row_can_be_ended_from_outside() -> None:
    steps = generate_tokens(
        model_of("gpt2"), [prompt(3), prompt(5)], sampling=GREEDY, max_new_tokens=5
    )
    next(steps)
    steps.finish(0)
    steps.finish(0)
    assert not steps.is_live(0) and steps.is_live(1)
    assert [step[0] for step in steps] == [None] * 4


def test_what_the_cache_held_is_counted_from_0() -> None:
    steps = generate_tokens(model_of("gpt2"), [prompt(4)], sampling=GREEDY, max_new_tokens=3)
    assert [steps.cached, *(steps.cached for _ in steps)] == [0, 0, 4, 5]
    assert steps.guessed == 0


def test_no_new_tokens() -> None:
    for name in ("gpt2", "llama-gqa"):
        assert text_alone(model_of(name), prompt(3), sampling=GREEDY, max_new_tokens=0) == []


def test_ids_beyond_the_tokenizer_are_never_chosen() -> None:
    model = model_of("llama-gqa")
    for sampling in (GREEDY, Sampling(temperature=5.0)):
        row = rows_of(
            generate_tokens(
                model, [prompt(2)], sampling=sampling, max_new_tokens=14, seed=0, vocab_size=9
            ),
            1,
        )[0]
        assert max(row) < 9


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 has no tokens.*bos"),
        ([[1, 97]], {}, "token id 97, but the model's ids are 0 … 96"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1], [1]], {"kept": KeptCache()}, "2 prompts"),
        (
            [[1] * 10],
            {"max_new_tokens": 7},
            "7 new tokens make 17, but the context is 16: ask for at most 6",
        ),
        (
            [[1], [1] * 17],
            {"max_new_tokens": 0},
            "prompt 1 .17 tokens. and 0 new tokens make 17",
        ),
        ([[1] * 16], {"max_new_tokens": None}, "16 tokens, which leaves no room.* 16"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(prompts: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tokens(model_of("llama-gqa"), prompts, **{"sampling": GREEDY, **options})


def test_exactly_the_context_is_allowed() -> None:
    model = model_of("llama-gqa")
    assert len(text_alone(model, prompt(10), sampling=GREEDY, max_new_tokens=6)) == 6


def test_context_limits() -> None:
    assert context_limit(GPT) == context_limit(LLAMA) == 64
    assert context_limit(DYNAMIC) == 32
    stretched = replace(DYNAMIC, context_length=40)  # stated as already stretched
    assert context_limit(stretched) == 40
    yarn = RopeConfig(type="yarn", factor=4.0, original_context=16)
    assert context_limit(replace(LLAMA, rope=yarn)) == 64


def test_a_model_in_training_mode_is_refused() -> None:
    model = random_model(GPT).train()
    with pytest.raises(ValueError, match="training mode"):
        generate_tokens(model, [[1]], sampling=GREEDY, max_new_tokens=1)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-dynamic"])
def test_a_kept_cache_changes_nothing_but_the_work(name: str) -> None:
    model, kept, conversation = model_of(name), KeptCache(), prompt(4)
    limit = context_limit(model.config)
    for turn in range(6):
        options = {"sampling": LIVELY, "max_new_tokens": 4, "seed": turn, "slide": True}
        with trace(model, "tokens") as seen:
            answer = text_alone(model, conversation, kept=kept, **options)
        assert answer == text_alone(model, conversation, **options)
        run = seen["tokens"].shape[1]
        if len(conversation) <= 16:
            assert run == (4 if turn == 0 else 3), "only the question and one token of the answer"
        else:
            assert run == min(len(conversation), limit)
        conversation = conversation + answer + prompt(2, seed=turn)


@pytest.mark.parametrize("first", [15, 16])
def test_keys_turned_by_short_divisors_are_not_read_by_a_text_that_is_longer(first: int) -> None:
    """longrope has other divisors beyond its original context, here of 16 tokens."""
    rope = RopeConfig(
        type="longrope", factor=4.0, original_context=16, short_factor=(1.0,) * 5,
        long_factor=(1.0, 1.5, 2.0, 3.0, 4.0),
    )  # fmt: skip
    model, kept = random_model(replace(LLAMA, rope=rope)), KeptCache()
    options = {"sampling": GREEDY, "max_new_tokens": 1}
    start = prompt(first)
    text_alone(model, start, kept=kept, **options)
    for longer in ([*start, 5], [*start, 5, 6, 7]):
        steps = generate_tokens(model, [longer], kept=kept, **options)
        next(steps)
        with torch.no_grad():
            alone = model(torch.tensor([longer]))[:, -1]
        torch.testing.assert_close(steps.logits, alone, rtol=1e-12, atol=1e-12)
    steps = generate_tokens(model, [longer[:12]], kept=kept, **options)
    next(steps)
    with torch.no_grad():
        alone = model(torch.tensor([longer[:12]]))[:, -1]
    torch.testing.assert_close(steps.logits, alone, rtol=1e-12, atol=1e-12)


def test_a_kept_cache_follows_a_changed_history() -> None:
    model, kept = model_of("llama-gqa"), KeptCache()
    options = {"sampling": GREEDY, "max_new_tokens": 3}
    first = prompt(8)
    text_alone(model, first, kept=kept, **options)
    for changed in (first, first[:3], [*first[:5], 7, 8, 9], prompt(6, seed=5)):
        assert text_alone(model, changed, kept=kept, **options) == text_alone(
            model, changed, **options
        )


@pytest.mark.parametrize("name", ["gpt2", "llama-dynamic"])
def test_a_kept_cache_forgets_what_slid_out_of_the_window(name: str) -> None:
    model, kept = model_of(name), KeptCache()
    options = {"sampling": GREEDY, "slide": True}
    text_alone(model, prompt(20), kept=kept, max_new_tokens=20, **options)
    again = text_alone(model, prompt(20)[:9], kept=kept, max_new_tokens=5, **options)
    assert again == text_alone(model, prompt(20)[:9], max_new_tokens=5, **options)


def test_a_pass_that_was_interrupted_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = model_of("llama-gqa"), KeptCache()
    options = {"sampling": GREEDY, "max_new_tokens": 3}
    text_alone(model, prompt(3), kept=kept, **options)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.layers[1].register_forward_pre_hook(interrupt)  # layer 0 has run
    with pytest.raises(KeyboardInterrupt):
        text_alone(model, prompt(7), kept=kept, **options)
    hook.remove()
    expected = text_alone(model, prompt(7), **options)
    assert text_alone(model, prompt(7), kept=kept, **options) == expected


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_trace_sees_every_pass_as_a_step(name: str) -> None:
    model = model_of(name)
    prompts = [prompt(3), prompt(6)]
    options = {"sampling": GREEDY, "max_new_tokens": 4}
    with trace(model) as seen:
        rows = rows_of(generate_tokens(model, prompts, **options), 2)
    assert rows == rows_of(generate_tokens(model, prompts, **options), 2)
    assert seen["tokens"].shape == (2, 6)
    for step in (1, 2, 3):
        assert seen[f"step.{step}.tokens"].tolist() == [[row[step - 1]] for row in rows]
        assert seen[f"step.{step}.layers.0.attn.pattern"].shape == (2, 4, 1, 6 + step)
        assert seen[f"step.{step}.logits"].argmax(-1).tolist() == [[row[step]] for row in rows]
    assert "step.4.tokens" not in seen


def test_an_edit_changes_what_is_written() -> None:
    model = model_of("llama-gqa")
    with trace(model, (), edit={"logits": lambda logits: -logits}):
        edited = text_alone(model, prompt(3), sampling=GREEDY, max_new_tokens=1)
    with torch.no_grad():
        assert edited == [int(model(torch.tensor([prompt(3)]))[0, -1].argmin())]


def test_gradients_flow_only_into_a_trace_that_asks() -> None:
    model = model_of("llama-gqa")
    options = {"sampling": GREEDY, "max_new_tokens": 3}
    with trace(model, "*logits", gradients=True) as seen:
        text_alone(model, prompt(3), **options)
    assert seen["step.2.logits"].requires_grad
    seen["step.2.logits"].sum().backward()
    assert model.embed.weight.grad is not None
    model.zero_grad()
    with trace(model, "logits") as seen:
        text_alone(model, prompt(3), **options)
    assert not seen["logits"].requires_grad
    steps = generate_tokens(model, [prompt(3)], **options)
    next(steps)
    assert torch.is_grad_enabled(), "the caller's own mode is left alone between steps"
