"""The families that llama.cpp has, and how its files state each.

Sources: llama.cpp's ``gguf-py/gguf/constants.py`` (names), ``conversion/*.py`` (what is written,
and in which architectures the two rows that RoPE turns together stand side by side) and
``src/models/*.cpp`` (what is read, and what is assumed where nothing is written). The peers tests
hold each row against llama.cpp itself.
"""

from __future__ import annotations

from dataclasses import replace

from pellucid.families.gguf_row import KEYS, NORMS, Gguf, gguf_names

_QKV = {"attn_qkv": "attn.q_proj|attn.k_proj|attn.v_proj"}
_GATE_UP = {"ffn_up": "mlp.gate_proj|mlp.up_proj"}
_QK_BIAS = {"attn_q.bias": "attention_bias"}
_MLP_BIAS = {"ffn_up.bias": "mlp_bias"}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SHARE = "partial_rotary_factor"


def _layer_norm(eps: str) -> dict[str, str]:
    """The keys of a family with LayerNorm, whose epsilon config.json calls so."""
    keys = {k: v for k, v in KEYS.items() if k != "attention.layer_norm_rms_epsilon"}
    return {**keys, "attention.layer_norm_epsilon": eps}


LLAMA = Gguf(architecture="llama", flags=_QK_BIAS | _MLP_BIAS, pairs="neighbours")
MISTRAL = replace(LLAMA, comes_back="llama")
MINISTRAL3 = Gguf(architecture="mistral3", pairs="neighbours", growth=True)
SMOLLM3 = replace(LLAMA, architecture="smollm3", names=gguf_names(reorders_all=True))
ARCEE = replace(LLAMA, architecture="arcee", flags={})
QWEN2 = Gguf(architecture="qwen2")
QWEN3 = Gguf(architecture="qwen3", flags=_QK_BIAS)
SEED_OSS = Gguf(
    architecture="seed_oss",
    flags=_QK_BIAS,
    names=gguf_names({"post_attention_norm": "mlp_norm"}),
)
HUNYUAN = Gguf(architecture="hunyuan-dense")
ERNIE = Gguf(architecture="ernie4_5", pairs="neighbours")
EXAONE4 = Gguf(
    architecture="exaone4", keys={**KEYS, **_WINDOW}, assumed={"sliding_window": None}, period=0
)
OLMO = Gguf(
    architecture="olmo",
    keys={
        **{k: v for k, v in KEYS.items() if k != "attention.layer_norm_rms_epsilon"},
        "attention.clamp_kqv": "clip_qkv",
    },
    fixed={"attention.layer_norm_epsilon": 1e-5},
    pairs="neighbours",
)
OLMO2 = Gguf(architecture="olmo2", head="own")
OLMO3 = replace(
    OLMO2,
    keys={**KEYS, **_WINDOW},
    period=4,
    plain_in_windows=True,
    chosen_by="attention.sliding_window",
)
GRANITE = Gguf(
    architecture="granite",
    keys={
        **KEYS,
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    flags=_QK_BIAS | _MLP_BIAS,
    pairs="neighbours",
)
GRANITE_SWA = replace(
    GRANITE,
    architecture="granite_swa",
    keys={**GRANITE.keys, **_WINDOW},
    names=gguf_names(reorders_all=True),
    period=0,
    some_turned=True,
)
_LOGITS = {"logit_scale": "logit_scale"}
COHERE = Gguf(
    architecture="command-r",
    flags={"attn_q_norm.weight": "use_qk_norm"},
    keys={**_layer_norm("layer_norm_eps"), **_LOGITS},
    fixed={"rope.scaling.type": "none"},
    pairs="neighbours",
    head="tied",
    normed_from=64,
)
COHERE2 = replace(
    COHERE,
    architecture="cohere2",
    keys={**COHERE.keys, **_WINDOW},
    flags={},
    period=4,
    normed_from=0,
)
GLM = Gguf(
    architecture="chatglm",
    flags=_QK_BIAS,
    names=gguf_names(_GATE_UP),
    pairs="neighbours",
    share=_SHARE,
)
GLM4 = replace(GLM, architecture="glm4")
GEMMA = Gguf(architecture="gemma", names=gguf_names(plus_one=NORMS), head="tied")
GEMMA2 = Gguf(
    architecture="gemma2",
    keys={**KEYS, **_CAPS, **_WINDOW},
    names=GEMMA.names,
    head="tied",
    period=2,
    wide_at=46,
    scale_key="query_pre_attn_scalar",
)
GEMMA3 = replace(
    GEMMA2,
    architecture="gemma3",
    keys={**GEMMA2.keys, "rope.freq_base_swa": "rope_local_base_freq"},
    assumed={"sliding_window": None},
    head="",
    period=6,
    wide_at=62,
)
PHI2 = Gguf(architecture="phi2", keys=_layer_norm("layer_norm_eps"), share=_SHARE)
PHI3 = Gguf(
    architecture="phi3",
    keys={
        **KEYS,
        **_WINDOW,
        "rope.scaling.original_context_length": "original_max_position_embeddings",
    },
    names=gguf_names({**_QKV, **_GATE_UP}),
    share=_SHARE,
    longrope=True,
)
STABLELM = Gguf(
    architecture="stablelm",
    keys={
        **_layer_norm("layer_norm_eps"),
        "use_parallel_residual": "use_parallel_residual",
    },
    flags={"attn_q.bias": "use_qkv_bias", "attn_q_norm.weight": "qk_layernorm"},
    share=_SHARE,
    head="own",
)
NEMOTRON = Gguf(
    architecture="nemotron",
    keys=_layer_norm("norm_eps"),
    flags=_QK_BIAS | _MLP_BIAS,
    names=gguf_names(plus_one=NORMS),
    share=_SHARE,
    head="own",
)
STARCODER2 = Gguf(
    architecture="starcoder2",
    keys=_layer_norm("norm_epsilon"),
    flags={"attn_q.bias": "use_bias"},
)
GPT2 = Gguf(
    architecture="gpt2",
    keys={
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.qkv_bias": "qkv_bias",  # our own: the biases are zeros, as llama.cpp needs some
    },
    names=gguf_names(_QKV, zero_bias=frozenset({"attn_qkv"})),
)
