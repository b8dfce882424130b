"""Classification: the head sees the last real token, reports count right, a task is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens

from pellucid import checkpoints
from pellucid.models import adapters as lora
from pellucid.train import Schedule, TrainConfig, train
from pellucid.train.finetune.classify import (
    add_head,
    balance,
    classification_objective,
    classify,
    examined,
    labelled,
    load_head,
    save_head,
)
from pellucid.train.finetune.freeze import train_last_blocks, trainable
from pellucid.train.finetune.rows import ExampleRows, mean_loss

TEXTS = [random_tokens(LLAMA, 3 + 4 * n, seed=n).tolist() for n in range(4)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_score_is_of_the_last_token_of_each_text_alone(config, packed):
    model = random_model(config)
    weight = add_head(model, 3).weight
    alone = torch.stack([weight @ model.hidden(torch.tensor([ids]))[0, -1] for ids in TEXTS])
    torch.testing.assert_close(
        classify(model, TEXTS, rows=3), alone.softmax(-1), rtol=0, atol=1e-11
    )
    wanted = torch.tensor([2, 0, 1, 1])
    records = [{"text": n, "label": int(label)} for n, label in enumerate(wanted)]
    texts = dict(enumerate(TEXTS))
    records = [{"text": str(n), "label": record["label"]} for n, record in enumerate(records)]
    found, cut = labelled(records, ["0", "1", "2"], lambda text: texts[int(text)], 64)
    assert (cut.kept, cut.truncated) == (4, 0)
    rows = ExampleRows(found, context=30, batch=2, seed=0, packed=packed)
    loss = mean_loss(model, rows.in_order(2), classification_objective)
    assert loss == pytest.approx(F.cross_entropy(alone, wanted).item(), abs=1e-11)


@pytest.mark.peers
@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt2", "llama"])
def test_the_same_scores_as_transformers(config, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = random_model(config, torch.float32)
    checkpoints.save(tmp_path, config, model.state_dict())
    head = add_head(model, 3)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, pad_token_id=0
    ).eval()
    theirs.score.weight.data = head.weight.data
    with torch.no_grad():
        for ids in TEXTS:
            expected = theirs(torch.tensor([ids])).logits.softmax(-1)
            torch.testing.assert_close(classify(model, [ids]), expected, rtol=0, atol=1e-5)


def test_labels_in_order_and_counted():
    texts = [{"label": label} for label in ("spam", "ham", "spam")]
    assert balance(texts) == {"ham": 1, "spam": 2}
    assert list(balance([{"label": label} for label in (10, 9, 10)])) == ["9", "10"]
    assert list(balance([{"label": flag} for flag in (True, False)])) == ["False", "True"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a"}, "example 1: 'label' is None; expected a text or a number"),
        ({"text": "a", "label": " "}, "example 1: 'label' is ' '"),
        ({"text": "a", "label": "z"}, "example 1: label 'z' is none of 'x', 'y'"),
        ({"text": "", "label": "x"}, "example 1 has no text to classify"),
        ({"text": 3, "label": "x"}, "example 1: 'text' is '3'; expected text"),
    ],
)
def test_what_cannot_be_read(record, said):
    with pytest.raises(ValueError, match=said):
        labelled([record], ["x", "y"], lambda text: [1] * len(text), 8)


def test_long_texts_are_cut_and_counted():
    records = [{"text": "a" * 9, "label": "x"}, {"text": "aa", "label": "y"}]
    (first, _), cut = labelled(records, ["x", "y"], lambda text: [1] * len(text), 4)
    assert first.ids.tolist() == [1, 1, 1, 1, 0]
    assert (cut.kept, cut.truncated, cut.refused) == (2, 1, 0)


def test_one_label_is_too_few():
    with pytest.raises(ValueError, match="1 label in the data: classification needs 2"):
        add_head(random_model(LLAMA), 1)


def test_what_is_trained():
    model = random_model(LLAMA)
    block = sum(p.numel() for p in model.layers[0].parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert trainable(model) == (everything, everything)
    train_last_blocks(model, 1)
    assert trainable(model) == (block + 36, everything)
    train_last_blocks(model, 0)
    assert trainable(model) == (0, everything)
    with pytest.raises(ValueError, match="3 blocks to train: the model has 2"):
        train_last_blocks(model, 3)


@pytest.mark.parametrize("how", ["head", "last", "lora"])
def test_a_small_task_is_learnt_saved_and_loaded(how, tmp_path: Path):
    """Which of two tokens the text has: an attention head must find it."""
    model = random_model(LLAMA, torch.float32)
    if how == "lora":
        lora.inject(model, lora.LoraConfig(rank=4, targets=("all",)))
    else:
        train_last_blocks(model, int(how == "last"))
    add_head(model, 2)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(20, 97, (48, 8), generator=generator)
    wanted = torch.arange(48) % 2
    texts[torch.arange(48), torch.arange(48) % 7] = 5 + wanted
    lines = {str(n): ids for n, ids in enumerate(texts.tolist())}
    records = [{"text": str(n), "label": "ab"[wanted[n]]} for n in range(48)]
    found, _ = labelled(records, ["a", "b"], lambda text: lines[text], 64)
    rows = ExampleRows(found, context=64, batch=16, seed=0, packed=False)
    before = model.embed.weight.clone()
    schedule = Schedule(peak=2e-2, final=2e-3, warmup=2, steps=40)
    config = TrainConfig(schedule=schedule, batch=16, micro_batch=16, weight_decay=0.0)
    steps = list(
        train(
            model,
            rows,
            lambda model: mean_loss(model, rows.in_order(), classification_objective),
            config,
            objective=classification_objective,
        )
    )
    assert torch.equal(model.embed.weight, before)
    probabilities, labels = examined(model.eval(), found)
    assert torch.equal(labels, wanted)
    assert (probabilities.argmax(-1) == wanted).float().mean() > 0.9
    assert steps[-1].held_out_loss is not None
    assert steps[-1].held_out_loss < 0.4
    if how == "lora":
        lora.fold(model)
    save_head(tmp_path, model, ["a", "b"])
    again = random_model(LLAMA, torch.float32)
    again.load_state_dict({k: v for k, v in model.state_dict().items() if k != "score.weight"})
    assert load_head(tmp_path, again) == ["a", "b"]
    assert torch.equal(classify(again, texts.tolist()), classify(model, texts.tolist()))


def test_a_head_that_is_missing_damaged_or_of_another_model(tmp_path: Path):
    model = random_model(LLAMA)
    with pytest.raises(ValueError, match="no classification head: fine-tune one"):
        classify(model, TEXTS)
    with pytest.raises(FileNotFoundError, match="classifier.json is missing"):
        load_head(tmp_path, model)
    add_head(model, 2)
    save_head(tmp_path, model, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"the head is \(2, 36\); 3 labels on a model 36 wide"):
        load_head(tmp_path, random_model(LLAMA))
    (tmp_path / "classifier.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged classification head"):
        load_head(tmp_path, random_model(LLAMA))
