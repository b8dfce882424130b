"""Attention, one head at a time: what each token looks for, finds and reads.

    T  tokens              C    width of the residual stream     D  width of one head
    H  query heads         Hkv  key/value heads

After Vaswani et al. (2017). The parts of a head, and how positions turn them, are in heads.py and
rope.py; here stands their order, who looks at whom, and what all heads add to the stream.
"""

from __future__ import annotations

from functools import partial

import torch

from pellucid.walk import heads, rope
from pellucid.walk.arithmetic import linear, side_by_side
from pellucid.walk.finish import is_finished, of_attention
from pellucid.walk.norms import in_four, norm_of
from pellucid.walk.steps import Script

# The biases bq, bk, bv and bo stand beside wq … wo. The weights are here (out, in), which GPT-2's
# own files have the other way round.
script = Script(
    {
        "wq": "layers.N.attn.q_proj.weight",  # (H·D, C)
        "wk": "layers.N.attn.k_proj.weight",  # (Hkv·D, C)
        "wv": "layers.N.attn.v_proj.weight",  # (Hkv·D, C)
        "wo": "layers.N.attn.o_proj.weight",  # (C, H·D)
        "sinks": "layers.N.attn.sinks",  # (H)
    }
)
once, each_layer = partial(script.step, "once"), partial(script.step, "layer")
each_head = partial(script.step, "head")


# ── Into attention ────────────────────────────────────────────────────────────────────────────────

script.chapter("into attention")


@each_layer("layers.N.resid_pre")
def resid_pre(stream):
    return stream


def _normed_before(config, layer):
    return config.norm_places != "after"


script.include(
    norm_of(
        "resid_pre",
        "attn_norm",
        "layer",
        "layers.N.attn_norm",
        module="layers.N.attn_norm",
        title="The stream, with every token scaled to the same size",
    ),
    when=lambda config, layer: _normed_before(config, layer) and config.norm == "rms",
)
script.include(
    in_four,
    when=lambda config, layer: _normed_before(config, layer) and config.norm == "layer",
)
script.show("wq", "The weights that make queries", dims="H·D C")
script.show("wk", "The weights that make keys", dims="Hkv·D C")
script.show("wv", "The weights that make values", dims="Hkv·D C")
script.show("wo", "The weights that lead from the heads back to the stream", dims="C H·D")


# ── Queries and keys, turned by position where the layer has a RoPE ───────────────────────────────

script.chapter("queries")
script.include(heads.queries)
script.include(heads.normed_first)
script.include(heads.into_pairs)
script.chapter("positions turn the queries")
script.include(rope.script)  # its angles, as complex numbers: cis (T, D/2)
script.include(heads.turning)
script.include(heads.normed_last)
script.include(heads.growing)
script.chapter("keys")
for_keys = (heads.queries, heads.normed_first, heads.into_pairs, heads.turning, heads.normed_last)
script.include(heads.same_for("k", for_keys))


# ── Who looks at whom ─────────────────────────────────────────────────────────────────────────────

script.chapter("who looks at whom")


@each_head(
    "layers.N.attn.scores",
    "{q_scaled} · {k_normed_last}ᵀ / √{head_dim}",
    when=lambda config, layer: not config.score_scale,
)
def scores(q_scaled, k_normed_last, head_dim, dialect):
    """How well each query fits each key"""
    # Where pairs stand side by side, as in Meta's code, the sum adds up, and rounds, in that order.
    if dialect.polar:
        q_scaled, k_normed_last = side_by_side(q_scaled), side_by_side(k_normed_last)
    fit = q_scaled @ k_normed_last.T
    return fit / head_dim**0.5 if dialect.scale == "divide" else fit * head_dim**-0.5


@each_head(
    "layers.N.attn.scores",
    "{q_scaled} · {k_normed_last}ᵀ × {score_scale}",
    title="How well each query fits each key",
    called="scores",
    when=lambda config, layer: config.score_scale != 0,
)
def scores_scaled(q_scaled, k_normed_last, score_scale, dialect):
    if dialect.polar:  # the order of the sum, as in Meta's code
        q_scaled, k_normed_last = side_by_side(q_scaled), side_by_side(k_normed_last)
    return q_scaled @ k_normed_last.T * score_scale


@each_head(
    "layers.N.attn.capped_scores",
    "{score_cap} × tanh({scores} / {score_cap})",
    when=lambda config, layer: config.score_cap > 0,
)
def capped_scores(scores, score_cap):
    """No score larger than the cap: small ones stay as they are, large ones bend towards it"""
    return torch.tanh(scores / score_cap) * score_cap


@once("mask", "row ≥ column of {positions}")
def mask(positions):
    """True where a token may look: at itself and back"""
    return positions[:, None] >= positions[None, :]


@once(
    "window_mask",
    "{mask} where row - column of {positions} < {window}",
    when=lambda config, layer: layer.window,
)
def window_mask(mask, positions, window):
    """True where a token of this layer may look: at itself and a few tokens back"""
    return mask & (positions[:, None] - positions[None, :] < window)


def _closed(config, layer):
    return "Scores with the future closed" + (", and what lies too far back" * layer.window)


@each_head(
    "layers.N.attn.masked_scores", "{capped_scores} where {window_mask}, else -∞", title=_closed
)
def masked_scores(capped_scores, window_mask, dialect):
    closed = float("-inf") if dialect.mask == "-inf" else torch.finfo(capped_scores.dtype).min
    return capped_scores.masked_fill(~window_mask, closed)


@each_head(
    "layers.N.attn.pattern",
    "softmax of {masked_scores} over each row",
    when=lambda config, layer: not config.sinks,
)
def pattern(masked_scores, dialect, dtype, wide):
    """Where each token looks: shares that sum to 1"""
    inside = wide if dialect.softmax == "float32" else masked_scores.dtype
    return torch.softmax(masked_scores, dim=-1, dtype=inside).to(dtype)


def _with_sink(config, layer):
    return config.sinks


@each_head(
    "layers.N.attn.scores_and_sink",
    "{masked_scores}, beside them number {head} of {sinks}",
    dims="T S+1",
    when=_with_sink,
)
def scores_and_sink(masked_scores, sinks, head):
    """One column more, the head's sink: how well it fits a query to look at nothing"""
    column = sinks[head].to(masked_scores.dtype).expand(len(masked_scores), 1)
    return torch.cat((masked_scores, column), dim=-1)


@each_head(
    "layers.N.attn.pattern",
    "softmax of {scores_and_sink} over each row, without the sink's column",
    called="pattern",
    when=_with_sink,
)
def pattern_beside_sink(scores_and_sink, dialect, dtype, wide):
    """Where each token looks: shares that sum to 1 with the sink's, which is left out"""
    inside = wide if dialect.softmax == "float32" else scores_and_sink.dtype
    return torch.softmax(scores_and_sink, dim=-1, dtype=inside)[:, :-1].to(dtype)


# ── What is handed over, and what all heads add to the stream ─────────────────────────────────────

script.chapter("values")
script.include(heads.same_for("v", (heads.queries,)))


@each_head("layers.N.attn.z", "{pattern} · {v}")
def z(pattern, v):
    """What head {head} read: the values, each with its share"""
    return pattern @ v


script.chapter("all heads together")


def _sharing(config, layer):
    own = config.n_kv_heads == config.n_heads
    return "{n_heads} heads" + ("" if own else ", key/value head = head // {group}")


@each_layer("layers.N.attn.z", _sharing)
def z_heads(z_of_heads, n_heads, group):
    """The same for every head"""
    return torch.stack(z_of_heads)


@each_layer("layers.N.attn.z_side_by_side", "{z_heads} in one row", dims="T H·D")
def z_side_by_side(z_heads):
    """All heads, side by side"""
    return torch.cat(z_heads.unbind(), dim=-1)


@each_layer(
    "layers.N.attn_out",
    "{z_side_by_side} · {wo}ᵀ + {bo}",
    title="What attention adds to the stream",
    when=lambda config, layer: not is_finished(config, layer),
)
@each_layer(
    "layers.N.attn.out",
    "{z_side_by_side} · {wo}ᵀ + {bo}",
    called="attn_product",
    title="What all heads read, led back to the width of the stream",
    when=is_finished,
)
def attn_out(z_side_by_side, wo, bo):
    return linear(z_side_by_side, wo, bo)


script.include(of_attention)


@each_layer(
    "layers.N.resid_mid",
    "{resid_pre} + {attn_out}",
    when=lambda config, layer: not config.parallel,
    otherwise="attn_norm",  # then the MLP reads what attention read
)
def resid_mid(resid_pre, attn_out):
    """The stream after attention"""
    return resid_pre + attn_out
