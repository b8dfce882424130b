"""The dialects `meta` and `notebook` against plain transcriptions of the references."""

from __future__ import annotations

from dataclasses import replace

import meta_reference
import pytest
import torch
from tiny import LLAMA, random_model, random_tokens

from pellucid.models.rope import interleaved
from pellucid.trace import trace

# Widths that fill whole vector registers. On odd ones a matrix product takes its last columns by
# another path, and the interleaved rows of the reference put other columns last.
SHAPE = replace(LLAMA, width=32, hidden_width=96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_meta_every_shared_tensor_is_bit_equal(dtype, kv_heads, head_dim, batch):
    config = replace(SHAPE, n_kv_heads=kv_heads, head_dim=head_dim)
    model = random_model(config, dtype, "meta")
    tokens = random_tokens(config, batch, 11)
    with trace(model) as seen:
        model(tokens)
        expected = meta_reference.forward(config, model.state_dict(), tokens)
    assert set(expected) == set(seen) - {"positions", "mask"}
    for name in expected:
        assert seen[name].dtype == expected[name].dtype, name
        assert torch.equal(seen[name], expected[name]), name


def test_meta_one_token_and_a_tied_head():
    config = replace(SHAPE, tied=True, head_dim=16)
    model = random_model(config, torch.bfloat16, "meta")
    for length in (1, 2, 33):
        tokens = random_tokens(config, 2, length)
        with trace(model) as seen:
            model(tokens)
            expected = meta_reference.forward(config, model.state_dict(), tokens)
        assert torch.equal(seen["logits"], expected["logits"])


def test_meta_is_not_what_the_other_dialects_give():
    config = replace(SHAPE, head_dim=16)
    tokens = random_tokens(config, 1, 11)
    for name in ("hf", "notebook"):
        model = random_model(config, torch.bfloat16, name)
        with trace(model) as seen:
            model(tokens)
            expected = meta_reference.forward(config, model.state_dict(), tokens)
        assert not torch.equal(seen["logits"].float(), expected["logits"])


def test_fused_attention_stays_close_to_meta():
    config = replace(SHAPE, head_dim=16)
    model = random_model(config, torch.float32, "meta")
    tokens = random_tokens(config, 2, 11)
    with torch.no_grad():
        fused = model(tokens)
        expected = meta_reference.forward(config, model.state_dict(), tokens)["logits"]
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)


def notebook_forward(config, weights, tokens):
    """The notebook's arithmetic: one head at a time, q and k in float32 after the rotation, the
    norm in the dtype of the weights, softmax in float32 cast to bfloat16."""

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * weight

    cis = meta_reference.cis_table(config.head_dim, len(tokens), config.rope.theta)
    mask = torch.triu(torch.full((len(tokens), len(tokens)), float("-inf")), diagonal=1)

    def turned(x):  # (T, D) in interleaved pairs, complex product in float32
        pairs = torch.view_as_complex(x.float().view(len(tokens), -1, 2))
        return torch.view_as_real(pairs * cis).flatten(1)

    x = weights["embed.weight"][tokens]
    shared = config.n_heads // config.n_kv_heads
    for layer in range(config.n_layers):
        own = {
            k.split(".", 2)[2]: w for k, w in weights.items() if k.startswith(f"layers.{layer}.")
        }
        normed = norm(x, own["attn_norm.weight"])
        wq = meta_reference.unrotated_rows(own["attn.q_proj.weight"], config.n_heads)
        wk = meta_reference.unrotated_rows(own["attn.k_proj.weight"], config.n_kv_heads)
        wq, wk = (
            wq.view(config.n_heads, -1, config.width),
            wk.view(config.n_kv_heads, -1, config.width),
        )
        wv = own["attn.v_proj.weight"].view(config.n_kv_heads, -1, config.width)
        heads = []
        for head in range(config.n_heads):
            q = turned(normed @ wq[head].T)
            k = turned(normed @ wk[head // shared].T)
            scores = q @ k.T / config.head_dim**0.5 + mask
            pattern = torch.softmax(scores, dim=1).to(normed.dtype)
            heads.append(pattern @ (normed @ wv[head // shared].T))
        x = x + torch.cat(heads, dim=-1) @ own["attn.o_proj.weight"].T
        normed = norm(x, own["mlp_norm.weight"])
        act = torch.nn.functional.silu(normed @ own["mlp.gate_proj.weight"].T)
        up = normed @ own["mlp.up_proj.weight"].T
        x = x + (act * up) @ own["mlp.down_proj.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["unembed.weight"].T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_notebook_is_close_to_one_head_at_a_time(dtype, tolerance, kv_heads):
    """The walk gives the notebook exactly; the joint products here may part in the last bits."""
    config = replace(SHAPE, n_kv_heads=kv_heads, head_dim=16)
    model = random_model(config, dtype, "notebook")
    tokens = random_tokens(config, 9)
    with torch.no_grad():
        logits = model(tokens[None])[0]
        expected = notebook_forward(config, model.state_dict(), tokens)
    assert logits.dtype == expected.dtype == dtype
    error = (logits - expected).abs().max() / expected.abs().max()
    assert error < tolerance


def test_interleaving_is_undone_by_taking_evens_and_odds():
    x = torch.arange(2 * 3 * 5 * 8.0).view(2, 3, 5, 8)
    assert interleaved(torch.tensor([0, 1, 2, 10, 11, 12]).view(1, 1, 1, 6)).flatten().tolist() == [
        *(0, 10),
        *(1, 11),
        *(2, 12),
    ]
    assert torch.equal(meta_reference.half_split(interleaved(x)), x)
