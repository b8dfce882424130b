"""GPT-2, worked out on paper: from the text to the next token, one named tensor at a time.

Read it from top to bottom. Each function is one step; its arguments are the values it needs, found
by their names: earlier steps, weights, fields of the config. There is no batch axis.

    T  tokens      C  width of the residual stream      F  hidden width of the MLP
    H  heads       D  width of one head = C / H         V  vocabulary

    tokens ── embed + pos_embed ──┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ── … ── norm ── logits
                                  └─────────────────────┘  └───────────────┘

After Radford et al. (2019). Against Llama: positions are learned vectors instead of turns, the
norm is a LayerNorm, every product has a bias, the MLP has a GELU and no gate, the head is the
embedding table. The arithmetic is written out here once more, apart from the models', so that
either can bear witness against the other.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

from pellucid.walk.steps import Script

# The name a step uses -> the checkpoint's. The biases bq, bk, bv, bo, b_up and b_down stand beside
# wq … w_down; the weights are here (out, in), which GPT-2's own files have the other way round.
script = Script(
    weights={
        "embedding": "embed.weight",  # (V, C)
        "pos_embedding": "pos_embed.weight",  # (context length, C)
        "attn_norm_weight": "layers.N.attn_norm.weight",  # (C)
        "attn_norm_bias": "layers.N.attn_norm.bias",  # (C)
        "wq": "layers.N.attn.q_proj.weight",  # (H·D, C)
        "wk": "layers.N.attn.k_proj.weight",  # (H·D, C)
        "wv": "layers.N.attn.v_proj.weight",  # (H·D, C)
        "wo": "layers.N.attn.o_proj.weight",  # (C, H·D)
        "mlp_norm_weight": "layers.N.mlp_norm.weight",  # (C)
        "mlp_norm_bias": "layers.N.mlp_norm.bias",  # (C)
        "w_up": "layers.N.mlp.up_proj.weight",  # (F, C)
        "w_down": "layers.N.mlp.down_proj.weight",  # (C, F)
        "final_norm_weight": "norm.weight",  # (C)
        "final_norm_bias": "norm.bias",  # (C)
        "unembed": "unembed.weight",  # (V, C); a tied head is the embedding table itself
    }
)
once, each_layer = partial(script.step, "once"), partial(script.step, "layer")
each_head = partial(script.step, "head")


def linear(x, weight, bias):
    """x · weightᵀ + bias, rounded once."""
    return F.linear(x, weight, bias if isinstance(bias, torch.Tensor) else None)


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
    """Each token's row of the embedding table"""
    return embedding_stored[tokens].to(dtype)


@once("pos_embed", "rows {positions} of {pos_embedding_stored}")
def pos_embed(pos_embedding_stored, positions, dtype):
    """Each position's row of the position table"""
    return pos_embedding_stored[positions].to(dtype)


@once("layers.0.resid_pre", "{embed} + {pos_embed}")
def embed_at_position(embed, pos_embed):
    """The residual stream: what each token is, and where it stands"""
    return embed + pos_embed


# ── LayerNorm (Ba et al., 2016) ───────────────────────────────────────────────────────────────────


@each_layer("layers.N.resid_pre")
def resid_pre(stream):
    return stream


@each_layer("layers.N.attn_norm.mean", "mean of {resid_pre} over each row", dims="T 1")
def attn_norm_mean(resid_pre, wide):
    """Where each token's row is centred"""
    return resid_pre.to(wide).mean(-1, keepdim=True)


@each_layer("layers.N.attn_norm.variance", "mean of ({resid_pre} - {attn_norm_mean})²", dims="T 1")
def attn_norm_variance(resid_pre, attn_norm_mean):
    """How far its components spread"""
    return (resid_pre - attn_norm_mean).square().mean(-1, keepdim=True)


@each_layer(
    "layers.N.attn_norm.normalised",
    "({resid_pre} - {attn_norm_mean}) / √({attn_norm_variance} + {norm_eps})",
    dims="T C",
)
def attn_norm_normalised(resid_pre, attn_norm_mean, attn_norm_variance, norm_eps):
    """Every token centred, with spread 1"""
    return (resid_pre - attn_norm_mean) * torch.rsqrt(attn_norm_variance + norm_eps)


@each_layer("layers.N.attn_norm", "{attn_norm_normalised} × {attn_norm_weight} + {attn_norm_bias}")
def attn_norm(attn_norm_normalised, attn_norm_weight, attn_norm_bias, dtype):
    """Scaled and shifted as the layer has learned"""
    return (attn_norm_normalised * attn_norm_weight + attn_norm_bias).to(dtype)


# ── Attention: queries, keys ──────────────────────────────────────────────────────────────────────

script.show("wq", "The weights that make queries", dims="H·D C")
script.show("wk", "The weights that make keys", dims="H·D C")
script.show("wv", "The weights that make values", dims="H·D C")
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
    return linear(attn_norm, wq_head, bq_head)


@each_layer("layers.N.attn.wk_heads", "{wk_stored} in {n_heads} heads", dims="H D C")
def wk_heads(wk_stored, n_heads):
    """wk, head by head"""
    return wk_stored.unflatten(0, (n_heads, -1))


@each_head("layers.N.attn.wk_head", "head {head} of {wk_heads}", dims="D C")
def wk_head(wk_heads, head, dtype):
    """wk of head {head}"""
    return wk_heads[head].to(dtype)


@each_head("layers.N.attn.k", "{attn_norm} · {wk_head}ᵀ + {bk_head}")
def k(attn_norm, wk_head, bk_head):
    """Keys of head {head}: what each token can be found by"""
    return linear(attn_norm, wk_head, bk_head)


# ── Attention: who looks at whom, and what is handed over ─────────────────────────────────────────


@each_head("layers.N.attn.scores", "{q} · {k}ᵀ / √{head_dim}")
def scores(q, k, head_dim, dialect):
    """How well each query fits each key"""
    fit = q @ k.T
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


@each_layer("layers.N.attn.wv_heads", "{wv_stored} in {n_heads} heads", dims="H D C")
def wv_heads(wv_stored, n_heads):
    """wv, head by head"""
    return wv_stored.unflatten(0, (n_heads, -1))


@each_head("layers.N.attn.wv_head", "head {head} of {wv_heads}", dims="D C")
def wv_head(wv_heads, head, dtype):
    """wv of head {head}"""
    return wv_heads[head].to(dtype)


@each_head("layers.N.attn.v", "{attn_norm} · {wv_head}ᵀ + {bv_head}")
def v(attn_norm, wv_head, bv_head):
    """Values of head {head}: what each token hands over"""
    return linear(attn_norm, wv_head, bv_head)


@each_head("layers.N.attn.z", "{pattern} · {v}")
def z(pattern, v):
    """What head {head} read: the values, each with its share"""
    return pattern @ v


@each_layer("layers.N.attn.z", "{n_heads} heads")
def z_heads(z_of_heads, n_heads):
    """The same for every head"""
    return torch.stack(z_of_heads)


@each_layer("layers.N.attn.z_side_by_side", "{z_heads} in one row", dims="T H·D")
def z_side_by_side(z_heads):
    """All heads, side by side"""
    return torch.cat(z_heads.unbind(), dim=-1)


@each_layer("layers.N.attn_out", "{z_side_by_side} · {wo}ᵀ + {bo}")
def attn_out(z_side_by_side, wo, bo):
    """What attention adds to the stream"""
    return linear(z_side_by_side, wo, bo)


@each_layer("layers.N.resid_mid", "{resid_pre} + {attn_out}")
def resid_mid(resid_pre, attn_out):
    """The stream after attention"""
    return resid_pre + attn_out


# ── The MLP ───────────────────────────────────────────────────────────────────────────────────────


def layer_norm(x, weight, bias, eps, wide, dtype):
    """Mean, variance, normalised, scaled and shifted: the steps of attn_norm in one."""
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normalised * weight + bias).to(dtype)


@each_layer("layers.N.mlp_norm", "LayerNorm of {resid_mid} with {mlp_norm_weight}, {mlp_norm_bias}")
def mlp_norm(resid_mid, mlp_norm_weight, mlp_norm_bias, norm_eps, wide, dtype):
    """The stream, normalised again: the same four steps"""
    return layer_norm(resid_mid, mlp_norm_weight, mlp_norm_bias, norm_eps, wide, dtype)


script.show("w_up", "The weights that lead into the MLP", dims="F C")
script.show("w_down", "The weights that lead back to the stream", dims="C F")


@each_layer("layers.N.mlp.pre", "{mlp_norm} · {w_up}ᵀ + {b_up}")
def pre(mlp_norm, w_up, b_up):
    """What each hidden unit is told"""
    return linear(mlp_norm, w_up, b_up)


BEND = {
    "tanh": "tanh {inner}",
    "erf": "erf({pre} / √2)",
}  # the paper's approximation, its exact form


@each_layer(
    "layers.N.mlp.inner",
    "√(2/π) × ({pre} + 0.044715 × {pre}³)",
    dims="T F",
    when=lambda config: config.activation != "gelu",
)
def inner(pre):
    """Inside the tanh of GELU"""
    return math.sqrt(2.0 / math.pi) * (pre + 0.044715 * torch.pow(pre, 3.0))


@each_layer(
    "layers.N.mlp.act",
    lambda config: f"½ × {{pre}} × (1 + {BEND[config.activation]})",
)
def act(pre, inner, gelu, dialect):
    """What each hidden unit says: GELU, a soft switch (Hendrycks & Gimpel, 2016)"""
    if gelu == "erf":
        return F.gelu(pre)
    if dialect.gelu == "fused":  # the same formula in one kernel, rounded once
        return F.gelu(pre, approximate="tanh")
    return 0.5 * pre * (1.0 + torch.tanh(inner))


@each_layer("layers.N.mlp_out", "{act} · {w_down}ᵀ + {b_down}")
def mlp_out(act, w_down, b_down):
    """What the MLP adds to the stream"""
    return linear(act, w_down, b_down)


@each_layer("layers.N.resid_post", "{resid_mid} + {mlp_out}")
def resid_post(resid_mid, mlp_out):
    """The stream after the layer"""
    return resid_mid + mlp_out


# ── From vectors back to text ─────────────────────────────────────────────────────────────────────


@once("final_norm", "LayerNorm of {stream} with {final_norm_weight}, {final_norm_bias}")
def final_norm(stream, final_norm_weight, final_norm_bias, norm_eps, wide, dtype):
    """The stream after the last layer, normalised"""
    return layer_norm(stream, final_norm_weight, final_norm_bias, norm_eps, wide, dtype)


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
