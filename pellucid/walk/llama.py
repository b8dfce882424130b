"""Llama, worked out on paper: from the text to the next token, one named tensor at a time.

Read it from top to bottom. Each function is one step; its arguments are the values it needs, found
by their names: earlier steps, weights, fields of the config. There is no batch axis.

    T  tokens              C    width of the residual stream     V  vocabulary
    H  query heads         Hkv  key/value heads                  F  hidden width of the MLP
    D  width of one head   D/2  pairs that RoPE turns: pair i is components i and i + D/2

    tokens ── embed ──┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ── … ── norm ── logits
                      └─────────────────────┘  └──────────────────┘

After Touvron et al. (2023) and Dubey et al. (2024). The arithmetic is written out here once more,
apart from the models', so that either can bear witness against the other.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from pellucid.walk import rope
from pellucid.walk.steps import Script

# The name a step uses -> the checkpoint's. wq … w3 are the letters of Meta's code. Their biases
# bq … b3 are 0 in every released Llama; in bfloat16 x @ w.T + b rounds twice, a fused kernel once.
script = Script(
    weights={
        "embedding": "embed.weight",  # (V, C)
        "attn_norm_weight": "layers.N.attn_norm.weight",  # (C)
        "wq": "layers.N.attn.q_proj.weight",  # (H·D, C)
        "wk": "layers.N.attn.k_proj.weight",  # (Hkv·D, C)
        "wv": "layers.N.attn.v_proj.weight",  # (Hkv·D, C)
        "wo": "layers.N.attn.o_proj.weight",  # (C, H·D)
        "mlp_norm_weight": "layers.N.mlp_norm.weight",  # (C)
        "w1": "layers.N.mlp.gate_proj.weight",  # (F, C)
        "w3": "layers.N.mlp.up_proj.weight",  # (F, C)
        "w2": "layers.N.mlp.down_proj.weight",  # (C, F)
        "final_norm_weight": "norm.weight",  # (C)
        "unembed": "unembed.weight",  # (V, C); a tied head is the embedding table itself
    }
)
once, each_layer = partial(script.step, "once"), partial(script.step, "layer")
each_kv_head, each_head = partial(script.step, "kv_head"), partial(script.step, "head")


# ── From text to vectors ──────────────────────────────────────────────────────────────────────────

script.show(
    "specials", "Special tokens, which no text can spell", "of the tokenizer", dims="specials"
)
script.show("tokens", "The prompt as token ids", "encode(text)", dims="T")
script.show("token_strings", "The text of each token", "decode(each token)", dims="T")


@once("positions")
def positions(token_count, device):
    return torch.arange(token_count, device=device)


@once("embed", "rows {tokens} of {embedding_stored}")
def embed(embedding_stored, tokens, dtype):
    """Each token's row of the embedding table: the residual stream begins"""
    return embedding_stored[tokens].to(dtype)


# ── Attention: queries ────────────────────────────────────────────────────────────────────────────


@each_layer("layers.N.resid_pre")
def resid_pre(stream):
    return stream


def rms_norm(x, weight, eps, dialect, wide):
    """Root mean square norm of each row (Zhang & Sennrich, 2019)."""
    inside = x.to(x.dtype if dialect.norm == "x" else wide)
    scaled = inside * torch.rsqrt(inside.pow(2).mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight


@each_layer("layers.N.attn_norm", "{resid_pre} / √(mean square + {norm_eps}) × {attn_norm_weight}")
def attn_norm(resid_pre, attn_norm_weight, norm_eps, dialect, wide):
    """The stream, with every token scaled to the same size"""
    return rms_norm(resid_pre, attn_norm_weight, norm_eps, dialect, wide)


script.show("wq", "The weights that make queries", dims="H·D C")
script.show("wk", "The weights that make keys", dims="Hkv·D C")
script.show("wv", "The weights that make values", dims="Hkv·D C")
script.show("wo", "The weights that lead from the heads back to the stream", dims="C H·D")


@each_layer("layers.N.attn.wq_heads", "{wq_stored} in {n_heads} heads", dims="H D C")
def wq_heads(wq_stored, n_heads):
    """wq, head by head"""
    return wq_stored.unflatten(0, (n_heads, -1))


@each_head("layers.N.attn.wq_head", "head {head} of {wq_heads}", dims="D C")
def wq_head(wq_heads, head, dtype):
    """wq of head {head}"""
    return wq_heads[head].to(dtype)


@each_head("layers.N.attn.q", "{attn_norm} · {wq_head}ᵀ + {bq_head}")
def q(attn_norm, wq_head, bq_head):
    """Queries of head {head}: what each token looks for"""
    return attn_norm @ wq_head.T + bq_head


@each_head("layers.N.attn.q_pairs", "{q}, component i beside i + D/2", dims="T D/2 2")
def q_pairs(q, wide):
    """Queries in pairs"""
    return torch.stack(q.to(wide).chunk(2, dim=-1), dim=-1)


# ── The position of a token turns the pairs ──────────────────────────────────────────────────────

script.include(rope.script)  # its angles, as complex numbers: cis (T, D/2)


def turned(number, cis, dialect, dtype):
    """The product with cis, a turn by its angle, in the dialect's rounding."""
    if dialect.rope != "x":
        return number * cis
    # The same product, every operation rounded: (a + ib)(c + is) = (ac - bs) + i(bc + as)
    a, b, c, s = (part.to(dtype) for part in (number.real, number.imag, cis.real, cis.imag))
    return torch.complex((a * c - b * s).to(cis.real.dtype), (b * c + a * s).to(cis.real.dtype))


@each_head("layers.N.attn.q_complex", "a + i·b of {q_pairs}", dims="T D/2")
def q_complex(q_pairs):
    """Each pair as one complex number"""
    return torch.view_as_complex(q_pairs)


@each_head("layers.N.attn.q_turned", "{q_complex} × {cis}", dims="T D/2")
def q_turned(q_complex, cis, dialect, dtype):
    """Turned by the position of its token"""
    return turned(q_complex, cis, dialect, dtype)


@each_head("layers.N.attn.q_turned_pairs", "a, b of {q_turned}", dims="T D/2 2")
def q_turned_pairs(q_turned):
    """As pairs again"""
    return torch.view_as_real(q_turned)


@each_head("layers.N.attn.q_rotated", "every a, then every b of {q_turned_pairs}")
def q_rotated(q_turned_pairs, dialect, dtype):
    """Merged: queries that know where they stand"""
    merged = torch.cat(q_turned_pairs.unbind(-1), dim=-1)
    return merged if dialect.rope == "keep" else merged.to(dtype)


# ── Attention: keys, the same way; several query heads may share one key/value head ───────────────


@each_layer("layers.N.attn.wk_heads", "{wk_stored} in {n_kv_heads} heads", dims="Hkv D C")
def wk_heads(wk_stored, n_kv_heads):
    """wk, head by head"""
    return wk_stored.unflatten(0, (n_kv_heads, -1))


@each_kv_head("layers.N.attn.wk_head", "head {kv_head} of {wk_heads}", dims="D C")
def wk_head(wk_heads, kv_head, dtype):
    """wk of head {kv_head}"""
    return wk_heads[kv_head].to(dtype)


@each_kv_head("layers.N.attn.k", "{attn_norm} · {wk_head}ᵀ + {bk_head}")
def k(attn_norm, wk_head, bk_head):
    """Keys of key/value head {kv_head}: what each token can be found by"""
    return attn_norm @ wk_head.T + bk_head


@each_kv_head("layers.N.attn.k_pairs", "{k}, component i beside i + D/2", dims="T D/2 2")
def k_pairs(k, wide):
    """Keys in pairs"""
    return torch.stack(k.to(wide).chunk(2, dim=-1), dim=-1)


@each_kv_head("layers.N.attn.k_complex", "a + i·b of {k_pairs}", dims="T D/2")
def k_complex(k_pairs):
    """Each pair as one complex number"""
    return torch.view_as_complex(k_pairs)


@each_kv_head("layers.N.attn.k_turned", "{k_complex} × {cis}", dims="T D/2")
def k_turned(k_complex, cis, dialect, dtype):
    """Turned by the position of its token"""
    return turned(k_complex, cis, dialect, dtype)


@each_kv_head("layers.N.attn.k_turned_pairs", "a, b of {k_turned}", dims="T D/2 2")
def k_turned_pairs(k_turned):
    """As pairs again"""
    return torch.view_as_real(k_turned)


@each_kv_head("layers.N.attn.k_rotated", "every a, then every b of {k_turned_pairs}")
def k_rotated(k_turned_pairs, dialect, dtype):
    """Merged: keys that know where they stand"""
    merged = torch.cat(k_turned_pairs.unbind(-1), dim=-1)
    return merged if dialect.rope == "keep" else merged.to(dtype)


# ── Attention: who looks at whom, and what is handed over ─────────────────────────────────────────


def side_by_side(x):
    """Components i and i + D/2 as neighbours, (T, D)."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


@each_head("layers.N.attn.scores", "{q_rotated} · {k_rotated}ᵀ / √{head_dim}")
def scores(q_rotated, k_rotated, head_dim, dialect):
    """How well each query fits each key"""
    # Where pairs stand side by side, as in Meta's code, the sum adds up, and rounds, in that order.
    if dialect.polar:
        q_rotated, k_rotated = side_by_side(q_rotated), side_by_side(k_rotated)
    fit = q_rotated @ k_rotated.T
    return fit / head_dim**0.5 if dialect.scale == "divide" else fit * head_dim**-0.5


@once("mask", "row ≥ column of {positions}")
def mask(positions):
    """True where a token may look: at itself and back"""
    return positions[:, None] >= positions[None, :]


@each_head("layers.N.attn.masked_scores", "{scores} where {mask}, else -∞")
def masked_scores(scores, mask, dialect):
    """Scores with the future closed"""
    closed = float("-inf") if dialect.mask == "-inf" else torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, closed)


@each_head("layers.N.attn.pattern", "softmax of {masked_scores} over each row")
def pattern(masked_scores, dialect, dtype, wide):
    """Where each token looks: shares that sum to 1"""
    inside = wide if dialect.softmax == "float32" else masked_scores.dtype
    return torch.softmax(masked_scores, dim=-1, dtype=inside).to(dtype)


@each_layer("layers.N.attn.wv_heads", "{wv_stored} in {n_kv_heads} heads", dims="Hkv D C")
def wv_heads(wv_stored, n_kv_heads):
    """wv, head by head"""
    return wv_stored.unflatten(0, (n_kv_heads, -1))


@each_kv_head("layers.N.attn.wv_head", "head {kv_head} of {wv_heads}", dims="D C")
def wv_head(wv_heads, kv_head, dtype):
    """wv of head {kv_head}"""
    return wv_heads[kv_head].to(dtype)


@each_kv_head("layers.N.attn.v", "{attn_norm} · {wv_head}ᵀ + {bv_head}")
def v(attn_norm, wv_head, bv_head):
    """Values of key/value head {kv_head}: what each token hands over"""
    return attn_norm @ wv_head.T + bv_head


@each_head("layers.N.attn.z", "{pattern} · {v}")
def z(pattern, v):
    """What head {head} read: the values, each with its share"""
    return pattern @ v


@each_layer("layers.N.attn.z", "{n_heads} heads, key/value head = head // {group}")
def z_heads(z_of_heads, n_heads, group):
    """The same for every head"""
    return torch.stack(z_of_heads)


@each_layer("layers.N.attn.z_side_by_side", "{z_heads} in one row", dims="T H·D")
def z_side_by_side(z_heads):
    """All heads, side by side"""
    return torch.cat(z_heads.unbind(), dim=-1)


@each_layer("layers.N.attn_out", "{z_side_by_side} · {wo}ᵀ + {bo}")
def attn_out(z_side_by_side, wo, bo):
    """What attention adds to the stream"""
    return z_side_by_side @ wo.T + bo


@each_layer("layers.N.resid_mid", "{resid_pre} + {attn_out}")
def resid_mid(resid_pre, attn_out):
    """The stream after attention"""
    return resid_pre + attn_out


# ── The MLP: SwiGLU (Shazeer, 2020) ───────────────────────────────────────────────────────────────


@each_layer("layers.N.mlp_norm", "{resid_mid} / √(mean square + {norm_eps}) × {mlp_norm_weight}")
def mlp_norm(resid_mid, mlp_norm_weight, norm_eps, dialect, wide):
    """The stream, scaled again"""
    return rms_norm(resid_mid, mlp_norm_weight, norm_eps, dialect, wide)


script.show("w1", "The weights of the gate", dims="F C")
script.show("w3", "The weights of what the gate lets through", dims="F C")
script.show("w2", "The weights that lead back to the stream", dims="C F")


@each_layer("layers.N.mlp.gate", "{mlp_norm} · {w1}ᵀ + {b1}")
def gate(mlp_norm, w1, b1):
    """The gate of each hidden unit"""
    return mlp_norm @ w1.T + b1


@each_layer("layers.N.mlp.act", "silu({gate}) = gate × sigmoid(gate)")
def act(gate):
    """How far each gate opens"""
    return F.silu(gate)


@each_layer("layers.N.mlp.up", "{mlp_norm} · {w3}ᵀ + {b3}")
def up(mlp_norm, w3, b3):
    """What stands before the gates"""
    return mlp_norm @ w3.T + b3


@each_layer("layers.N.mlp.hidden", "{act} × {up}")
def hidden(act, up):
    """What gets through"""
    return act * up


@each_layer("layers.N.mlp_out", "{hidden} · {w2}ᵀ + {b2}")
def mlp_out(hidden, w2, b2):
    """What the MLP adds to the stream"""
    return hidden @ w2.T + b2


@each_layer("layers.N.resid_post", "{resid_mid} + {mlp_out}")
def resid_post(resid_mid, mlp_out):
    """The stream after the layer"""
    return resid_mid + mlp_out


# ── From vectors back to text ─────────────────────────────────────────────────────────────────────


@once("final_norm", "{stream} / √(mean square + {norm_eps}) × {final_norm_weight}")
def final_norm(stream, final_norm_weight, norm_eps, dialect, wide):
    """The stream after the last layer, scaled"""
    return rms_norm(stream, final_norm_weight, norm_eps, dialect, wide)


@once()
def last(final_norm, last_row):
    return final_norm[last_row]


@once("logits", "{last} · {unembed_stored}ᵀ", index="last_row")
def logits(last, unembed_stored, dialect, dtype, wide):
    """A score for every token of the vocabulary: how well it would follow"""
    same = unembed_stored.dtype == dtype
    slabs = unembed_stored.split(len(unembed_stored) if same else 8192)  # else converted piecewise
    result = torch.cat([last @ slab.to(dtype).T for slab in slabs], dim=-1)
    return result.to(wide) if dialect.logits == "float32" else result


@once("next_token", "argmax {logits}", dims="")
def next_token(logits):
    """The token with the highest score"""
    return logits.argmax(dim=-1)
