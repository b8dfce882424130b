"""OLMo, Granite, Cohere, Ministral 3, StarCoder 2, Jais 2 and nanochat."""

from __future__ import annotations

from pellucid.families import gguf_rows
from pellucid.families.layers import (
    FULL,
    WINDOW,
    EveryWindow,
    LayerThetas,
    LayerTypes,
    one_in,
)
from pellucid.families.names import Names, llama_layer
from pellucid.families.parts import (
    RELU2,
    SILU,
    VOCABULARY,
    Activation,
    Bias,
    Key,
    Only,
    Sizes,
    cap,
    context,
    eps,
    factor,
    inverse,
    norm_of_each_head,
    tied,
)
from pellucid.families.rope_keys import LayerRopes, Rope
from pellucid.families.row import Family

_ATTENTION_BIAS = Bias(key="attention_bias", products=("qkv", "o"))
_MLP_BIAS = Bias(key="mlp_bias", products=("mlp",))
_AFTER = Names(
    layer=llama_layer(
        {
            "post_attention_layernorm": "attn_out_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        }
    )
)

OLMO = Family(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    source="models/olmo/modeling_olmo.py: OlmoLayerNorm, OlmoAttention, OlmoRotaryEmbedding",
    features={"norm": "layer", "norm_weight": False, "norm_eps": 1e-5, "rounding": "olmo"},
    parts=(
        Sizes(),
        SILU,
        VOCABULARY,
        context(2048),
        Rope(),
        tied(False),
        _ATTENTION_BIAS,
        Key(theirs="clip_qkv", ours="qkv_clip", kind="number", default=0.0, null=0.0),
    ),
    gguf=gguf_rows.OLMO,
)

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    source="models/olmo2/modeling_olmo2.py: Olmo2RMSNorm, Olmo2Attention, Olmo2DecoderLayer",
    features={"norm_places": "after", "qk_norm": "whole", "rounding": "olmo"},
    parts=(
        Sizes(),
        SILU,
        VOCABULARY,
        context(2048),
        eps(1e-5),
        Rope(),
        tied(False),
        _ATTENTION_BIAS,
    ),
    names=_AFTER,
    gguf=gguf_rows.OLMO2,
)

OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    source="models/olmo3/modeling_olmo3.py: Olmo3Attention, Olmo3RotaryEmbedding",
    features=OLMO2.features,
    parts=(
        Sizes(),
        SILU,
        VOCABULARY,
        context(2048),
        eps(1e-5),
        LayerRopes(theta=500000.0),
        tied(False),
        _ATTENTION_BIAS,
        LayerTypes(window=4096, windowed=one_in(4), ropes={FULL: "rope", WINDOW: "second_rope"}),
    ),
    names=_AFTER,
    gguf=gguf_rows.OLMO3,
)

_GRANITE_FACTORS = (
    factor("embedding_multiplier", "embed_scale"),
    factor("residual_multiplier", "residual_scale"),
    factor("attention_multiplier", "score_scale"),
    Key(
        theirs="logits_scaling",
        ours="logit_scale",
        kind="number",
        default=1.0,
        into=inverse,
        back=inverse,
    ),
)

GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    source="models/granite/modeling_granite.py: GraniteAttention, GraniteDecoderLayer",
    parts=(
        Sizes(),
        SILU,
        VOCABULARY,
        context(2048),
        eps(1e-6),
        Rope(),
        tied(False),
        _ATTENTION_BIAS,
        _MLP_BIAS,
        *_GRANITE_FACTORS,
    ),
    gguf=gguf_rows.GRANITE,
)

GRANITE_SWA = Family(
    model_type="granite_swa",
    architecture="GraniteSWAForCausalLM",
    source="models/granite_swa/modeling_granite_swa.py: GraniteSWAAttention, GraniteSWAModel",
    features={"sinks": True},
    parts=(
        Sizes(kv_heads=4),
        SILU,
        VOCABULARY,
        context(8192),
        eps(1e-5),
        Rope(),
        tied(True),
        _ATTENTION_BIAS,
        _MLP_BIAS,
        *_GRANITE_FACTORS,
        LayerThetas(window=128, windowed=lambda layer: layer % 4 != 0),
    ),
    gguf=gguf_rows.GRANITE_SWA,
)

_LOGIT_SCALE = factor("logit_scale", "logit_scale", 0.0625)

COHERE = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    source="models/cohere/modeling_cohere.py: CohereLayerNorm, CohereAttention, rotate_half",
    features={"norm": "layer", "parallel": True},
    pairs="neighbours",
    parts=(
        Sizes(),
        SILU,
        VOCABULARY,
        context(8192, also="model_max_length"),
        eps(1e-5, "layer_norm_eps"),
        Rope(theta=500000.0),
        tied(True),
        _ATTENTION_BIAS,
        _LOGIT_SCALE,
        norm_of_each_head("use_qk_norm"),
    ),
    gguf=gguf_rows.COHERE,
)

COHERE2 = Family(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    source="models/cohere2/modeling_cohere2.py: Cohere2LayerNorm, Cohere2Attention",
    features=COHERE.features,
    pairs="neighbours",
    parts=(
        Only(values={"use_embedding_sharing": True, "use_gated_activation": True}),
        Only(values={"use_parallel_block": True, "use_parallel_embedding": False}),
        Only(values={"rotary_pct": 1.0, "position_embedding_type": "rope_gptj"}),
        Sizes(square=True),
        SILU,
        VOCABULARY,
        context(8192),
        eps(1e-5, "layer_norm_eps"),
        Rope(),
        tied(True),
        _ATTENTION_BIAS,
        _LOGIT_SCALE,
        LayerTypes(
            window=4096,
            windowed=one_in(4),
            pattern_key="sliding_window_pattern",
            ropes={FULL: "", WINDOW: "rope"},
        ),
    ),
    ignored=frozenset({"cache_implementation", "layer_switch", "order_of_interleaved_layers"}),
    gguf=gguf_rows.COHERE2,
)

MINISTRAL3 = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    source="models/ministral3/modeling_ministral3.py: get_llama_4_attn_scale, Ministral3Attention",
    parts=(
        Sizes(kv_heads=8, head_dim=128),
        SILU,
        VOCABULARY,
        context(262144),
        eps(1e-5),
        Rope(
            theta=1000000.0,
            extra={"llama_4_scaling_beta": "query_growth"},
            absent={
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        ),
        tied(False),
        EveryWindow(window=None),
    ),
    gguf=gguf_rows.MINISTRAL3,
)

STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    source="models/starcoder2/modeling_starcoder2.py: Starcoder2MLP, Starcoder2Attention",
    features={"norm": "layer", "norm_bias": True, "gated": False},
    parts=(
        Sizes(kv_heads=2),
        Activation(
            choices={"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_new", "gelu": "gelu"},
            default="gelu_pytorch_tanh",
        ),
        VOCABULARY,
        context(4096),
        eps(1e-5, "norm_epsilon"),
        Rope(),
        tied(True),
        Bias(key="use_bias", products=("qkv", "o", "mlp"), default=True),
        EveryWindow(window=None),
    ),
    names=Names(layer=llama_layer({"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"})),
    ignored=frozenset(
        {"residual_dropout", "embedding_dropout", "mlp_type", "norm_type", "resid_pdrop"}
    ),
    gguf=gguf_rows.STARCODER2,
)

JAIS2 = Family(
    model_type="jais2",
    architecture="Jais2ForCausalLM",
    source="models/jais2/modeling_jais2.py: Jais2MLP, Jais2DecoderLayer",
    features={"norm": "layer", "norm_bias": True, "gated": False},
    parts=(
        Sizes(),
        RELU2,
        VOCABULARY,
        context(8192),
        eps(1e-5, "layer_norm_eps"),
        Rope(),
        tied(False),
        Bias(key="attention_bias", products=("qkv", "o"), default=True),
        Bias(key="mlp_bias", products=("mlp",), default=True),
    ),
)

NANOCHAT = Family(
    model_type="nanochat",
    architecture="NanoChatForCausalLM",
    source="models/nanochat/modeling_nanochat.py: NanoChatRMSNorm, NanoChatAttention, rotate_half",
    features={
        "norm_weight": False,
        "embed_norm": True,
        "qk_norm": "head",
        "qk_norm_last": True,
        "gated": False,
    },
    pairs="backwards",
    parts=(
        Sizes(),
        RELU2,
        VOCABULARY,
        context(2048),
        eps(1e-6),
        Rope(),
        tied(False),
        _ATTENTION_BIAS,
        cap("final_logit_softcapping", "logit_cap", 15.0),
    ),
    names=Names(layer=llama_layer({"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"})),
)

ROWS = (
    OLMO,
    OLMO2,
    OLMO3,
    GRANITE,
    GRANITE_SWA,
    COHERE,
    COHERE2,
    MINISTRAL3,
    STARCODER2,
    JAIS2,
    NANOCHAT,
)
