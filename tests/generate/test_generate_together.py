"""Generations that share their steps: each is, bit for bit, what it is alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, FEATURES, random_model

from pellucid.generate import Sampling, Together, generate_rows, generate_tokens, row_seed
from pellucid.generate.fast import FastSteps
from pellucid.generate.native import NativeDecoder
from pellucid.generate.prefixes import PIECE, PrefixStore
from pellucid.models.quantised import Format, quantise

GREEDY, DRAWN = Sampling(temperature=0.0), Sampling(temperature=0.8, top_k=30)


def model_of(kind: str, *, bits: int = 0, context: int = 1200):
    model = random_model(replace(CONFIGS[kind], context_length=context), torch.float32)
    return quantise(model, Format(bits=bits, group=32)) if bits else model


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def options(number: int) -> dict:
    sampling = DRAWN if number % 2 else GREEDY
    return {"sampling": sampling, "seed": number, "max_new_tokens": 4 + number % 3}


def alone(model, row: list[int], number: int, **more) -> tuple[list[int], list[torch.Tensor]]:
    run = generate_tokens(model, [row], **{**options(number), **more})
    found = [(token, run.logits) for (token,) in run]
    return [token for token, _ in found], [logits for _, logits in found]


def written(together: Together, rows: dict[int, list[int]], joins: dict[int, int] | None = None):
    """Tokens and logits of each prompt; prompt i joins before step `joins[i]`, the first one."""
    runs = {number: together.generate(row, **options(number)) for number, row in rows.items()}
    found: dict[int, tuple[list, list]] = {number: ([], []) for number in rows}
    for step in range(400):
        for number, run in runs.items():
            if (joins or {}).get(number, 0) == step:
                together.join(run)
        together.step()
        for number, run in runs.items():
            if run.ready:
                found[number][0].extend(next(run))
                found[number][1].append(run.logits)
            if not run.is_live(0):
                together.leave(run)
        if not any(run.is_live(0) for run in runs.values()):
            assert len(together) == 0
            return found
    raise AssertionError("it never ended")


def check(model, together: Together, rows: dict[int, list[int]], joins=None, **more) -> None:
    found = written(together, rows, joins)
    for number, row in rows.items():
        tokens, logits = alone(model, row, number, **more)
        assert found[number][0] == tokens
        assert all(torch.equal(a, b) for a, b in zip(found[number][1], logits, strict=True))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("kind", "bits"), [("llama-gqa", 0), ("gpt2", 0), ("llama-gqa", 8)])
def test_requests_that_come_and_go(kind, bits, fast):
    """Prompts of one token to more than two pieces, which join one after another."""
    model = model_of(kind, bits=bits)
    lengths = (3, 2 * PIECE + 40, 1, 17, PIECE, PIECE + 1, 5)
    rows = {number: prompt(length, number) for number, length in enumerate(lengths)}
    check(model, Together(model, fast=fast), rows, {i: i // 2 for i in rows}, fast=fast)


def test_rows_that_decode_share_one_pass(monkeypatch):
    model, shared = model_of("llama-gqa"), []
    step_each = FastSteps.step_each
    monkeypatch.setattr(
        FastSteps, "step_each",
        lambda self, tokens, *rest: (
            shared.append([len(some) for some in tokens]) or step_each(self, tokens, *rest)
        ),
    )  # fmt: skip
    together = Together(model, fast=True)
    written(together, {number: prompt(3 + number, number) for number in (0, 3, 6)})
    assert shared == [[3, 6, 9], *3 * [[1, 1, 1]]]  # the prompts share one as well
    shared.clear()
    rows = {0: prompt(5), 3: prompt(PIECE + 9, 3)}
    written(together, rows, {3: 1})
    assert [1, 9] in shared  # the end of a prompt that C reads, beside a token


def test_a_long_prompt_stalls_nobody_and_is_not_left_behind():
    model = model_of("llama-gqa", context=8 * PIECE)
    together = Together(model, fast=True)
    run = {"sampling": GREEDY, "max_new_tokens": 30}
    talks, long = together.generate(prompt(2), **run), together.generate(prompt(6 * PIECE), **run)
    for one in (talks, long):
        together.join(one)
    tokens = 0
    for step in range(1, 40):
        if not long.ready:
            short = together.generate(prompt(9, step), **run)  # there is always a new one
            together.join(short)
        before = long.unread
        together.step()
        assert before - long.unread <= PIECE
        assert talks.ready, "a token in every step"
        tokens += len(next(talks))
        if long.ready:
            break
    assert 6 <= step <= 13, "a piece in at least every other step"
    assert tokens == step


@pytest.mark.parametrize("bits", [0, 8])
def test_prompts_that_begin_alike_are_read_once(bits):
    model = model_of("llama-gqa", bits=bits)
    together, begin = Together(model, fast=True), prompt(2 * PIECE + 20)
    rows = {0: [*begin, 7], 1: [*begin, 8, 9], 2: [*begin[:PIECE], 1], 3: [*begin, 7]}
    check(model, together, rows, {0: 0, 1: 9, 2: 18, 3: 27}, fast=True)
    # In C any tokens are shared, of PyTorch's passes whole pieces; an equal prompt is, entirely.
    shared = (len(begin) + PIECE) if bits else 3 * PIECE
    assert together.prefixes.reused == shared + len(rows[3])


def test_what_an_answer_said_is_shared_where_its_bits_are():
    """A conversation: the next prompt repeats the answer, which C wrote token by token."""
    model = model_of("llama-gqa", bits=8)
    together, first = Together(model, fast=True), prompt(20)
    tokens = written(together, {2: first})[2][0]
    check(model, together, {4: [*first, *tokens, 3, 4]}, fast=True)
    assert together.prefixes.reused == len(first) + len(tokens) - 1


@pytest.mark.parametrize("feature", ["longrope", "dynamic RoPE", "window", "second RoPE", "sinks"])
def test_angles_that_follow_the_length_and_other_features(feature):
    model = random_model(FEATURES[feature], torch.float32)
    most = model.config.context_length
    rows = {n: prompt(length, n) for n, length in enumerate((3, most // 2, 3, most - 8))}
    check(model, Together(model, fast=None), rows, {2: 3, 3: 3})


def test_past_its_context_a_model_crops():
    model = model_of("gpt2", context=24)
    rows = {number: prompt(22 + number, number) for number in range(3)}
    check(model, Together(model, fast=True), rows, fast=True)


def test_the_store_holds_what_it_may():
    model = model_of("llama-gqa")
    together = Together(model, fast=True, shared_bytes=200_000)
    for number in range(6):
        written(together, {number: prompt(PIECE, number)})
        assert together.prefixes.nbytes <= 200_000 + 100_000  # one cache grows while it is written
    few = PrefixStore(1 << 30, most=2)
    for number in range(4):
        run = generate_tokens(model, [prompt(3, number)], kept=few, **options(number))
        list(run)
    assert len(few._entries) == 2


def test_an_error_stays_with_its_row(monkeypatch):
    model = model_of("llama-gqa")
    together = Together(model, fast=False)
    rows = [together.generate(prompt(4, n), sampling=GREEDY, max_new_tokens=3) for n in range(2)]
    for row in rows:
        together.join(row)
    monkeypatch.setattr(rows[0], "_pass", lambda columns: 1 / 0)
    together.step()
    with pytest.raises(ZeroDivisionError):
        next(rows[0])
    assert len(next(rows[1])) == 1


def batch(model, prompts, **more):
    run = generate_rows(model, prompts, sampling=DRAWN, seed=4, **more)
    texts = [[] for _ in prompts]
    for step in run:
        for text, token in zip(texts, step, strict=True):
            text += [] if token is None else [token]
    return texts


@pytest.mark.parametrize("bits", [0, 8])
def test_a_batch_is_each_of_its_texts_alone_and_computes_no_padding(bits, monkeypatch):
    model = model_of("llama-gqa", bits=bits)
    prompts = [prompt(length, length) for length in (1, 70, 3, 2 * PIECE + 9, 20, 5)]
    lengths, read = [5, 2, 0, 3, 7, 4], []
    step, forward = NativeDecoder.step, type(model).forward

    def counted_step(self, tokens, *given, **options):
        read.append(sum(map(len, tokens)))
        return step(self, tokens, *given, **options)

    def counted_forward(self, tokens, **options):
        read.append(tokens.numel())
        return forward(self, tokens, **options)

    monkeypatch.setattr(NativeDecoder, "step", counted_step)
    monkeypatch.setattr(type(model), "forward", counted_forward)
    texts = batch(model, prompts, max_new_tokens=lengths, fast=True, at_once=3)
    computed = sum(len(row) + length - 1 for row, length in zip(prompts, lengths, strict=True))
    computed -= 2  # the prompt without an answer is not read: 3 - 1 of them
    shared = 1 if bits else 0  # in C a prompt begins from whatever tokens an earlier one had
    assert sum(read) == computed - shared
    for number, (row, length) in enumerate(zip(prompts, lengths, strict=True)):
        alone = generate_tokens(
            model, [row], sampling=DRAWN, max_new_tokens=length, seed=row_seed(4, number), fast=True
        )
        assert texts[number] == [token for (token,) in alone]


def test_lengths_are_one_or_one_each():
    model, prompts = model_of("llama-gqa", context=24), [prompt(3), prompt(20)]
    with pytest.raises(ValueError, match="1 lengths for 2 prompts"):
        batch(model, prompts, max_new_tokens=[3])
    with pytest.raises(ValueError, match=r"prompt 1 \(20 tokens\) and 5 new tokens make 25"):
        batch(model, prompts, max_new_tokens=[5, 5], fast=True)
    assert [len(text) for text in batch(model, prompts, fast=True)] == [21, 4]
