"""The book's recipe against its loop, written anew from its description: same seeds, same losses.

"Build a Large Language Model (From Scratch)" trains in chapter 5 with a model of chapter 4 and a
loader of chapter 2. What follows is that arithmetic with none of Pellucid in it: its own layer norm
and GELU, attention step by step, torch's DataLoader, and a loop that evaluates along the way and so
moves the random numbers on.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pellucid.cli import main
from pellucid.models import Decoder, GPTConfig
from pellucid.train import (
    LoaderBatches,
    Schedule,
    TrainConfig,
    held_out_windows,
    new_model,
    plain_next_token_objective,
    train,
)
from pellucid.train.data.token_source import TokenTensor

CONTEXT, WIDTH, LAYERS, HEADS, DROPOUT = 8, 16, 2, 2, 0.1


class BookNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


class BookGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class BookAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            part(x).view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        future = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool), diagonal=1)
        scores = (q @ k.transpose(2, 3)).masked_fill(future, -torch.inf)
        weights = self.dropout(torch.softmax(scores / (WIDTH // HEADS) ** 0.5, dim=-1))
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, WIDTH))


class BookBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = BookAttention()
        wide = 4 * WIDTH
        self.mlp = nn.Sequential(nn.Linear(WIDTH, wide), BookGelu(), nn.Linear(wide, WIDTH))
        self.norm1, self.norm2 = BookNorm(WIDTH), BookNorm(WIDTH)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class BookGPT(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*[BookBlock() for _ in range(LAYERS)])
        self.norm = BookNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(self.dropout(x))))


def book_model(vocab: int) -> BookGPT:
    torch.manual_seed(123)
    return BookGPT(vocab)


def our_model(vocab: int) -> Decoder:
    config = GPTConfig(
        vocab_size=vocab,
        context_length=CONTEXT,
        width=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        qkv_bias=False,
        tied=False,
        embed_dropout=DROPOUT,
        attn_dropout=DROPOUT,
        resid_dropout=DROPOUT,
    )
    return new_model(config, 123, "torch")


def loader(ids: list[int], shuffle: bool) -> DataLoader:
    places = range(0, len(ids) - CONTEXT, CONTEXT)
    inputs = torch.tensor([ids[at : at + CONTEXT] for at in places])
    targets = torch.tensor([ids[at + 1 : at + CONTEXT + 1] for at in places])
    data = TensorDataset(inputs, targets)
    return DataLoader(data, batch_size=2, shuffle=shuffle, drop_last=shuffle)


def mean_loss(model: nn.Module, batches: DataLoader, most: int) -> float:
    losses = []
    for number, (inputs, targets) in enumerate(batches):
        if number == most:
            break
        logits = model(inputs)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    return sum(losses) / len(losses)


def book_loop(model: nn.Module, training: list[int], held_out: list[int], epochs: int):
    """(loss of every step, (training, held-out) loss of every evaluation).

    Seeded before the model is made, and not again: dropout and the loader go on from its numbers.
    """
    train_loader, val_loader = loader(training, True), loader(held_out, False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    losses, evaluations, step = [], [], -1
    for _ in range(epochs):
        model.train()
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
            if step % 5 == 0:
                model.eval()
                with torch.no_grad():
                    pair = mean_loss(model, train_loader, 5), mean_loss(model, val_loader, 5)
                evaluations.append(pair)
                model.train()
    return losses, evaluations


@pytest.fixture
def story(tmp_path: Path) -> Path:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog"]
    generator = torch.Generator().manual_seed(4)
    picks = torch.randint(len(words), (90,), generator=generator).tolist()
    path = tmp_path / "story.txt"
    path.write_text(" ".join(words[pick] for pick in picks), encoding="utf-8")
    return path


def test_the_preset_repeats_the_book_s_loop_seed_for_seed(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    small = [f"--context={CONTEXT}", f"--width={WIDTH}", f"--layers={LAYERS}", f"--heads={HEADS}"]
    options = ["--tokenizer=characters", "--epochs=2", "--prompt=the", "--no-tensorboard"]
    command = ["train", "--preset=book-gpt2", "--data", str(story), "--out", str(out)]
    assert main([*command, *small, *options, "--no-plot"]) == 0
    said = capsys.readouterr().out

    text = story.read_text()
    characters = sorted(set(text))
    ids = [characters.index(character) for character in text]
    cut = int(0.9 * len(ids))
    losses, evaluations = book_loop(book_model(len(characters)), ids[:cut], ids[cut:], epochs=2)
    rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()[1:]]
    assert len(losses) > 30
    assert len(evaluations) > 5
    assert [float(row[4]) for row in rows] == pytest.approx(losses, abs=2e-6)
    # Every fifth step, counted from the first, as the book prints them.
    shown = [f"training text {one:.3f}, validation text {other:.3f}" for one, other in evaluations]
    assert [line.split(": ")[1] for line in said.splitlines() if ": training text" in line][
        : len(shown)
    ] == shown


def test_with_one_model_the_two_loops_agree_to_the_bit():
    ids = torch.randint(31, (300,), generator=torch.Generator().manual_seed(5)).tolist()
    training, held_out = ids[:260], ids[260:]
    losses, evaluations = book_loop(our_model(31), training, held_out, epochs=1)

    model = our_model(31)
    source = TokenTensor(torch.tensor(training))
    batches = LoaderBatches(source, context=CONTEXT, batch=2, eval_every=5, eval_batches=5)
    config = TrainConfig(
        schedule=Schedule(peak=4e-4, final=0.0, warmup=0, steps=len(losses), shape="constant"),
        batch=2,
        micro_batch=2,
        weight_decay=0.1,
        decay_all=True,
        betas=(0.9, 0.999),
        fused=False,
        clip=0.0,
        eval_every=5,
        eval_first=True,
    )
    windows = held_out_windows(torch.tensor(held_out), CONTEXT)
    done = list(train(model, batches, windows, config, objective=plain_next_token_objective))
    assert [progress.loss for progress in done] == losses
    judged = [progress.held_out_loss for progress in done if progress.held_out_loss]
    wanted = [held_out_loss for _, held_out_loss in evaluations]
    assert judged[: len(wanted)] == pytest.approx(wanted, abs=1e-6)


def test_the_book_s_weights_are_ours_when_the_seed_is():
    book, ours = book_model(31), our_model(31)
    assert ours.unembed is not None
    assert torch.equal(ours.embed.weight, book.tokens.weight)
    assert torch.equal(ours.pos_embed.weight, book.positions.weight)
    assert torch.equal(ours.unembed.weight, book.head.weight)
    last = book.blocks[-1]
    assert torch.equal(ours.layers[-1].attn.q_proj.weight, last.attention.query.weight)
    assert torch.equal(ours.layers[-1].attn.o_proj.bias, last.attention.out.bias)
    assert torch.equal(ours.layers[-1].mlp.down_proj.weight, last.mlp[2].weight)
