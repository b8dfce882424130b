"""DPO against the paper's formula worked out in float64, sequence by sequence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_finetune_lora import adapted
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens

from pellucid import tokenizers
from pellucid.models import adapters as lora
from pellucid.train import Schedule, TrainConfig, train
from pellucid.train.finetune.instructions import plain_chat
from pellucid.train.finetune.pairs import AnswerPair, PairRows, fitted_pairs, pairs
from pellucid.train.finetune.preferences import (
    DPO,
    dpo_objective,
    preference_report,
    reference,
)
from pellucid.train.finetune.rows import Example, mean_loss
from pellucid.train.finetune.tasks import TaskOptions, preference_task

DEMO = Path(tokenizers.__file__).parents[1] / "demos" / "stdlib"


def pair(seed: int, prompt: int, chosen: int, rejected: int) -> AnswerPair:
    """Random tokens: a prompt and two answers of these lengths."""
    ids = random_tokens(LLAMA, prompt + chosen + rejected, seed=seed)
    start, better, worse = ids.split([prompt, chosen, rejected])
    return AnswerPair(
        *(
            Example(torch.cat([start, answer]), torch.arange(prompt + len(answer)) >= prompt)
            for answer in (better, worse)
        )
    )


PAIRS = [pair(0, 4, 3, 6), pair(1, 1, 5, 2), pair(2, 7, 2, 2)]


def log_probability(model, example: Example) -> torch.Tensor:
    """log π(answer | prompt), one token after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for place in range(1, len(example.ids)):
        if example.wanted[place]:
            logits = model(example.ids[None, :place])[0, -1]
            total = total + logits[example.ids[place]] - logits.exp().sum().log()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_formula_of_the_paper(config, smoothing):
    beta = 0.3
    start, model = random_model(config, seed=1), random_model(config, seed=2)
    losses, right, margins = [], 0, []
    for chosen, rejected in PAIRS:
        ratio = log_probability(model, chosen) - log_probability(start, chosen)
        ratio = ratio - (log_probability(model, rejected) - log_probability(start, rejected))
        toward = [sign * beta * ratio.item() for sign in (1, -1)]
        one, other = (math.log1p(math.exp(-x)) for x in toward)  # −log σ(x)
        losses.append((1 - smoothing) * one + smoothing * other)
        right += ratio.item() > 0
        margins.append(beta * ratio.item())
    rows = PairRows(PAIRS, batch=2, seed=0)
    table = reference(start, rows)
    objective = dpo_objective(table, DPO(beta=beta, smoothing=smoothing))
    assert mean_loss(model, rows.in_order(2), objective) == pytest.approx(
        sum(losses) / 3, abs=1e-11
    )
    found = preference_report(model, rows, table, beta)
    assert found.accuracy == pytest.approx(right / 3)
    assert found.margin == pytest.approx(sum(margins) / 3, abs=1e-6)


def test_the_gradient_is_that_of_the_formula():
    start, model = random_model(LLAMA, seed=1), random_model(LLAMA, seed=2)
    rows = PairRows(PAIRS, batch=3, seed=0)
    total, count = dpo_objective(reference(start, rows), DPO())(model, rows.at(0))
    total.backward()
    assert count == 3
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for chosen, rejected in PAIRS:
        ratio = log_probability(model, chosen) - log_probability(model, rejected)
        with torch.no_grad():
            ratio_at_start = log_probability(start, chosen) - log_probability(start, rejected)
        loss = loss + torch.log1p(torch.exp(-0.1 * (ratio - ratio_at_start)))
    loss.backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)


def test_the_reference_is_the_model_that_training_begins_with():
    """Its adapters too, where it has been fine-tuned: π_ref is π_SFT (section 3 of the paper)."""
    rows = PairRows(PAIRS, batch=2, seed=0)
    model, plain = adapted(random_model(GPT)), random_model(GPT)
    table = reference(model, rows)
    found = preference_report(model, rows, table, 0.1)
    assert (found.chosen, found.rejected) == (0, 0)
    with lora.switched_off(model):
        assert torch.equal(reference(model, rows), reference(plain, rows))
    lora.fold(model)
    torch.testing.assert_close(reference(model, rows), table, rtol=0, atol=1e-11)


def test_training_raises_margins():
    model = random_model(LLAMA, torch.float32)
    lora.inject(model, lora.LoraConfig(rank=4, targets=("all",)))
    rows = PairRows(PAIRS, batch=3, seed=0)
    table = reference(model, rows)
    before = preference_report(model, rows, table, 0.1)
    assert (before.margin, before.accuracy) == (0, 0)
    objective = dpo_objective(table, DPO())
    schedule = Schedule(peak=5e-3, final=5e-4, warmup=1, steps=12)
    config = TrainConfig(schedule=schedule, batch=3, micro_batch=1, weight_decay=0.0)
    steps = list(train(model, rows, lambda _: 0.0, config, objective=objective))
    assert steps[0].loss == pytest.approx(math.log(2))  # no preference yet
    assert steps[-1].loss < 0.5
    after = preference_report(model, rows, table, 0.1)
    assert after.accuracy == 1
    assert after.margin > 0.5


def test_rows_number_the_pairs_and_pad_the_halves():
    rows = PairRows(PAIRS, batch=2, seed=0)
    first, second = rows.in_order(2)
    assert first.inputs.shape == (2, 2 * 9)
    assert second.inputs.shape == (1, 2 * 8)
    assert first.documents is not None
    assert first.documents[:, [0, -1]].tolist() == [[0, 1], [2, 3]]
    assert int((first.targets[0, :9] >= 0).sum()) == 3
    assert int((first.targets[0, 9:] >= 0).sum()) == 6


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(DEMO)


def test_texts_are_taken_as_they_are(tokenizer):
    record = {"prompt": "import ", "chosen": "os\n", "rejected": "java"}
    ((chosen, rejected),) = pairs([record], tokenizer, plain_chat(tokenizer))
    decode = tokenizer.decode
    assert decode(chosen.ids.tolist()) == "<|endoftext|>import os\n<|endoftext|>"
    wanted = [decode(example.ids[example.wanted].tolist()) for example in (chosen, rejected)]
    assert [text.strip() for text in wanted] == ["os\n<|endoftext|>", "java<|endoftext|>"]


@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}], None])
def test_messages_are_written_in_the_chat_format(prompt, tokenizer):
    user = {"role": "user", "content": "a"}
    both = {
        key: ([] if prompt else [user]) + [{"role": "assistant", "content": text}]
        for key, text in (("chosen", "yes"), ("rejected", "no"))
    }
    record = {"prompt": prompt, **both}
    ((chosen, rejected),) = pairs([record], tokenizer, plain_chat(tokenizer))
    text = tokenizer.decode(chosen.ids.tolist())
    assert text == "<|endoftext|>### Instruction:\na\n\n### Response:\nyes<|endoftext|>"
    assert tokenizer.decode(rejected.ids[rejected.wanted].tolist()) == "no<|endoftext|>"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "example 1: 'rejected' is 'None'; expected text"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "example 1: 'prompt' is '3'"),
        (
            {"chosen": [{"role": "user", "content": "b"}], "rejected": []},
            "'chosen' does not end with a message of the assistant",
        ),
        (
            {"chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
            "example 1: 'chosen': a conversation needs at least one message",
        ),
    ],
)
def test_what_cannot_be_read(record, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        list(pairs([record], tokenizer, plain_chat(tokenizer)))


def test_long_pairs_are_cut_and_counted():
    same = AnswerPair(PAIRS[0].chosen, PAIRS[0].chosen)
    kept, cut = fitted_pairs([*PAIRS, pair(3, 9, 2, 2), same], 7)
    # of the third pair an answer token is left, of the fourth none; the last has no better answer
    assert (cut.kept, cut.truncated, cut.refused) == (3, 2, 2)
    assert max(len(example.ids) for found in kept for example in found) == 8
    with pytest.raises(ValueError, match="no pairs to train on"):
        PairRows([], batch=1, seed=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"beta": 0.0}, "beta is 0.0"), ({"smoothing": 0.5}, "label smoothing is 0.5")],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(ValueError, match=said):
        DPO(**settings)


def test_texts_need_neither_a_chat_format_nor_a_token_that_ends_them(tmp_path: Path):
    letters = tokenizers.train_characters(["abcd"], tmp_path)
    records = [{"prompt": "ab", "chosen": "c", "rejected": "d"}] * 3
    options = TaskOptions(context=8, batch=2)
    model = random_model(LLAMA, torch.float32)
    task = preference_task(records, records[:1], letters, options, DPO(), model)
    assert task.template is None
    batch = task.batches.at(0)
    assert (batch.inputs.shape, batch.targets.max()) == ((2, 4), letters.encode("d")[0])
    with pytest.raises(ValueError, match="so an answer could not end"):
        talks = [{"chosen": [{"role": "assistant", "content": "a"}]}]
        preference_task(talks, talks, letters, options, DPO(), model)
