"""Ours against transformers on the same random weights: close when fused, bit-equal by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import GPT, LLAMA, random_tokens

from pellucid.models import RopeConfig, build
from pellucid.trace import trace

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")

LLAMA_NAMES = {
    "model.": "",
    "embed_tokens": "embed",
    "self_attn": "attn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "lm_head": "unembed",
}
GPT_NAMES = {
    "transformer.": "",
    "h.": "layers.",
    "wte": "embed",
    "wpe": "pos_embed",
    "ln_1": "attn_norm",
    "ln_2": "mlp_norm",
    "ln_f": "norm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "attn.c_proj": "attn.o_proj",
}


def renamed(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        name = name.replace(theirs, ours, 1)
    return name


def randomise(peer) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.add_(values / 10) if parameter.ndim == 1 else parameter.copy_(values / 4)


def llama_pair(config, dtype, rope_parameters=None):
    """transformers' Llama and ours, with the same weights."""
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.hidden_width,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            attention_bias="qkv" in config.biases,
            mlp_bias="mlp" in config.biases,
            rope_parameters=rope_parameters or {"rope_type": "default", "rope_theta": 10000.0},
            attn_implementation="eager",
        )
    ).eval()
    randomise(peer)
    frequencies = peer.model.rotary_emb.inv_freq.clone()
    peer.to(dtype)
    peer.model.rotary_emb.inv_freq = frequencies  # .to() rounds it, from_pretrained does not
    weights = {renamed(name, LLAMA_NAMES): w for name, w in peer.state_dict().items()}
    if config.tied:
        del weights["unembed.weight"]
    model = build(config, "hf").to(dtype).eval()
    model.load_state_dict(weights)
    return peer, model


def gpt_pair(config, dtype):
    """transformers' GPT-2 and ours, with the same weights."""
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.width,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.hidden_width,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    ).eval()
    randomise(peer)
    peer.to(dtype)
    weights = {}
    for name, tensor in peer.state_dict().items():
        if name == "lm_head.weight":
            continue
        ours = renamed(name, GPT_NAMES)
        if "_proj.weight" in ours or "c_attn.weight" in ours:
            tensor = tensor.t()  # Conv1D stores (in, out)
        if "c_attn" in ours:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                weights[ours.replace("c_attn", f"{letter}_proj")] = part
        else:
            weights[ours] = tensor
    model = build(config, "hf").to(dtype).eval()
    model.load_state_dict(weights, assign=True)
    return peer, model


LLAMAS = {
    "mha": replace(LLAMA, n_kv_heads=4),
    "gqa": LLAMA,
    "mqa": replace(LLAMA, n_kv_heads=1, tied=True),
    "biases": replace(LLAMA, biases=("qkv", "o", "mlp")),
    "wide heads": replace(LLAMA, head_dim=32, width=64, hidden_width=96),
}


def compare(peer, model, tokens, dtype):
    """Logits and every residual stream within a trace, to the bit; fused logits, closely."""
    with torch.no_grad():
        expected = peer(tokens, output_hidden_states=True, output_attentions=True)
        fused = model(tokens)
    with trace(model) as seen:
        model(tokens)
    for layer, (stream, pattern) in enumerate(
        zip(expected.hidden_states[:-1], expected.attentions, strict=True)
    ):
        assert torch.equal(seen[f"layers.{layer}.resid_pre"], stream), f"layer {layer}"
        assert torch.equal(seen[f"layers.{layer}.attn.pattern"], pattern), f"layer {layer}"
    assert torch.equal(seen["final_norm"], expected.hidden_states[-1])
    assert seen["logits"].dtype == expected.logits.dtype == dtype
    assert torch.equal(seen["logits"], expected.logits)
    if dtype == torch.float32:
        torch.testing.assert_close(fused, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LLAMAS)
def test_llama(kind, dtype):
    config = LLAMAS[kind]
    peer, model = llama_pair(config, dtype)
    compare(peer, model, random_tokens(config, 2, 13), dtype)


ROPES = {
    "linear": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        RopeConfig(type="linear", factor=4.0),
    ),
    "dynamic": (
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        RopeConfig(type="dynamic", factor=2.0, original_context=64),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        RopeConfig(theta=500000.0, type="llama3", factor=8.0, original_context=32),
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        },
        RopeConfig(type="yarn", factor=2.0, original_context=32),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROPES)
def test_llama_with_scaled_rope(kind, dtype):
    stated, rope = ROPES[kind]
    config = replace(LLAMA, rope=rope)
    peer, model = llama_pair(config, dtype, stated)
    # 90 tokens: beyond the 64 of the config, where the dynamic type begins to stretch.
    compare(peer, model, random_tokens(config, 1, 90), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2(dtype):
    peer, model = gpt_pair(GPT, dtype)
    compare(peer, model, random_tokens(GPT, 2, 13), dtype)


@pytest.mark.parametrize("pair", [(LLAMA, llama_pair), (GPT, gpt_pair)], ids=["llama", "gpt2"])
def test_left_padded_rows(pair):
    config, make = pair
    peer, model = make(config, torch.float32)
    tokens = random_tokens(config, 2, 9)
    padding = torch.tensor([0, 4])
    real = torch.arange(9)[None] >= padding[:, None]
    positions = (torch.arange(9)[None] - padding[:, None]).clamp(min=0)
    with torch.no_grad():
        ours = model(tokens, starts=padding)
        theirs = peer(tokens, attention_mask=real.long(), position_ids=positions).logits
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", [(LLAMA, llama_pair), (GPT, gpt_pair)], ids=["llama", "gpt2"])
def test_gradients(pair):
    config, make = pair
    peer, model = make(config, torch.float32)
    tokens = random_tokens(config, 1, 7)
    peer(tokens).logits.logsumexp(-1).mean().backward()
    model(tokens).logsumexp(-1).mean().backward()
    theirs = peer.get_input_embeddings().weight.grad
    torch.testing.assert_close(model.embed.weight.grad, theirs, rtol=1e-4, atol=1e-5)
