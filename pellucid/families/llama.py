"""Llama, and the families that differ from it in a few keys: Mistral, Qwen, SmolLM and others."""

from __future__ import annotations

from pellucid.families import gguf_rows
from pellucid.families.layers import (
    FULL,
    WINDOW,
    EveryWindow,
    LayerTypes,
    SomeRope,
    UpperWindows,
    one_in,
)
from pellucid.families.names import Names, llama_layer
from pellucid.families.parts import (
    RELU2,
    SILU,
    VOCABULARY,
    Bias,
    Only,
    Sizes,
    context,
    eps,
    tied,
)
from pellucid.families.rope_keys import Rope
from pellucid.families.row import Family

_BIASES = (
    Bias(key="attention_bias", products=("qkv", "o")),
    Bias(key="mlp_bias", products=("mlp",)),
)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    source="models/llama/modeling_llama.py: LlamaAttention, LlamaMLP, LlamaDecoderLayer",
    stated={},
    parts=(
        Only(values={"pretraining_tp": 1, "partial_rotary_factor": 1.0, "rope_interleaved": False}),
        Sizes(),
        SILU,
        VOCABULARY,
        context(2048, also="max_sequence_length"),  # the first Llama conversions' key
        eps(1e-6),
        Rope(),
        tied(False),
        *_BIASES,
    ),
    gguf=gguf_rows.LLAMA,
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    source="models/mistral/modeling_mistral.py: MistralAttention, MistralModel",
    parts=(
        Sizes(kv_heads=8),
        SILU,
        VOCABULARY,
        context(131072),
        eps(1e-6),
        Rope(),
        tied(False),
        EveryWindow(window=4096),
    ),
    gguf=gguf_rows.MISTRAL,
)

MINISTRAL = Family(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    source="models/ministral/modeling_ministral.py: MinistralAttention",
    parts=(*MISTRAL.parts[:-1], LayerTypes(window=4096, windowed=lambda layer: True)),
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    source="models/qwen2/modeling_qwen2.py: Qwen2Attention",
    parts=(
        Sizes(kv_heads=32),
        SILU,
        VOCABULARY,
        context(32768),
        eps(1e-6),
        Rope(),
        tied(False),
        Only(values={"use_mrope": False}),  # pictures' positions, of models that see
        Bias(products=("qkv",)),
        UpperWindows(window=4096, first=28),
    ),
    gguf=gguf_rows.QWEN2,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    source="models/qwen3/modeling_qwen3.py: Qwen3Attention",
    features={"qk_norm": "head"},
    parts=(
        Sizes(kv_heads=32, head_dim=128),
        *QWEN2.parts[1:-2],
        Bias(key="attention_bias", products=("qkv", "o")),
        UpperWindows(window=4096, first=28),
    ),
    gguf=gguf_rows.QWEN3,
)

SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    source="models/smollm3/modeling_smollm3.py: SmolLM3Attention",
    parts=(
        Sizes(kv_heads=4),
        SILU,
        VOCABULARY,
        context(32768),
        eps(1e-6),
        Rope(theta=2000000.0),
        tied(True),
        *_BIASES,
        SomeRope(interval=4),
    ),
    ignored=frozenset({"pretraining_tp", "max_window_layers"}),
    gguf=gguf_rows.SMOLLM3,
)

SEED_OSS = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    source="models/seed_oss/modeling_seed_oss.py: SeedOssAttention",
    parts=(
        Only(values={"pretraining_tp": 1}),
        Sizes(kv_heads=8, head_dim=128),
        SILU,
        VOCABULARY,
        context(524288),
        eps(1e-6),
        Rope(),
        tied(False),
        Bias(key="attention_bias", products=("qkv",), default=True),
        Bias(key="attention_out_bias", products=("o",)),
        Bias(key="mlp_bias", products=("mlp",)),
    ),
    ignored=frozenset({"residual_dropout"}),
    gguf=gguf_rows.SEED_OSS,
)

ARCEE = Family(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    source="models/arcee/modeling_arcee.py: ArceeMLP",
    features={"gated": False},
    parts=(
        Sizes(),
        RELU2,
        VOCABULARY,
        context(4096),
        eps(1e-5),
        Rope(),
        tied(False),
        *_BIASES,
    ),
    gguf=gguf_rows.ARCEE,
)

HUNYUAN = Family(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    source="models/hunyuan_v1_dense/modeling_hunyuan_v1_dense.py: HunYuanDenseV1Attention",
    features={"qk_norm": "head", "qk_norm_last": True},
    parts=(
        Only(values={"pretraining_tp": 1}),
        Sizes(),
        SILU,
        VOCABULARY,
        context(2048),
        eps(1e-5),
        Rope(),
        tied(False),
        _BIASES[0],
    ),
    names=Names(
        layer=llama_layer(
            {
                "self_attn.query_layernorm": "attn.q_norm",
                "self_attn.key_layernorm": "attn.k_norm",
            }
        )
    ),
    ignored=frozenset({"eod_token_id"}),
    gguf=gguf_rows.HUNYUAN,
)

EXAONE4 = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    source="models/exaone4/modeling_exaone4.py: Exaone4Attention, Exaone4DecoderLayer",
    features={"qk_norm": "head", "norm_places": "after"},
    parts=(
        Sizes(kv_heads=32),
        SILU,
        VOCABULARY,
        context(2048),
        eps(1e-5),
        Rope(),
        tied(False),
        LayerTypes(
            window=4096,
            windowed=one_in(4),
            pattern_key="sliding_window_pattern",
            ropes={FULL: "", WINDOW: "rope"},
            unwindowed="rope",
        ),
    ),
    names=Names(
        layer=llama_layer(
            {
                "post_attention_layernorm": "attn_out_norm",
                "post_feedforward_layernorm": "mlp_out_norm",
            }
        )
    ),
    gguf=gguf_rows.EXAONE4,
)

HELIUM = Family(
    model_type="helium",
    architecture="HeliumForCausalLM",
    source="models/helium/modeling_helium.py: HeliumAttention, HeliumRMSNorm",
    features={"rounding": "gemma"},  # the norm's cast comes after its weight
    pairs="neighbours",
    parts=(
        Sizes(kv_heads=20, head_dim=128, square=True),
        SILU,
        VOCABULARY,
        context(4096),
        eps(1e-8),
        Rope(theta=100000.0),
        tied(False),
        Bias(key="attention_bias", products=("qkv",)),
        Bias(key="mlp_bias", products=("mlp",)),
    ),
)

ERNIE = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    source="models/ernie4_5/modeling_ernie4_5.py: Ernie4_5Attention",
    pairs="neighbours",
    parts=(
        Sizes(kv_heads=2, head_dim=128),
        SILU,
        VOCABULARY,
        context(131072),
        eps(1e-5),
        Rope(theta=500000.0),
        tied(True),
        Bias(key="use_bias", products=("qkv", "o", "mlp")),
    ),
    ignored=frozenset({"compression_ratio", "rope_scaling_factor"}),
    gguf=gguf_rows.ERNIE,
)

ROWS = (
    LLAMA,
    MISTRAL,
    MINISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    SEED_OSS,
    ARCEE,
    HUNYUAN,
    EXAONE4,
    HELIUM,
    ERNIE,
)
