"""The Llama family as a module: counts, configs, state, gradients."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from tiny import LLAMA, random_model, random_tokens

from pellucid.models import LlamaConfig, RopeConfig, build, initialise

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    context_length=4096,
    n_kv_heads=32,
    hidden_width=11008,
    rope=RopeConfig(theta=10000.0),
)
LLAMA_3_2_1B = LlamaConfig(
    context_length=131072, width=2048, n_layers=16, head_dim=64, hidden_width=8192, tied=True
)


def count(config) -> int:
    """Parameters of a model that takes no memory; a tied head counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), 8_030_261_248),
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_3_2_1B, 1_235_814_400),
    ],
    ids=["Llama 3 8B", "Llama 2 7B", "Llama 3.2 1B"],
)
def test_parameter_counts(config, expected):
    assert count(config) == expected


def test_the_head_set_apart_from_the_width():
    config = replace(LLAMA, head_dim=6)  # 4 heads × 6 = 24, width 36
    model = random_model(config)
    assert model.layers[0].attn.q_proj.weight.shape == (24, 36)
    assert model.layers[0].attn.k_proj.weight.shape == (12, 36)
    assert model.layers[0].attn.o_proj.weight.shape == (36, 24)
    assert model(random_tokens(config, 2, 5)).shape == (2, 5, 97)


def test_biases_where_the_config_says():
    names = random_model(replace(LLAMA, biases=("qkv", "o", "mlp"))).state_dict().keys()
    biases = {
        name.removeprefix("layers.0.") for name in names if "layers.0." in name and "bias" in name
    }
    assert biases == {
        *(f"attn.{p}_proj.bias" for p in "qkvo"),
        *(f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")),
    }
    assert not [name for name in random_model(LLAMA).state_dict() if "bias" in name]


def test_a_tied_head_is_the_embedding():
    model = random_model(replace(LLAMA, tied=True))
    assert model.unembed is None
    assert "unembed.weight" not in model.state_dict()
    hidden = model.hidden(random_tokens(LLAMA, 1, 3))
    assert torch.equal(model.logits(hidden), hidden @ model.embed.weight.T)


def test_canonical_parameter_names():
    names = [name for name in random_model(LLAMA).state_dict() if "layers.1." not in name]
    assert names == [
        "embed.weight",
        *(f"layers.0.{leaf}.weight" for leaf in ["attn_norm", *(f"attn.{p}_proj" for p in "qkvo")]),
        *(f"layers.0.{leaf}.weight" for leaf in ["mlp_norm", "mlp.gate_proj", "mlp.up_proj"]),
        "layers.0.mlp.down_proj.weight",
        "norm.weight",
        "unembed.weight",
    ]


def test_last_gives_the_last_row():
    model = random_model(LLAMA)
    tokens = random_tokens(LLAMA, 2, 5)
    with torch.no_grad():
        whole, last = model(tokens), model(tokens, last=True)
    assert last.shape == (2, 1, 97)
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-12)


def test_a_forward_by_the_formulas():
    """One layer, written out over single heads and pairs, in float64."""
    config = replace(LLAMA, n_layers=1)
    model = random_model(config)
    weights = model.state_dict()
    tokens = random_tokens(config, 6)
    own = {k.removeprefix("layers.0."): w for k, w in weights.items() if k.startswith("layers.0.")}

    def norm(x, weight):
        return torch.stack([row / (row.dot(row) / len(row) + 1e-5).sqrt() * weight for row in x])

    def turn(vector, position):  # (D)
        half = len(vector) // 2
        turned = torch.empty_like(vector)
        for i in range(half):
            angle = torch.tensor(position * 10000.0 ** (-2 * i / len(vector)), dtype=torch.float64)
            a, b = vector[i], vector[i + half]
            turned[i] = a * angle.cos() - b * angle.sin()
            turned[i + half] = a * angle.sin() + b * angle.cos()
        return turned

    x = weights["embed.weight"][tokens]
    normed = norm(x, own["attn_norm.weight"])
    read = torch.zeros(6, 40, dtype=torch.float64)
    for head in range(4):
        rows, kv_rows = slice(head * 10, head * 10 + 10), slice(head // 2 * 10, head // 2 * 10 + 10)
        q = normed @ own["attn.q_proj.weight"][rows].T
        k = normed @ own["attn.k_proj.weight"][kv_rows].T
        v = normed @ own["attn.v_proj.weight"][kv_rows].T
        for t in range(6):
            scores = torch.stack([turn(q[t], t).dot(turn(k[s], s)) for s in range(t + 1)]) / 10**0.5
            shares = scores.exp() / scores.exp().sum()
            read[t, rows] = shares @ v[: t + 1]
    x = x + read @ own["attn.o_proj.weight"].T
    normed = norm(x, own["mlp_norm.weight"])
    gate = normed @ own["mlp.gate_proj.weight"].T
    up = normed @ own["mlp.up_proj.weight"].T
    x = x + (gate / (1 + (-gate).exp()) * up) @ own["mlp.down_proj.weight"].T
    logits = norm(x, weights["norm.weight"]) @ weights["unembed.weight"].T
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0], logits, rtol=0, atol=1e-12)


def test_state_copies_and_gradients():
    model = random_model(LLAMA)
    tokens = random_tokens(LLAMA, 2, 5)
    twin = copy.deepcopy(model)
    fresh = build(LLAMA).double().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(tokens)
        assert torch.equal(twin(tokens), expected)
        assert torch.equal(fresh(tokens), expected)
    assert twin.embed.weight is not model.embed.weight
    model(tokens).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_random_weights_to_train_from():
    model = build(replace(LLAMA, width=128, vocab_size=500))
    initialise(model, torch.Generator().manual_seed(0))
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    down = model.layers[0].mlp.down_proj.weight
    assert down.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)  # 2 layers
    assert torch.equal(model.norm.weight, torch.ones(128))
    again = build(replace(LLAMA, width=128, vocab_size=500))
    initialise(again, torch.Generator().manual_seed(0))
    assert torch.equal(again.unembed.weight, model.unembed.weight)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_kv_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0"),
        ({"head_dim": 9}, "head_dim is 9.*even"),
        ({"head_dim": 0}, "head_dim is 0: expected 1 or more"),
        ({"hidden_width": 0}, "hidden_width is 0"),
        ({"width": -4}, "width is -4"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(LLAMA, **wrong)


def test_a_config_is_frozen_and_by_keyword():
    with pytest.raises(FrozenInstanceError):
        LLAMA.width = 3
    with pytest.raises(TypeError):
        LlamaConfig(32000)
