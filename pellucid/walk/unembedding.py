"""From the residual stream to the next token, the last chapter of the walk.

T  tokens      C  width of the residual stream      V  vocabulary
"""

from __future__ import annotations

from functools import partial

import torch

from pellucid.walk.arithmetic import linear
from pellucid.walk.norms import norm_of
from pellucid.walk.steps import Script

script = Script(
    {
        "unembed": "unembed.weight",  # (V, C); a tied head is the embedding table itself
        "unembed_bias": "unembed.bias",  # (V)
    }
)
script.chapter("The next token")
once = partial(script.step, "once")

script.include(
    norm_of(
        "stream",
        "final_norm",
        "once",
        "final_norm",
        module="norm",
        title="The stream after the last layer, scaled",
        layer="The stream after the last layer, normalised",
    )
)


@once()
def last(final_norm, last_row):
    return final_norm[last_row]


def _rescaled(config, layer):
    return bool(config.logit_cap) or config.logit_scale != 1


def products(last, table, bias, dtype):
    """last · tableᵀ + bias; a table of another dtype is converted piece by piece."""
    rows = len(table) if table.dtype == dtype else 8192
    slabs = table.split(rows)
    biases = bias.split(rows) if isinstance(bias, torch.Tensor) else [bias] * len(slabs)
    pieces = zip(slabs, biases, strict=True)
    return torch.cat([linear(last, slab.to(dtype), piece) for slab, piece in pieces], dim=-1)


@once(
    "logits",
    "{last} · {unembed_stored}ᵀ + {unembed_bias}",
    index="last_row",
    when=lambda config, layer: not _rescaled(config, layer),
)
def logits(last, unembed_stored, unembed_bias, dialect, dtype, wide):
    """A score for every token of the vocabulary: how well it would follow"""
    result = products(last, unembed_stored, unembed_bias, dtype)
    return result.to(wide) if dialect.logits == "float32" else result


@once(
    "raw_logits",
    "{last} · {unembed_stored}ᵀ + {unembed_bias}",
    index="last_row",
    when=_rescaled,
)
def raw_logits(last, unembed_stored, unembed_bias, dtype):
    """A score for every token of the vocabulary, before all of them are changed together"""
    return products(last, unembed_stored, unembed_bias, dtype)


def _how_rescaled(config, layer):
    scaled = "{raw_logits}" + (" × {logit_scale}" if config.logit_scale != 1 else "")
    return f"{{logit_cap}} × tanh({scaled} / {{logit_cap}})" if config.logit_cap else scaled


@once("logits", _how_rescaled, called="logits", index="last_row", when=_rescaled)
def logits_rescaled(raw_logits, logit_scale, logit_cap, dialect, wide):
    """The scores, in the range that the model was trained with: how well each token would follow"""
    result = raw_logits * logit_scale
    if logit_cap:  # small ones stay as they are, large ones bend towards the cap
        result = torch.tanh(result / logit_cap) * logit_cap
    return result.to(wide) if dialect.logits == "float32" else result


@once("next_token", "argmax {logits}", dims="")
def next_token(logits):
    """The token with the highest score"""
    return logits.argmax(dim=-1)
