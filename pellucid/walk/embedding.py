"""From the text to the residual stream, the first chapters of the walk.

    T  tokens      C  width of the residual stream      V  vocabulary

Every model has a row of its embedding table for each token. Some add a row for each position
(GPT-2), normalise the sum (nanochat) or make it larger (Gemma).
"""

from __future__ import annotations

from functools import partial

import torch

from pellucid.walk.norms import norm_of
from pellucid.walk.steps import Script

script = Script(
    {
        "embedding": "embed.weight",  # (V, C)
        "pos_embedding": "pos_embed.weight",  # (context length, C)
    }
)
once = partial(script.step, "once")

script.chapter("From text to tokens")
script.show(
    "specials", "Special tokens, which no text can spell", "of the tokenizer", dims="specials"
)
script.show("tokens", "The prompt as token ids", "encode(text)", dims="T")
script.show("token_strings", "The text of each token", "decode(each token)", dims="T")

script.chapter("From tokens to vectors")


def _at_position(config, layer):
    return config.rope is None


def _changed(config, layer):
    return config.embed_norm or config.embed_scale != 1


def _title(config, layer):
    title = "Each token's row of the embedding table"
    more = _at_position(config, layer) or _changed(config, layer)
    return title if more else f"{title}: the residual stream begins"


@once("positions")
def positions(token_count, device):
    return torch.arange(token_count, device=device)


@once("embed", "rows {tokens} of {embedding_stored}", title=_title)
def embed(embedding_stored, tokens, dtype):
    return embedding_stored[tokens].to(dtype)


@once("pos_embed", "rows {positions} of {pos_embedding_stored}", when=_at_position)
def pos_embed(pos_embedding_stored, positions, dtype):
    """Each position's row of the position table"""
    return pos_embedding_stored[positions].to(dtype)


@once(
    "layers.0.resid_pre",
    "{embed} + {pos_embed}",
    title="The residual stream: what each token is, and where it stands",
    when=lambda config, layer: _at_position(config, layer) and not _changed(config, layer),
)
@once(
    "embed_at_position",
    "{embed} + {pos_embed}",
    title="What each token is, and where it stands",
    dims="T C",
    when=lambda config, layer: _at_position(config, layer) and _changed(config, layer),
)
def embed_at_position(embed, pos_embed):
    return embed + pos_embed


script.include(
    norm_of(
        "embed_at_position",
        "embed_normed",
        "once",
        "embed_normed",
        module="embed_norm",
        title="The embedding, with every token scaled to the same size",
        layer="The embedding, with every token centred and of spread 1",
    ),
    when=lambda config, layer: config.embed_norm,
)


@once(
    "embed_scaled",
    "{embed_normed} × {embed_scale}",
    when=lambda config, layer: config.embed_scale != 1,
)
def embed_scaled(embed_normed, embed_scale):
    """Every number times the same constant: the residual stream begins"""
    return embed_normed * embed_normed.new_tensor(embed_scale)
