"""Live transformers models of other families: their hooks give our names, whatever the features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import LLAMA, random_tokens

from pellucid import graph
from pellucid.diff import compare, from_model
from pellucid.diff.sides.transformers import from_transformers
from pellucid.models import RopeConfig, build
from pellucid.models.config import Layer

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")

SHAPE = replace(LLAMA, width=32, head_dim=16, hidden_width=96, n_layers=2, tied=True, norm_eps=1e-6)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
WINDOWED = ["sliding_attention", "full_attention"]
GEMMA = {
    "norm_offset": True,
    "norm_places": "both",
    "embed_scale": float(torch.tensor(32**0.5)),
    "activation": "gelu_tanh",
    "rounding": "gemma",
    "score_scale": 0.25,
    "window": 5,
}
GEMMA_NAMES = {
    "post_attention_layernorm": "attn_out_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}
OLMO_NAMES = {
    "post_attention_layernorm": "attn_out_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}
THETA = {"rope_type": "default", "rope_theta": 10000.0}
# transformers' class, its config beyond SIZES, our config, module names that are not Llama's
FAMILIES = {
    "Qwen3": ({"rope_parameters": THETA}, replace(SHAPE, qk_norm="head"), {}),
    "Gemma2": (
        {
            "rope_parameters": THETA,
            "layer_types": WINDOWED,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
        replace(SHAPE, **GEMMA, layers=(Layer(window=True), Layer()), score_cap=3.0, logit_cap=2.0),
        GEMMA_NAMES,
    ),
    "Gemma3": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": THETA,
            },
            "layer_types": WINDOWED,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
        },
        replace(
            SHAPE,
            **GEMMA,
            qk_norm="head",
            rope=RopeConfig(theta=1e6),
            second_rope=RopeConfig(theta=1e4),
            layers=(Layer(True, "second_rope"), Layer()),
        ),
        GEMMA_NAMES,
    ),
    "Olmo2": (
        {"rope_parameters": THETA},
        replace(SHAPE, norm_places="after", qk_norm="whole", rounding="olmo"),
        OLMO_NAMES,
    ),
    "SmolLM3": (
        {"rope_parameters": THETA, "no_rope_layers": [1, 0]},
        replace(SHAPE, layers=(Layer(), Layer(rope=""))),
        {},
    ),
    "Granite": (
        {
            "rope_parameters": THETA,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.25,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.0625,
        },
        replace(
            SHAPE, embed_scale=12.0, residual_scale=0.25, logit_scale=0.125, score_scale=0.0625
        ),
        {},
    ),
    "HunYuanDenseV1": (
        {"rope_parameters": THETA},
        replace(SHAPE, qk_norm="head", qk_norm_last=True),
        {"self_attn.query_layernorm": "attn.q_norm", "self_attn.key_layernorm": "attn.k_norm"},
    ),
}
LLAMA_NAMES = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.": "attn.",
}


def renamed(stored: str, own: dict[str, str]) -> str:
    """Our name of one of transformers' parameters."""
    name = stored.removeprefix("model.")
    for theirs, ours in {**own, **LLAMA_NAMES, **own}.items():
        name = name.replace(theirs, ours)
    return name


def both(kind: str, dtype: torch.dtype):
    """Ours and transformers' model of the same random weights."""
    more, config, own = FAMILIES[kind]
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    stated = getattr(transformers, f"{kind}{suffix}")(**{**SIZES, **more})
    theirs = getattr(transformers, f"{kind}ForCausalLM")(stated).to(dtype).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            values = torch.randn(parameter.shape, generator=random)
            norm = parameter.ndim == 1 and not config.norm_offset
            parameter.copy_(1 + values / 10 if norm else values / 4)
    weights = {renamed(name, own): x for name, x in theirs.state_dict().items()}
    weights.pop("lm_head.weight", None)
    ours = build(config)
    ours.load_state_dict({name: x.detach().clone() for name, x in weights.items()}, assign=True)
    return ours.eval(), theirs


# What no module returns and attention is not given, beside what happens inside eager attention.
INSIDE = {"attn.scores", "attn.capped_scores", "attn.masked_scores"}
UNSEEN = {
    "Gemma2": {"embed"},
    "Gemma3": {"embed"},
    "Granite": {"embed_scaled", "attn_out", "mlp_out"},
    "HunYuanDenseV1": {"attn.q_rotated", "attn.k_rotated"},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_live_model_computes_stands_under_our_names(kind):
    """Held to our decoder: the same tensors, each judged from its own inputs."""
    ours, theirs = both(kind, torch.float32)
    a, b = from_model(ours, "ours"), from_transformers(theirs, kind)
    prompt = [random_tokens(ours.config, 11).tolist()]
    missing = set(graph.expand(ours.config)) - set(b.observe(prompt, 0))
    leaves = {graph.leaf(name) for name in missing}
    assert leaves - INSIDE == UNSEEN.get(kind, set())
    report = compare(a, b, prompt)
    assert report.verdict in ("identical", "within-rounding"), report.summary()


@pytest.mark.parametrize("kind", ["Gemma2", "Olmo2", "SmolLM3"])
def test_a_norm_or_a_window_of_a_live_model_that_is_wrong_is_found(kind):
    ours, theirs = both(kind, torch.float32)
    prompt = [random_tokens(ours.config, 11).tolist()]
    if kind == "SmolLM3":
        theirs.model.layers[1].self_attn.use_rope = True
        first, cause = "layers.1.attn.pattern", "NoPE layer turned"
    elif kind == "Gemma2":
        theirs.model.layers[0].self_attn.attn_logit_softcapping = None
        first, cause = "layers.0.attn.pattern", "score cap missing"
    else:
        theirs.model.layers[0].self_attn.q_norm = torch.nn.Identity()
        first, cause = "layers.0.attn.q_normed", "q/k norm missing"
    report = compare(from_model(ours, "ours"), from_transformers(theirs, kind), prompt)
    assert report.first is not None and report.cause is not None, report.summary()
    assert (report.first.name, report.cause.name) == (first, cause)
