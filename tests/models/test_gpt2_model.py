"""The GPT-2 family as a module: counts, configs, the book's formulas, dropout, context length."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny import GPT, random_model, random_tokens
from torch import nn

from pellucid.models import Cache, GPTConfig, build, initialise
from pellucid.models.parts import activation
from pellucid.numerics import Dialect


def count(config) -> int:
    """Parameters of a model that takes no memory; a tied head counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


def test_parameter_counts():
    assert count(GPTConfig()) == 124_439_808
    assert count(GPTConfig(qkv_bias=False, tied=False)) == 163_009_536


def test_the_books_count_written_out():
    with torch.device("meta"):
        model = build(GPTConfig(qkv_bias=False, tied=False))

    def size(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert size(model.embed, model.pos_embed) == 39_383_808
    assert [size(block) for block in model.layers] == [7_085_568] * 12
    assert (size(model.norm), size(model.unembed)) == (1_536, 38_597_376)


# ── The model of "Build an LLM from scratch", by its formulas ────────────────────────────────────


class BookNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


class BookAttention(nn.Module):
    def __init__(self, width, heads, context, bias):
        super().__init__()
        self.heads = heads
        self.W_query = nn.Linear(width, width, bias=bias)
        self.W_key = nn.Linear(width, width, bias=bias)
        self.W_value = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.triu(torch.ones(context, context), diagonal=1))

    def forward(self, x):
        batch, length, width = x.shape

        def split(y):
            return y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        q, k, v = split(self.W_query(x)), split(self.W_key(x)), split(self.W_value(x))
        scores = q @ k.transpose(2, 3)
        scores = scores.masked_fill(self.mask.bool()[:length, :length], -torch.inf)
        weights = torch.softmax(scores / (width // self.heads) ** 0.5, dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).contiguous().view(batch, length, width))


class BookGelu(nn.Module):
    def forward(self, x):
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + torch.tanh(inner))


class BookBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.width
        self.att = BookAttention(
            width, config.n_heads, config.context_length, "qkv" in config.biases
        )
        self.ff = nn.Sequential(
            nn.Linear(width, config.hidden_width), BookGelu(), nn.Linear(config.hidden_width, width)
        )
        self.norm1, self.norm2 = BookNorm(width), BookNorm(width)

    def forward(self, x):
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class BookModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tok_emb = nn.Embedding(config.vocab_size, config.width)
        self.pos_emb = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.Sequential(*(BookBlock(config) for _ in range(config.n_layers)))
        self.final_norm = BookNorm(config.width)
        self.out_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens):
        x = self.tok_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1]))
        return self.out_head(self.final_norm(self.blocks(x)))


def from_book(weights) -> dict[str, torch.Tensor]:
    """The book's parameter names in ours."""
    pairs = {
        "tok_emb": "embed",
        "pos_emb": "pos_embed",
        "final_norm": "norm",
        "out_head": "unembed",
        "blocks": "layers",
        "att.W_query": "attn.q_proj",
        "att.W_key": "attn.k_proj",
        "att.W_value": "attn.v_proj",
        "att.out_proj": "attn.o_proj",
        "ff.0": "mlp.up_proj",
        "ff.2": "mlp.down_proj",
        "norm1": "attn_norm",
        "norm2": "mlp_norm",
        "scale": "weight",
        "shift": "bias",
    }
    ours = {}
    for name, tensor in weights.items():
        if name.endswith("mask"):
            continue
        for theirs, own in pairs.items():
            name = name.replace(theirs, own)
        ours[name] = tensor
    return ours


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_books_model(qkv_bias):
    config = replace(GPT, biases=("qkv", "o", "mlp") if qkv_bias else ("o", "mlp"), tied=False)
    torch.manual_seed(0)
    book = BookModel(config).double()
    with torch.no_grad():
        for parameter in book.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    model = build(config, "notebook").double().eval()
    model.load_state_dict(from_book(book.state_dict()))
    tokens = random_tokens(config, 2, 17)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), book(tokens), rtol=0, atol=1e-12)


# ── Configs ──────────────────────────────────────────────────────────────────────────────────────


def test_the_gelu_forms_differ_and_erf_is_the_exact_one():
    tokens = random_tokens(GPT, 1, 5)
    with torch.no_grad():
        tanh = random_model(GPT)(tokens)
        erf_model = random_model(replace(GPT, activation="gelu"))
        assert not torch.allclose(erf_model(tokens), tanh, atol=1e-6)
    fused, composed = Dialect(name="fused"), Dialect(name="composed", gelu="composed")
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    exact = torch.tensor([v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x.tolist()]).double()
    torch.testing.assert_close(activation("gelu", fused)(x), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        activation("gelu_tanh", composed)(x), BookGelu()(x), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(activation("gelu_tanh", fused)(x), BookGelu()(x), rtol=0, atol=1e-14)


def test_hidden_width_is_four_times_the_width_unless_set():
    assert GPTConfig().hidden_width == 3072
    assert GPT.hidden_width == 56
    assert (GPT.head_dim, GPT.n_kv_heads) == (9, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_heads": 5}, "width 36 does not divide into 5 heads"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"hidden_width": -1}, "hidden_width is -1"),
        ({"gelu": "quick"}, "unknown gelu 'quick'.*'tanh' or 'erf'"),
        ({"attn_dropout": 1.5}, "attn_dropout is 1.5"),
        ({"embed_dropout": -0.1}, "embed_dropout is -0.1"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(width=36, **wrong)


# ── Behaviour ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", ["embed_dropout", "attn_dropout", "resid_dropout"])
def test_dropout_acts_in_training_only(which):
    config = replace(GPT, **{which: 0.5})
    model, plain = random_model(config), random_model(GPT)
    tokens = random_tokens(GPT, 1, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = plain(tokens)
        assert torch.equal(model(tokens), expected)
        model.train()
        assert not torch.allclose(model(tokens), expected)
        assert not torch.equal(model(tokens), model(tokens))


def test_past_the_context_is_an_error_with_the_numbers():
    model = random_model(GPT)
    assert model(random_tokens(GPT, 1, 64)).shape == (1, 64, 97)
    with pytest.raises(ValueError, match="65 tokens.*only 64: crop to the last 64"):
        model(random_tokens(GPT, 1, 65))
    cache = Cache(GPT.n_layers)
    with torch.no_grad():
        model(random_tokens(GPT, 1, 60), cache=cache)
        with pytest.raises(ValueError, match="65 tokens"):
            model(random_tokens(GPT, 1, 5), cache=cache)
    assert cache.length == 60


def test_state_copies_and_gradients():
    model = random_model(GPT)
    tokens = random_tokens(GPT, 2, 5)
    twin = copy.deepcopy(model)
    fresh = build(GPT).double().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(tokens)
        assert torch.equal(twin(tokens), expected)
        assert torch.equal(fresh(tokens), expected)
    model(tokens).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("k_proj.bias"):  # adds the same to all scores of a row: no effect
            assert parameter.grad.any(), name


def test_random_weights_to_train_from():
    model = build(replace(GPT, width=128))
    initialise(model, torch.Generator().manual_seed(0))
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[1].attn.o_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.layers[0].mlp.up_proj.bias.any()
    assert torch.equal(model.layers[0].attn_norm.weight, torch.ones(128))
