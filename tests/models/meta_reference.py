"""Meta's Llama arithmetic, transcribed plainly as a witness for the `meta` dialect.

Written from what llama3's ``model.py`` computes, function by function and cast by cast: complex
rotation of interleaved pairs, scores divided by sqrt(D), an additive mask of -inf, softmax in
float32, the norm in float32, logits in float32. It knows nothing of Pellucid but the names under
which it notes its tensors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def unrotated_rows(weight: Tensor, heads: int) -> Tensor:
    """Half-split rows of wq or wk (heads * D, C) back into Meta's interleaved order."""
    first, second = weight.view(heads, 2, -1, weight.shape[1]).unbind(1)
    return torch.stack((first, second), dim=2).reshape(weight.shape)


def half_split(x: Tensor) -> Tensor:
    """Interleaved components (…, D) in half-split order: even ones, then odd ones."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in float32, cast to x, then times weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def cis_table(head_dim: int, length: int, theta: float) -> Tensor:
    """exp(i · position · frequency), (length, D/2), complex64."""
    frequencies = 1.0 / (
        theta ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim)
    )
    angles = torch.outer(torch.arange(length), frequencies).float()
    return torch.polar(torch.ones_like(angles), angles)


def rotated(x: Tensor, cis: Tensor) -> Tensor:
    """x (B, T, heads, D) in interleaved pairs times cis (T, D/2), in complex64."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * cis.view(1, cis.shape[0], 1, cis.shape[1])
    return torch.view_as_real(turned).flatten(3).type_as(x)


def serve_several(x: Tensor, times: int) -> Tensor:
    """x (B, S, Hkv, D) -> (B, S, Hkv * times, D), each head repeated in place."""
    return x if times == 1 else torch.repeat_interleave(x, dim=2, repeats=times)


def forward(config, weights: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Every tensor Meta's forward pass has in common with Pellucid's, under Pellucid's names."""
    seen: dict[str, Tensor] = {"tokens": tokens}
    length = tokens.shape[1]
    cis = cis_table(config.head_dim, length, config.rope.theta)
    seen["rope.cos"], seen["rope.sin"] = cis.real, cis.imag
    mask = torch.triu(torch.full((length, length), float("-inf")), diagonal=1)
    h = seen["embed"] = F.embedding(tokens, weights["embed.weight"])
    mask = mask.type_as(h)
    for layer in range(config.n_layers):
        own = {
            k.split(".", 2)[2]: w for k, w in weights.items() if k.startswith(f"layers.{layer}.")
        }
        note = {"resid_pre": h}
        x = note["attn_norm"] = rms_norm(h, own["attn_norm.weight"], config.norm_eps)
        h = note["resid_mid"] = h + attention(config, own, x, cis, mask, note)
        x = note["mlp_norm"] = rms_norm(h, own["mlp_norm.weight"], config.norm_eps)
        gate = note["mlp.gate"] = F.linear(x, own["mlp.gate_proj.weight"])
        up = note["mlp.up"] = F.linear(x, own["mlp.up_proj.weight"])
        act = note["mlp.act"] = F.silu(gate)
        hidden = note["mlp.hidden"] = act * up
        out = note["mlp_out"] = F.linear(hidden, own["mlp.down_proj.weight"])
        h = note["resid_post"] = h + out
        seen.update({f"layers.{layer}.{leaf}": tensor for leaf, tensor in note.items()})
    h = seen["final_norm"] = rms_norm(h, weights["norm.weight"], config.norm_eps)
    seen["logits"] = F.linear(h, weights.get("unembed.weight", weights["embed.weight"])).float()
    return seen


def attention(config, own: dict[str, Tensor], x: Tensor, cis: Tensor, mask: Tensor, note) -> Tensor:
    """Grouped-query attention on interleaved weights."""
    batch, length, _ = x.shape
    heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.head_dim
    wq = unrotated_rows(own["attn.q_proj.weight"], heads)
    wk = unrotated_rows(own["attn.k_proj.weight"], kv_heads)
    q = F.linear(x, wq).view(batch, length, heads, width)
    k = F.linear(x, wk).view(batch, length, kv_heads, width)
    v = F.linear(x, own["attn.v_proj.weight"]).view(batch, length, kv_heads, width)
    note["attn.q"], note["attn.k"] = half_split(q.transpose(1, 2)), half_split(k.transpose(1, 2))
    note["attn.v"] = v.transpose(1, 2)
    q, k = rotated(q, cis), rotated(k, cis)
    note["attn.q_rotated"] = half_split(q.transpose(1, 2))
    note["attn.k_rotated"] = half_split(k.transpose(1, 2))
    k, v = serve_several(k, heads // kv_heads), serve_several(v, heads // kv_heads)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = note["attn.scores"] = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(width)
    scores = note["attn.masked_scores"] = scores + mask
    pattern = note["attn.pattern"] = F.softmax(scores.float(), dim=-1).type_as(q)
    z = note["attn.z"] = torch.matmul(pattern, v)
    merged = z.transpose(1, 2).contiguous().view(batch, length, -1)
    out = note["attn_out"] = F.linear(merged, own["attn.o_proj.weight"])
    return out
