"""Weight-only quantisation of a loaded model, and what it costs.

lm = pellucid.load("demo")
quantise(lm.model, bits=4)                  # in place; generates, traces and diffs as before
quantise_checkpoint("demo", "demo-int4", Format(bits=4), text=["held-out.txt"])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pellucid import checkpoints, tokenizers
from pellucid.evaluate import compare_models
from pellucid.files import check_ordinary
from pellucid.models import Model
from pellucid.models.quantised import GROUP, Format
from pellucid.models.quantised import quantise as quantise_model
from pellucid.train import held_out_windows
from pellucid.train.data.documents import decoded

__all__ = ["Cost", "Format", "Quantisation", "quantisation_cost", "quantise", "quantise_checkpoint"]

WINDOWS = 64  # of text that the cost is measured on, spread over it


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What quantising did to a model's predictions on a text.

    perplexity_before, perplexity_after  of the same tokens
    kl_mean, kl_max                      KL(before ‖ after) in nats per token
    top1                                 share of tokens at which the likeliest next one is the same
    tokens                               predicted
    """

    perplexity_before: float
    perplexity_after: float
    kl_mean: float
    kl_max: float
    top1: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What `quantise_checkpoint` wrote; bytes of the weight files before and after."""

    source: str
    destination: str
    format: Format
    bytes_before: int
    bytes_after: int
    cost: Cost | None


def quantise(model: Model, bits: int = 8, group: int = GROUP, head_bits: int = 0) -> Model:
    """Quantise a model's matrices in place and return it.

    bits       8, 6 or 4, of the blocks' matrices; norms, biases and position embeddings stay
    group      neighbours in a row that share a scale: 32, 64 or 128
    head_bits  of embedding and head; 0: 8, or 6 where `bits` is 4

    Raises ValueError for other numbers, and for a model that is quantised already.
    """
    return quantise_model(model, Format(bits=bits, group=group, head_bits=head_bits))


def quantise_checkpoint(
    source: str | Path,
    destination: str | Path,
    how: Format,
    *,
    text: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> Quantisation:
    """Quantise a checkpoint into a new folder that every verb reads.

    text  files to measure the cost on: the model before against the model after

    Raises ValueError or OSError, in one line, where the source cannot be read, is quantised
    already, or the destination may not be written.
    """
    checkpoint = checkpoints.open_checkpoint(source)
    model = checkpoints.load_model(checkpoint)
    quantise_model(model, how)
    checkpoints.save_quantised(
        destination, model, how, tokenizer_from=checkpoint.folder, overwrite=overwrite
    )
    cost = None
    if text:
        tokens = _tokens(checkpoint, text)
        cost = quantisation_cost(checkpoints.load_model(checkpoint), model, tokens)
    return Quantisation(
        source=str(source),
        destination=str(destination),
        format=how,
        bytes_before=checkpoint.file_bytes,
        bytes_after=checkpoints.open_checkpoint(destination).file_bytes,
        cost=cost,
    )


def quantisation_cost(before: Model, after: Model, tokens: Sequence[int]) -> Cost:
    """The cost over a text's tokens, in windows of the context length, at most WINDOWS of them.

    ValueError for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: expected 2 or more to predict one")
    context = min(before.config.context_length, 1024)
    windows = held_out_windows(torch.tensor(list(tokens)), context, WINDOWS)
    seen = compare_models(before, after, windows)
    return Cost(
        perplexity_before=seen["perplexity_a"],
        perplexity_after=seen["perplexity_b"],
        kl_mean=seen["kl_mean"],
        kl_max=seen["kl_max"],
        top1=seen["top1"],
        tokens=windows[:, 1:].numel(),
    )


def _tokens(checkpoint: checkpoints.Checkpoint, text: Sequence[str | Path]) -> list[int]:
    tokenizer = tokenizers.load(checkpoint.folder)
    tokens: list[int] = []
    for path in map(Path, text):
        check_ordinary(path)
        tokens += tokenizer.encode(decoded(path.read_bytes(), path), bos=tokenizer.adds_bos)
    return tokens
