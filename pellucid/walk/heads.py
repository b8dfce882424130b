"""Queries, keys and values of one head, and how positions turn queries and keys.

    T    tokens            C    width of the residual stream     H  query heads
    Hkv  key/value heads   D    width of one head                D/2  pairs that RoPE turns

Written for the queries. Keys and values come about in the same way, from weights of their own:
several query heads may share one head of them (grouped-query attention, Ainslie et al., 2023).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

import torch

from pellucid.walk.arithmetic import linear, one_and, part_of_rms_norm, turned
from pellucid.walk.norms import norm_of
from pellucid.walk.steps import Script, When, Words

# ── The product ───────────────────────────────────────────────────────────────────────────────────

queries = Script()
each_layer, each_head = partial(queries.step, "layer"), partial(queries.step, "head")


@each_layer("layers.N.attn.wq_heads", "{wq_stored} in {n_heads} heads", dims="H D C")
def wq_heads(wq_stored, n_heads):
    """wq, head by head"""
    return wq_stored.unflatten(0, (n_heads, -1))


@each_head("layers.N.attn.wq_head", "head {head} of {wq_heads}", dims="D C")
def wq_head(wq_heads, head, dtype):
    """wq of head {head}"""
    return wq_heads[head].to(dtype)


def _clipped(config, layer):
    return config.qkv_clip > 0


@each_head(
    "layers.N.attn.q",
    "{attn_norm} · {wq_head}ᵀ + {bq_head}",
    when=lambda config, layer: not _clipped(config, layer),
)
def q(attn_norm, wq_head, bq_head):
    """Queries of head {head}: what each token looks for"""
    return linear(attn_norm, wq_head, bq_head)


@each_head(
    "layers.N.attn.q",
    "{attn_norm} · {wq_head}ᵀ + {bq_head}, cut to ± {qkv_clip}",
    title="Queries of head {head}: what each token looks for",
    called="q",
    when=_clipped,
)
def q_clipped(attn_norm, wq_head, bq_head, qkv_clip):
    return linear(attn_norm, wq_head, bq_head).clamp(-qkv_clip, qkv_clip)


# ── The norm of queries and keys ──────────────────────────────────────────────────────────────────


def _normed(how: str, last: bool) -> When:
    return lambda config, layer: config.qk_norm == how and config.qk_norm_last == last


def head_norm(x: str, variable: str, last: bool) -> Script:
    """The norm of each head on its own, of `x`, before RoPE or, `last`, after it.

    All heads have one weight (Qwen 3), or each has its own (Command R+).
    """
    script = Script()
    for how, weight in (("head", ""), ("each", "q_norm_weight_head")):
        one = norm_of(
            x,
            variable,
            "head",
            "layers.N.attn.q_normed",
            module="layers.N.attn.q_norm",
            title="Queries of head {head}, with every token scaled to the same size",
            layer="Queries of head {head}, with every token centred and of spread 1",
            weight=weight,
        )
        script.include(one, when=_normed(how, last))
    return script


_together, _turned_together = Script(), Script()
_scaled_together = Script({"q_norm_weight": "layers.N.attn.q_norm.weight"})


@_together.step(
    "layer",
    "layers.N.attn.q_side_by_side",
    "{attn_norm} · ({wq_heads} as one matrix)ᵀ + {bq}",
    dims="T H·D",
)
def q_side_by_side(attn_norm, wq_heads, bq, qkv_clip, dtype):
    """The queries of all heads, side by side: they are normalised together"""
    whole = linear(attn_norm, wq_heads.flatten(0, 1).to(dtype), bq)
    return whole.clamp(-qkv_clip, qkv_clip) if qkv_clip else whole


@_turned_together.step(
    "layer",
    "layers.N.attn.q_side_by_side_rotated",
    "{q_side_by_side}, each head turned by {cis}",
    dims="T H·D",
    when=lambda config, layer: layer.rope != "",
)
def q_side_by_side_rotated(q_side_by_side, cis, pairs, head_dim, dialect, dtype):
    """The same, every head turned by the position of its token"""
    heads = q_side_by_side.unflatten(-1, (-1, head_dim))
    a, b, rest = heads.tensor_split((pairs, 2 * pairs), dim=-1)
    numbers = torch.complex(a.to(cis.real.dtype), b.to(cis.real.dtype))
    there = turned(numbers, cis[:, None], dialect, dtype)
    there = torch.cat((there.real, there.imag, rest.to(cis.real.dtype)), dim=-1).flatten(1)
    return there if dialect.rope == "keep" else there.to(dtype)


@_scaled_together.step(
    "layer",
    "layers.N.attn.q_mean_square",
    "mean of {together}² over each row",
    dims="T 1",
)
def q_mean_square(together, dialect, wide):
    """How large the queries of all heads are, together"""
    inside = together.to(together.dtype if dialect.norm == "x" else wide)
    return inside.pow(2).mean(-1, keepdim=True)


@_scaled_together.step(
    "head",
    "layers.N.attn.q_normed",
    "{x} / √({q_mean_square} + {norm_eps}) × {q_norm_weight_head}",
    title="Queries of head {head}, scaled so that all heads together have one size",
    called="normed",
    when=lambda config, layer: not (config.norm_offset and config.norm_weight),
)
def scaled_together(x, q_mean_square, q_norm_weight_head, norm_eps, dialect, wide):
    return part_of_rms_norm(x, q_mean_square, q_norm_weight_head, norm_eps, dialect, wide)


@_scaled_together.step(
    "head",
    "layers.N.attn.q_normed",
    "{x} / √({q_mean_square} + {norm_eps}) × (1 + {q_norm_weight_head})",
    title="Queries of head {head}, scaled so that all heads together have one size",
    called="normed",
    when=lambda config, layer: config.norm_offset and config.norm_weight,
)
def scaled_together_beyond_one(x, q_mean_square, q_norm_weight_head, norm_eps, dialect, wide):
    weight = one_and(q_norm_weight_head, x, dialect, wide)
    return part_of_rms_norm(x, q_mean_square, weight, norm_eps, dialect, wide)


normed_first, normed_last = Script(), Script()
normed_first.include(head_norm("q", "q_normed", last=False))
normed_first.include(_together, when=_normed("whole", last=False))
normed_first.include(
    _scaled_together,
    {"x": "q", "normed": "q_normed", "together": "q_side_by_side"},
    when=_normed("whole", last=False),
)
normed_last.include(head_norm("q_rotated", "q_normed_last", last=True))
for part in (_together, _turned_together, _scaled_together):
    normed_last.include(
        part,
        {"x": "q_rotated", "normed": "q_normed_last", "together": "q_side_by_side_rotated"},
        when=_normed("whole", last=True),
    )


# ── The position of a token turns the pairs (the angles, cis (T, D/2): rope.py) ───────────────────

into_pairs, turning = Script(), Script()
each_head = partial(turning.step, "head")


def _turned_whole(config, layer):
    return layer.rope != "" and getattr(config, layer.rope).share == 1


def _turned_in_part(config, layer):
    return layer.rope != "" and getattr(config, layer.rope).share < 1


def _turned(config, layer):
    return layer.rope != ""


@into_pairs.step(
    "head",
    "layers.N.attn.q_pairs",
    "{q_normed}, component i beside i + D/2",
    dims="T D/2 2",
    when=_turned_whole,
)
def q_pairs(q_normed, wide):
    """Queries in pairs"""
    return torch.stack(q_normed.to(wide).chunk(2, dim=-1), dim=-1)


@into_pairs.step(
    "head",
    "layers.N.attn.q_pairs",
    "{q_normed}, of the first 2 × {pairs} component i beside i + {pairs}",
    title="Queries in pairs, as many of their components as are turned",
    called="q_pairs",
    dims="T D/2 2",
    when=_turned_in_part,
)
def q_pairs_of_some(q_normed, pairs, wide):
    return torch.stack(q_normed[:, : 2 * pairs].to(wide).chunk(2, dim=-1), dim=-1)


@each_head("layers.N.attn.q_complex", "a + i·b of {q_pairs}", dims="T D/2", when=_turned)
def q_complex(q_pairs):
    """Each pair as one complex number"""
    return torch.view_as_complex(q_pairs)


@each_head("layers.N.attn.q_turned", "{q_complex} × {cis}", dims="T D/2", when=_turned)
def q_turned(q_complex, cis, dialect, dtype):
    """Turned by the position of its token"""
    return turned(q_complex, cis, dialect, dtype)


@each_head("layers.N.attn.q_turned_pairs", "a, b of {q_turned}", dims="T D/2 2", when=_turned)
def q_turned_pairs(q_turned):
    """As pairs again"""
    return torch.view_as_real(q_turned)


@each_head(
    "layers.N.attn.q_rotated", "every a, then every b of {q_turned_pairs}", when=_turned_whole
)
def q_rotated(q_turned_pairs, dialect, dtype):
    """Merged: queries that know where they stand"""
    merged = torch.cat(q_turned_pairs.unbind(-1), dim=-1)
    return merged if dialect.rope == "keep" else merged.to(dtype)


@each_head(
    "layers.N.attn.q_rotated",
    "every a, then every b of {q_turned_pairs}, then the rest of {q_normed}",
    title="Merged: queries that know where they stand",
    called="q_rotated",
    when=_turned_in_part,
)
def q_rotated_in_part(q_turned_pairs, q_normed, pairs, dialect, dtype):
    merged = torch.cat(q_turned_pairs.unbind(-1), dim=-1)
    merged = merged if dialect.rope == "keep" else merged.to(dtype)
    return torch.cat((merged, q_normed[:, 2 * pairs :].to(merged.dtype)), dim=-1)


# ── Queries that grow with the position (Ministral 3) ─────────────────────────────────────────────

growing = Script()


def _growing(config, layer):
    return config.query_growth != 0


@growing.step(
    "once",
    "query_growth",
    "1 + {query_growth} × ln(1 + ⌊{positions} / {original_context}⌋)",
    dims="T",
    when=_growing,
)
def factors(positions, query_growth, original_context, wide, dtype):
    """A factor for each position: 1 within the context of the training, slowly more beyond it"""
    contexts = torch.floor(positions.to(wide) / original_context)
    return (1 + query_growth * torch.log(1 + contexts)).to(dtype)


@growing.step("head", "layers.N.attn.q_scaled", "{q_normed_last} × {factors}", when=_growing)
def q_scaled(q_normed_last, factors):
    """Queries of head {head}, each times the factor of its position"""
    return q_normed_last * factors[:, None]


# ── Keys and values, the same way ─────────────────────────────────────────────────────────────────


def _whose(config):
    """What a title calls a head of keys; where every query head has its own, just "head"."""
    return "head" if config.n_kv_heads == config.n_heads else "key/value head"


def same_for(letter: str, parts: Iterable[Script]) -> Script:
    """The steps of `parts`, written for queries, for keys ("k") or values ("v")."""
    script = Script()
    for part in parts:
        words = {word: _reworded(word, letter) for word in part.words()}
        words |= {"head": "kv_head", "n_heads": "n_kv_heads", "H": "Hkv", "H·D": "Hkv·D"}
        titles = {title: _title_for(title, letter) for title in part.titles()}
        script.include(part, words, titles)
    return script


def _reworded(word: str, letter: str) -> str:
    """``wq_head`` -> ``wk_head``, ``q_normed`` -> ``k_normed``, ``bq`` -> ``bk``."""
    return re.sub(r"^([wb]?)q(?=_|$)", rf"\g<1>{letter}", word)


def _title_for(title: str, letter: str) -> Words:
    """A title of queries, told of keys or values."""
    plural, why = {"k": ("Keys", "can be found by"), "v": ("Values", "hands over")}[letter]
    title = title.replace("wq", f"w{letter}").replace("looks for", why)
    title = title.replace("Queries", plural).replace("queries", plural.lower())
    if "s of head" not in title:
        return title
    return lambda config, layer: title.replace("s of head", f"s of {_whose(config)}")
