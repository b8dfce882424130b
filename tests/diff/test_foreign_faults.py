"""One line of transformers changed: found at the right tensor, on either side, with its cause."""

from __future__ import annotations

import pytest
import torch
from peers import CONFIGS, pair, rows

from pellucid.diff import compare, from_model
from pellucid.diff.two_models import live_side

pytestmark = pytest.mark.peers
pytest.importorskip("transformers")


def rotate_backwards(x):
    """The other half negated: RoPE by the opposite angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


def other_rotation(model, monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "rotate_half", rotate_backwards)


def other_scaling(model, monkeypatch):
    for layer in model.model.layers:
        layer.self_attn.scaling = 1.0


def other_eps(model, monkeypatch):
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 1e-6


def norm_without_weight(model, monkeypatch):
    norm = model.model.norm
    monkeypatch.setattr(
        norm, "forward", lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    )


def other_theta(model, monkeypatch):
    model.model.rotary_emb.inv_freq = 1.0 / (500000.0 ** (torch.arange(0, 16, 2) / 16))


def tiled_heads(model, monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1))


FAULTS = {
    "rotate_half": (other_rotation, "layers.0.attn.q_rotated", "RoPE"),
    "scaling": (other_scaling, "layers.0.attn.pattern", "scale"),
    "eps": (other_eps, "layers.1.mlp_norm", "eps"),
    "norm": (norm_without_weight, "final_norm", "norm"),
    "theta": (other_theta, "rope.cos", "theta"),
    "repeat_kv": (tiled_heads, "layers.0.attn.pattern", "head"),
}


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_patched_transformers_is_found_out(fault, side, tmp_path, monkeypatch):
    change, first, cause = FAULTS[fault]
    config = CONFIGS["gqa"]
    ours, theirs = pair(config, tmp_path)
    change(theirs, monkeypatch)
    mine, other = from_model(ours, "ours"), live_side(theirs, "theirs")
    report = compare(*((other, mine) if side == "a" else (mine, other)), rows(config, 13))
    assert report.verdict == "diverged"
    assert (report.first.name, report.first.side) == (first, side)
    assert report.cause is not None and cause.lower() in report.cause.name.lower(), report.cause
