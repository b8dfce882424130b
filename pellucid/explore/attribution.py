"""What leads to a prediction: the lens by layer, the parts of a logit, norms, heads, RoPE.

Functions that go through all layers are generators: they yield None after each, so that other
requests get turns in between, and their answer last.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid import graph
from pellucid.evaluate.heads import previous_token_score
from pellucid.explore.arithmetic import angle_of
from pellucid.explore.predictions import likeliest_of_rows, wide
from pellucid.explore.runs import ExploredRun

Answer = Generator[Any, None, None]
LENS_ROWS = 128  # tokens, where none are asked for
LENS_CELLS = 1 << 24  # logits at a time


def lens(
    run: ExploredRun, top: int, first: int = 0, last: int | None = None, at: range | None = None
) -> Answer:
    """The `top` likeliest tokens of each layer's stream, as if it were the last; per token.

    The stream that enters each layer, and what leaves the last one, which is the model's own
    output. Points share one product with the head, as many as `LENS_CELLS` holds.
    first, last  tokens, the last one excluded; None: `LENS_ROWS` of them
    at           numbers of `points`, one after the other; None: all
    """
    count, every = len(run.ids), points(run)
    last = count if last is None else last
    if not 0 <= first < last <= count:
        raise IndexError(f"tokens {first} to {last}: this run has {count}")
    first = max(first, last - LENS_ROWS)
    at = range(len(every)) if at is None else at
    if not 0 <= at.start < at.stop <= len(every):
        raise IndexError(f"points {at.start} to {at.stop}: this model has 0 to {len(every)}")
    wanted, rows = [every[place] for place in at], last - first
    step = max(1, LENS_CELLS // (rows * run.loaded.config.vocab_size))
    cells: list[list[dict[str, Any]]] = []
    while len(cells) < len(wanted):
        part = [stream for _, stream in wanted[len(cells) : len(cells) + step]]
        for logits in _as_if_last(run, part, first, last).split(rows):
            found = likeliest_of_rows(run.loaded.lm, logits, top)
            cells.append([{"top": best} for best in found])
        yield None
    names = [name for name, _ in wanted]
    tokens = run.tokens[first:last]
    yield {"layers": names, "from": at.start, "first": first, "tokens": tokens, "cells": cells}


def lens_below(run: ExploredRun, below: int) -> range:
    """The points of the lens below one that a single product holds; at the top one alone."""
    rows = min(len(run.ids), LENS_ROWS)
    count = max(1, LENS_CELLS // (rows * run.loaded.config.vocab_size))
    return range(below - 1 if below > len(run.stream) - 1 else max(0, below - count), below)


def _as_if_last(run: ExploredRun, streams: list[Tensor], first: int, last: int) -> Tensor:
    """Logits (rows of each stream in turn, V); of what leaves the model, its own."""
    own = streams[-1] is run.stream[-1]
    found = []
    if len(streams) > own:
        inner = torch.cat([each[:, first:last] for each in streams[: len(streams) - own]], dim=1)
        found.append(run.end(inner, edited=False)["logits"][0])
    if own:
        found += [run.logits(row)[None] for row in range(first, last)]
    return torch.cat(found)


def points(run: ExploredRun) -> list[tuple[str, Tensor]]:
    """Names and values (1, T, C) of the stream where it enters each layer and leaves the last."""
    names = [f"layers.{layer}.resid_pre" for layer in range(len(run.stream) - 1)]
    names.append(f"layers.{len(run.stream) - 2}.resid_post")
    return list(zip(names, run.stream, strict=True))


def norms(run: ExploredRun) -> dict[str, Any]:
    """The length of each token's stream at each point."""
    found = [(name, stream[0].double().norm(dim=-1).tolist()) for name, stream in points(run)]
    return {"points": [name for name, _ in found], "values": [values for _, values in found]}


@dataclass(frozen=True)
class Linear:
    """A norm of one row with its size held fixed: then it is linear in the row's parts.

    ``f(part) = (part − its mean) / size · weight``; `bias` is what is left without any part.
    """

    size: float
    centred: bool
    weight: Tensor
    bias: Tensor

    def __call__(self, part: Tensor) -> Tensor:
        """(C) -> (C)."""
        part = part - part.mean() if self.centred else part
        return part / self.size * self.weight


def fixed_norm(run: ExploredRun, module: str, row: Tensor) -> Linear:
    """A norm of the model at one row (C)."""
    config, weights = run.loaded.config, run.loaded.weights
    row = row.double()
    centred = config.norm == "layer"
    off = row - row.mean() if centred else row
    size = math.sqrt(float(off.square().mean()) + config.norm_eps)
    weight = torch.ones_like(row)
    if config.norm_weight:
        weight = weights[f"{module}.weight"].double() + config.norm_offset
    has_bias = centred and config.norm_bias
    bias = weights[f"{module}.bias"].double() if has_bias else torch.zeros_like(row)
    return Linear(size, centred, weight, bias)


def contributions(run: ExploredRun, row: int, token: int) -> Answer:
    """The parts that add up to a token's logit (before a cap on logits) at one row.

    The norms' sizes are held fixed, so everything behind them is linear: each head, each MLP, the
    embedding and the biases have a part of their own. Work is in float64.
    """
    config = run.loaded.config
    if not 0 <= token < config.vocab_size:
        raise ValueError(f"token {token}: the vocabulary is 0 to {config.vocab_size - 1}")
    final = fixed_norm(run, "norm", run.stream[-1][0, row])
    head = "embed" if config.tied else "unembed"
    direction = run.loaded.weight_row(f"{head}.weight", token).double() * config.logit_scale

    def part(vector: Tensor) -> float:
        return float(final(vector) @ direction)

    parts = [("embedding", part(run.stream[0][0, row].double()))]
    for layer in range(config.n_layers):
        parts += [(name, part(vector)) for name, vector in _of_layer(run, layer, row)]
        yield None
    bias = run.loaded.weights.get(f"{head}.bias")
    constant = float(final.bias @ direction)
    constant += float(bias[token]) * config.logit_scale if bias is not None else 0.0
    if constant:
        parts.append(("bias", constant))
    capped = bool(config.logit_cap)
    logit = float(run.logits(row)[token])
    if capped:
        logit = float(run.logits(row, "raw_logits")[token]) * config.logit_scale
    total = math.fsum(value for _, value in parts)
    yield {
        "logit": logit,
        "before": "the cap on logits" if capped else None,
        "parts": [{"name": name, "value": value} for name, value in parts],
        "sum": total,
        "difference": logit - total,
    }


def _of_layer(run: ExploredRun, layer: int, row: int) -> list[tuple[str, Tensor]]:
    """What each head, the MLP and the biases of a layer add to the stream at a row, (C) each."""
    config, weights, at = run.loaded.config, run.loaded.weights, f"layers.{layer}"
    z = run[f"{at}.attn.z[:,{row}]"].double()  # (H, D)
    matrix = weights[f"{at}.attn.o_proj.weight"].double().unflatten(1, z.shape)  # (C, H, D)
    heads = torch.einsum("chd,hd->hc", matrix, z)
    parts = [(f"{at}.attn.head.{head}", vector) for head, vector in enumerate(heads)]
    bias = weights.get(f"{at}.attn.o_proj.bias")
    if bias is not None:
        parts.append((f"{at}.attn.bias", bias.double()))
    mlp = "mlp.out" if graph.has(config, "mlp.out", layer) else "mlp_out"
    parts.append((f"{at}.mlp", run[f"{at}.{mlp}[{row}]"].double()))
    if config.norm_places != "before":
        attn = fixed_norm(run, f"{at}.attn_out_norm", run[f"{at}.attn.out[{row}]"])
        after = fixed_norm(run, f"{at}.mlp_out_norm", parts[-1][1])
        parts = [(n, (after if n.endswith("mlp") else attn)(vector)) for n, vector in parts]
        if config.norm == "layer" and config.norm_bias:
            parts.append((f"{at}.norms.bias", attn.bias + after.bias))
    parts = [(name, vector * config.residual_scale) for name, vector in parts]
    if any(edit.name.startswith(f"{at}.") for edit in run.edits):
        moved = run.stream[layer + 1][0, row].double() - run.stream[layer][0, row].double()
        parts.append((f"{at}.edits", moved - torch.stack([v for _, v in parts]).sum(0)))
    return parts


def heads(run: ExploredRun, layer: int) -> dict[str, Any]:
    """Of each head of a layer, over the prompt: where it looks, and how much it adds.

    entropy      of its pattern in nats, mean over the queries
    previous, first   share on the token before and on the first one, mean over the queries
    induction    share on what followed earlier copies of the query's token, mean over the queries
                 that have one; None where no token stands twice
    output_norm  length of what it adds to the stream, mean over the tokens
    """
    pattern = run[f"layers.{layer}.attn.pattern"].double()  # (1, H, T, S)
    z = run[f"layers.{layer}.attn.z"][0].double()  # (H, T, D)
    matrix = run.loaded.weights[f"layers.{layer}.attn.o_proj.weight"].double()
    added = torch.einsum("chd,htd->htc", matrix.unflatten(1, (len(z), -1)), z).norm(dim=-1).mean(-1)
    entropy = -(pattern * pattern.clamp(min=1e-300).log()).sum(-1).mean(-1)[0]
    previous = previous_token_score(pattern) if len(run.ids) > 1 else torch.zeros(len(z))
    follows = _follows(run.ids)
    looked = (pattern[0] * follows).sum(-1)[:, follows.any(-1)]  # (H, queries with a copy)
    return {
        "layer": layer,
        "heads": [
            {
                "head": head,
                "entropy": float(entropy[head]),
                "previous": float(previous[head]),
                "first": float(pattern[0, head, :, 0].mean()),
                "induction": float(looked[head].mean()) if looked.shape[1] else None,
                "output_norm": float(added[head]),
            }
            for head in range(len(z))
        ],
    }


def _follows(ids: list[int]) -> Tensor:
    """(T, T): whether key s comes right after an earlier copy of query t's token."""
    tokens = torch.tensor(ids)
    same = tokens[:, None] == tokens[None, :]
    earlier = same.tril(-1)  # (t, s): the same token, before
    return torch.nn.functional.pad(earlier, (1, 0))[:, :-1]


def rope(run: ExploredRun, layer: int, head: int, of: str, token: int) -> dict[str, Any]:
    """Each pair of a query or key before and after its turn, by its angle in radians."""
    config = run.loaded.config
    if not 0 <= layer < config.n_layers:
        raise IndexError(f"layer {layer}: this model has the layers 0 to {config.n_layers - 1}")
    if of not in ("q", "k"):
        raise ValueError(f"of is {of!r}: expected q or k")
    which = config.layer(layer).rope
    if not which:
        raise KeyError(f"layer {layer} has no RoPE: nothing turns there")
    turned = f"layers.{layer}.attn.{of}_rotated"
    source = graph.inputs(config, turned)[0]
    before = run[f"{source}[{head},{token}]"].double().tolist()
    after = run[f"{turned}[{head},{token}]"].double().tolist()
    pairs = run.shape(f"{which}.cos")[-1]
    found = []
    for pair in range(pairs):
        frequency, angle = angle_of(run, which, token, pair)
        found.append(
            {
                "pair": pair,
                "angle": angle,
                "before": [before[pair], before[pair + pairs]],
                "after": [after[pair], after[pair + pairs]],
                "wavelength": 2 * math.pi / frequency,
            }
        )
    return {"pairs": found, "pairing": "half", "rope": which, "untouched": len(after) - 2 * pairs}


def change_of_predictions(
    run: ExploredRun, other: ExploredRun, row: int, top: int = 10
) -> list[dict[str, Any]]:
    """The likeliest next tokens of both runs at a row, with their probability before and after.

    Models with different tokenizers meet in a token's text; None where it is no single token.
    """
    shares = [wide(each.logits(row)).softmax(-1) for each in (run, other)]
    found: dict[str, tuple[int | None, int | None]] = {}
    for here, (one, two) in enumerate(((run, other), (other, run))):
        for id in shares[here].topk(min(top, len(shares[here]))).indices.tolist():
            text, there = one.loaded.text(id), _same_token(one, two, id)
            found.setdefault(text, (id, there) if one is run else (there, id))
    rows = [
        {
            "id": first if first is not None else second,
            "text": text,
            "before": None if first is None else float(shares[0][first]),
            "after": None if second is None else float(shares[1][second]),
        }
        for text, (first, second) in found.items()
    ]
    return sorted(rows, key=lambda entry: -max(entry["before"] or 0, entry["after"] or 0))


def _same_token(run: ExploredRun, other: ExploredRun, id: int) -> int | None:
    """The id in the other run's vocabulary of the token with the same text."""
    text = run.loaded.text(id)
    if id < other.loaded.config.vocab_size and other.loaded.text(id) == text:
        return id
    alone = other.loaded.lm.tokenizer.encode(text)
    return alone[0] if len(alone) == 1 and other.loaded.text(alone[0]) == text else None
