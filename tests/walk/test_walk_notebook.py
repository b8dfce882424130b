"""The notebook dialect gives the notebook's arithmetic, bit for bit.

Here stands a plain transcription of that arithmetic ("llama3 implemented from scratch, one tensor
and matrix multiplication at a time"), on Meta's weights with their interleaved pairs. The walk gets
the same weights with q and k half-split; where its tensors stand in that order, they are put back.
"""

from __future__ import annotations

import json

import pytest
import torch
from tiny import LLAMA, random_model, random_tokens

from pellucid.models import LlamaConfig, RopeConfig
from pellucid.numerics import dialect
from pellucid.walk import walk

NOTEBOOK = dialect("notebook", "llama")
LEAVES = {"attn.q": "wq", "attn.k": "wk", "attn.v": "wv", "attn.o": "wo"}


def notebook(config: LlamaConfig, model: dict, tokens: torch.Tensor) -> dict:
    """The notebook, cell by cell; heads of layer 0 under their address, layers under theirs."""
    seen = {}

    def rms_norm(tensor, norm_weights):
        return (
            tensor * torch.rsqrt(tensor.pow(2).mean(-1, keepdim=True) + config.norm_eps)
        ) * norm_weights

    def into_pairs(x):
        return x.float().view(x.shape[0], -1, 2)

    half = config.head_dim // 2
    zero_to_one = torch.tensor(range(half)) / half
    freqs = 1.0 / (torch.tensor(config.rope.theta) ** zero_to_one)
    freqs_for_each_token = torch.outer(torch.arange(len(tokens)), freqs)
    freqs_cis = torch.polar(torch.ones_like(freqs_for_each_token), freqs_for_each_token)
    seen["rope.exponents"], seen["rope.frequencies"] = zero_to_one, freqs
    seen["rope.angles"], seen["rope.cis"] = freqs_for_each_token, freqs_cis

    final = model["tok_embeddings.weight"][tokens]
    seen["embed"] = final
    for layer in range(config.n_layers):
        store = []
        own = f"layers.{layer}"
        norm = rms_norm(final, model[f"{own}.attention_norm.weight"])
        seen[f"{own}.attn_norm"] = norm
        wq = model[f"{own}.attention.wq.weight"]
        wq = wq.view(config.n_heads, wq.shape[0] // config.n_heads, config.width)
        wk = model[f"{own}.attention.wk.weight"]
        wk = wk.view(config.n_kv_heads, wk.shape[0] // config.n_kv_heads, config.width)
        wv = model[f"{own}.attention.wv.weight"]
        wv = wv.view(config.n_kv_heads, wv.shape[0] // config.n_kv_heads, config.width)
        for head in range(config.n_heads):
            kv_head = head // (config.n_heads // config.n_kv_heads)
            q = torch.matmul(norm, wq[head].T)
            k = torch.matmul(norm, wk[kv_head].T)
            v = torch.matmul(norm, wv[kv_head].T)
            q_complex = torch.view_as_complex(into_pairs(q))
            k_complex = torch.view_as_complex(into_pairs(k))
            q_rotated = torch.view_as_real(q_complex * freqs_cis).view(q.shape)
            k_rotated = torch.view_as_real(k_complex * freqs_cis).view(k.shape)
            scores = torch.matmul(q_rotated, k_rotated.T) / (config.head_dim) ** 0.5
            mask = torch.full((len(tokens), len(tokens)), float("-inf"))
            mask = torch.triu(mask, diagonal=1)
            pattern = torch.nn.functional.softmax(scores + mask, dim=1).to(torch.bfloat16)
            z = torch.matmul(pattern, v)
            store.append(z)
            attn, at = f"{own}.attn", f"[{head}]"
            seen[f"{attn}.q{at}"], seen[f"{attn}.q_pairs{at}"] = q, into_pairs(q)
            seen[f"{attn}.q_complex{at}"] = q_complex
            seen[f"{attn}.q_turned{at}"] = q_complex * freqs_cis
            seen[f"{attn}.q_rotated{at}"] = q_rotated
            seen[f"{attn}.k[{kv_head}]"], seen[f"{attn}.v[{kv_head}]"] = k, v
            seen[f"{attn}.k_pairs[{kv_head}]"] = into_pairs(k)
            seen[f"{attn}.k_complex[{kv_head}]"] = k_complex
            seen[f"{attn}.k_turned[{kv_head}]"] = k_complex * freqs_cis
            seen[f"{attn}.k_rotated[{kv_head}]"] = k_rotated
            seen[f"{attn}.scores{at}"], seen[f"{attn}.masked_scores{at}"] = scores, scores + mask
            seen[f"{attn}.pattern{at}"], seen[f"{attn}.z{at}"] = pattern, z
        stacked = torch.cat(store, dim=-1)
        delta = torch.matmul(stacked, model[f"{own}.attention.wo.weight"].T)
        after_edit = final + delta
        normalized = rms_norm(after_edit, model[f"{own}.ffn_norm.weight"])
        w1 = model[f"{own}.feed_forward.w1.weight"]
        w2 = model[f"{own}.feed_forward.w2.weight"]
        w3 = model[f"{own}.feed_forward.w3.weight"]
        feedforward = torch.matmul(
            torch.functional.F.silu(torch.matmul(normalized, w1.T))
            * torch.matmul(normalized, w3.T),
            w2.T,
        )
        final = after_edit + feedforward
        seen[f"{own}.attn.z"] = torch.stack(store)
        seen[f"{own}.attn.z_side_by_side"], seen[f"{own}.attn_out"] = stacked, delta
        seen[f"{own}.resid_mid"], seen[f"{own}.mlp_norm"] = after_edit, normalized
        seen[f"{own}.mlp.gate"] = torch.matmul(normalized, w1.T)
        seen[f"{own}.mlp.up"] = torch.matmul(normalized, w3.T)
        seen[f"{own}.mlp_out"], seen[f"{own}.resid_post"] = feedforward, final
    final = rms_norm(final, model["norm.weight"])
    logits = torch.matmul(final[-1], model["output.weight"].T)
    seen["final_norm"], seen[f"logits[{len(tokens) - 1}]"] = final, logits
    seen["next_token"] = torch.argmax(logits, dim=-1)
    return seen


def half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of wq or wk: of each head first the even ones, then the odd ones."""
    by_head = rows.view(heads, -1, rows.shape[1])
    return torch.cat((by_head[:, 0::2], by_head[:, 1::2]), dim=1).reshape(rows.shape)


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """The other way, for the components of queries and keys."""
    first, second = x.chunk(2, dim=-1)
    whole = torch.empty_like(x)
    whole[..., 0::2], whole[..., 1::2] = first, second
    return whole


def under_our_names(config: LlamaConfig, meta: dict) -> dict:
    theirs = {"embed": "tok_embeddings", "norm": "norm", "unembed": "output"}
    for layer in range(config.n_layers):
        ours, other = f"layers.{layer}", f"layers.{layer}"
        theirs |= {
            f"{ours}.attn_norm": f"{other}.attention_norm",
            f"{ours}.mlp_norm": f"{other}.ffn_norm",
            **{f"{ours}.{leaf}_proj": f"{other}.attention.{w}" for leaf, w in LEAVES.items()},
            f"{ours}.mlp.gate_proj": f"{other}.feed_forward.w1",
            f"{ours}.mlp.down_proj": f"{other}.feed_forward.w2",
            f"{ours}.mlp.up_proj": f"{other}.feed_forward.w3",
        }
    weights = {f"{ours}.weight": meta[f"{other}.weight"] for ours, other in theirs.items()}
    for name in weights:
        if name.endswith("q_proj.weight"):
            weights[name] = half_split(weights[name], config.n_heads)
        elif name.endswith("k_proj.weight"):
            weights[name] = half_split(weights[name], config.n_kv_heads)
    return weights


def hold_against_the_notebook(config: LlamaConfig, meta: dict, tokens: torch.Tensor) -> None:
    theirs = notebook(config, meta, tokens)
    ours = under_our_names(config, meta)
    held = set()
    for step in walk(config, ours, tokens, dialect=NOTEBOOK, everything=True):
        if step.address not in theirs:
            continue
        value, expected = step.value, theirs[step.address]
        if step.name.endswith((".q", ".k", ".q_rotated", ".k_rotated")):
            value = interleaved(value)
        assert value.dtype == expected.dtype, step.address
        assert torch.equal(value, expected), step.address
        held.add(step.address)
    assert held == set(theirs)


@pytest.mark.assets
@pytest.mark.parametrize("length", [1, 17])
def test_stories260k_in_bfloat16(assets, length):
    folder = assets / "stories260K" / "meta"
    given = json.loads((folder / "params.json").read_text())
    file = torch.load(folder / "consolidated.00.pth", weights_only=True)
    meta = {name: tensor.to(torch.bfloat16) for name, tensor in file.items()}
    config = LlamaConfig(
        vocab_size=given["vocab_size"],
        width=given["dim"],
        n_layers=given["n_layers"],
        n_heads=given["n_heads"],
        n_kv_heads=given["n_kv_heads"],
        head_dim=given["dim"] // given["n_heads"],
        hidden_width=len(file["layers.0.feed_forward.w1.weight"]),
        norm_eps=given["norm_eps"],
        rope=RopeConfig(theta=given["rope_theta"]),
    )
    story = [1, 403, 407, 261, 378, 397, 345, 426, 280, 261, 265, 280, 432, 354, 262, 281, 305]
    hold_against_the_notebook(config, meta, torch.tensor(story[:length]))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_random_weights_with_wider_heads(kv_heads):
    """Llama 3's theta and head width, so that whole blocks of the products are used."""
    config = LlamaConfig(
        vocab_size=331,
        width=256,
        n_layers=2,
        n_heads=4,
        n_kv_heads=kv_heads,
        head_dim=128,
        hidden_width=320,
        rope=RopeConfig(theta=500000.0),
    )
    generator = torch.Generator().manual_seed(kv_heads)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)

    meta = {
        "tok_embeddings.weight": random(331, 256),
        "output.weight": random(331, 256),
        "norm.weight": 1 + random(256),
    }
    for layer in range(config.n_layers):
        meta |= {
            f"layers.{layer}.attention_norm.weight": 1 + random(256),
            f"layers.{layer}.ffn_norm.weight": 1 + random(256),
            f"layers.{layer}.attention.wq.weight": random(512, 256),
            f"layers.{layer}.attention.wk.weight": random(128 * kv_heads, 256),
            f"layers.{layer}.attention.wv.weight": random(128 * kv_heads, 256),
            f"layers.{layer}.attention.wo.weight": random(256, 512),
            f"layers.{layer}.feed_forward.w1.weight": random(320, 256),
            f"layers.{layer}.feed_forward.w3.weight": random(320, 256),
            f"layers.{layer}.feed_forward.w2.weight": random(256, 320),
        }
    hold_against_the_notebook(config, meta, random_tokens(config, 17))


def test_the_other_dialects_round_elsewhere():
    """So that the equality above is worth something."""
    tokens = random_tokens(LLAMA, 9)
    weights = random_model(LLAMA, torch.bfloat16).state_dict()
    finals = [
        next(
            step.value.float()
            for step in walk(LLAMA, weights, tokens, dialect=dialect(name, "llama"))
            if step.name == "logits"
        )
        for name in ("notebook", "meta", "hf")
    ]
    assert not torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])
