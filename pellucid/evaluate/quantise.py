"""Weight-only quantisation of a loaded model, and what it costs.

lm = pellucid.load("demo")
quantise(lm.model, bits=4)                  # in place; generates, traces and diffs as before
quantise_checkpoint("demo", "demo-int4", Format(bits=4), text=["held-out.txt"])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pellucid import checkpoints, tokenizers
from pellucid.evaluate import compare_models
from pellucid.files import check_ordinary
from pellucid.models import Model
from pellucid.models.levels import Products
from pellucid.models.quantised import Format, is_quantised
from pellucid.models.quantised import quantise as quantise_model
from pellucid.train import held_out_windows
from pellucid.train.data.documents import decoded

__all__ = ["Cost", "Format", "Quantisation", "quantisation_cost", "quantise", "quantise_checkpoint"]

WINDOWS = 64  # of text that the cost is measured on, spread over it
_INPUTS = 512, 32  # tokens of a window, and windows, that show what matrices are multiplied with
_LEAST_INPUTS = 4096  # tokens of a text whose first part shows that; a shorter one is too little


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
    """What `quantise_checkpoint` wrote; bytes of the weight files before and after.

    fitted_to  tokens of the text whose products the levels keep; 0: weights went to the nearest
    """

    source: str
    destination: str
    format: Format
    bytes_before: int
    bytes_after: int
    cost: Cost | None
    fitted_to: int = 0


def quantise(model: Model, bits: int = 8, group: int = 0, head_bits: int = 0) -> Model:
    """Quantise a model's matrices in place and return it.

    bits       8, 6 or 4, of the blocks' matrices; norms, biases and position embeddings stay
    group      neighbours in a row that share a scale: 32, 64 or 128; 0: 64, or where `bits` is 4,
               32 that share a scale and an offset
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

    text  files to measure the cost on: the model before against the model after. Of 4,096 tokens
          or more, the first three quarters show the inputs that matrices are multiplied with
          (`quantise_by_inputs`), and the cost is measured on the rest

    Raises ValueError or OSError, in one line, where the source cannot be read, is quantised
    already, or the destination may not be written.
    """
    checkpoint = checkpoints.open_checkpoint(source)
    model = checkpoints.load_model(checkpoint)
    tokens = _tokens(checkpoint, text) if text else []
    share = len(tokens) * 3 // 4 if len(tokens) >= _LEAST_INPUTS else 0
    windows = None
    if share and not is_quantised(model):
        length, most = _INPUTS
        length = min(length, model.config.context_length)
        windows = held_out_windows(torch.tensor(tokens[:share]), length, most)[:, :-1]
        how = replace(how, fitted=True)
        quantise_by_inputs(model, how, windows)
    else:
        quantise_model(model, how)
    checkpoints.save_quantised(
        destination, model, how, tokenizer_from=checkpoint.folder, overwrite=overwrite
    )
    cost = None
    if text:
        cost = quantisation_cost(checkpoints.load_model(checkpoint), model, tokens[share:])
    return Quantisation(
        source=str(source),
        destination=str(destination),
        format=how,
        bytes_before=checkpoint.file_bytes,
        bytes_after=checkpoints.open_checkpoint(destination).file_bytes,
        cost=cost,
        fitted_to=0 if windows is None else windows.numel(),
    )


@torch.no_grad()
def quantise_by_inputs(model: Model, how: Format, windows: Tensor) -> Model:
    """Quantise in place so that products with the inputs which `windows` (N, T) bring stay close.

    One pass over all windows at once: before a block runs, it runs once more to show its matrices'
    inputs, those that the quantised blocks before it make. Embedding and head are rounded to the
    nearest levels, as by `quantise`, and so are the errors.
    """
    hooks = [
        layer.register_forward_pre_hook(partial(_quantise_block, number, how))
        for number, layer in enumerate(model.layers)
    ]
    try:
        model.hidden(windows.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return quantise_model(model, how, rest=True)


def _quantise_block(number: int, how: Format, block: nn.Module, given: tuple[Any, ...]) -> None:
    """Before a block's forward pass with the arguments `given`."""
    modules = {
        path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)
    }
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(partial(_keep_input, inputs, path))
        for path, module in modules.items()
    ]
    try:
        block.forward(*given)
    finally:
        for hook in hooks:
            hook.remove()
    products: dict[int, Products] = {}  # by the tensor: q, k and v have the same inputs
    for path, module in modules.items():
        x = inputs[path]
        if id(x) not in products:
            wide = x.flatten(0, -2).float()
            products[id(x)] = Products(wide.T @ wide)
        whole = f"layers.{number}.{path}"
        made = how.made(whole, module)
        assert made is not None, "a linear layer is quantised"
        made.quantise_(module.weight.detach(), f"{whole}.weight", products[id(x)])
        parent, _, leaf = path.rpartition(".")
        setattr(block.get_submodule(parent), leaf, made)


def _keep_input(inputs: dict[str, Tensor], path: str, _: nn.Module, x: tuple[Tensor]) -> None:
    inputs[path] = x[0]


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
