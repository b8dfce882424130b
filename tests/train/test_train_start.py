"""The weights a run begins with."""

from __future__ import annotations

import pytest
import torch

from pellucid.models import GPTConfig, LlamaConfig, build
from pellucid.train import begin
from pellucid.train.initial_weights import sinusoids

GPT2 = GPTConfig(vocab_size=500, context_length=64, width=48, n_layers=2, n_heads=4)
LLAMA = LlamaConfig(
    vocab_size=500, width=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, hidden_width=128
)


def test_between_sinusoids_an_offset_is_one_rotation():
    table = sinusoids(64, 48).double()
    products = table @ table.T  # depends on how far apart two positions are, and on nothing else
    for offset in range(64):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert products[0, 0].item() == pytest.approx(24)
    assert table[0].tolist() == [0.0] * 24 + [1.0] * 24
    assert sinusoids(5, 7).shape == (5, 7)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_weights_are_of_the_right_size_and_depend_on_the_seed_alone(config):
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = build(config)
        begin(model, seed)
        return model.state_dict()

    one, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    for name in {"embed.weight", "pos_embed.weight", "layers.0.attn.q_proj.weight"} & one.keys():
        assert one[name].pow(2).mean().sqrt().item() == pytest.approx(0.02, rel=0.05)
    # What adds to the residual stream is smaller by the square root of the number of additions.
    added = one["layers.1.mlp.down_proj.weight"].std().item()
    assert added == pytest.approx(0.02 / 2, rel=0.05)
