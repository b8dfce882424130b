"""Gemma 1 to 3, of the last also the text part of the models that see pictures."""

from __future__ import annotations

from pellucid.families import gguf_rows
from pellucid.families.layers import FULL, WINDOW, LayerTypes, one_in
from pellucid.families.names import Names, llama_layer
from pellucid.families.parts import (
    GELU_TANH,
    VOCABULARY,
    Activation,
    Bias,
    Computed,
    Key,
    Only,
    Sizes,
    cap,
    context,
    eps,
    root_inverse,
    square_inverse,
    tied,
)
from pellucid.families.rope_keys import LayerRopes, Rope
from pellucid.families.row import Family

_FEATURES = {"norm_offset": True, "rounding": "gemma"}
_CAUSAL = Only(values={"use_bidirectional_attention": False})
_EMBED_SCALE = Computed(ours="embed_scale", value=lambda found: max(found["width"], 0) ** 0.5)
_BIAS = Bias(key="attention_bias", products=("qkv", "o"))
_GELU = Activation(key="hidden_activation", choices=GELU_TANH, default="gelu_pytorch_tanh")
_SCORE_SCALE = Key(
    theirs="query_pre_attn_scalar",
    ours="score_scale",
    kind="number",
    default=256,
    into=root_inverse,
    back=square_inverse,
)
_NAMES = Names(
    layer=llama_layer(
        {
            "post_attention_layernorm": "attn_out_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        }
    )
)
_IGNORED = frozenset({"cache_implementation", "_sliding_window_pattern"})

GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    source="models/gemma/modeling_gemma.py: GemmaRMSNorm, GemmaMLP, GemmaTextScaledWordEmbedding",
    features=_FEATURES,
    parts=(
        _CAUSAL,
        Sizes(kv_heads=16, head_dim=256),
        # releases say "gelu" and mean the tanh form; their hidden_activation says so, or nothing
        Only(values={"hidden_activation": "gelu_pytorch_tanh"}),
        Activation(choices={**GELU_TANH, "gelu": "gelu_tanh"}, default="gelu_pytorch_tanh"),
        VOCABULARY,
        context(8192),
        eps(1e-6),
        Rope(),
        tied(True),
        _BIAS,
        _EMBED_SCALE,
    ),
    gguf=gguf_rows.GEMMA,
)

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    source="models/gemma2/modeling_gemma2.py: Gemma2Attention, Gemma2DecoderLayer",
    features={**_FEATURES, "norm_places": "both"},
    parts=(
        _CAUSAL,
        Sizes(kv_heads=4, head_dim=256),
        Only(values={"hidden_act": "gelu_pytorch_tanh"}),
        _GELU,
        VOCABULARY,
        context(8192),
        eps(1e-6),
        Rope(),
        tied(True),
        _BIAS,
        _EMBED_SCALE,
        _SCORE_SCALE,
        cap("attn_logit_softcapping", "score_cap", 50.0),
        cap("final_logit_softcapping", "logit_cap", 30.0),
        LayerTypes(window=4096, windowed=one_in(2)),
    ),
    names=_NAMES,
    ignored=_IGNORED | {"sliding_window_size"},  # sliding_window again, which no class reads
    gguf=gguf_rows.GEMMA2,
)

GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    source="models/gemma3/modeling_gemma3.py: Gemma3Attention, Gemma3DecoderLayer",
    features={**_FEATURES, "norm_places": "both", "qk_norm": "head"},
    parts=(
        _CAUSAL,
        # the text part of google/gemma-3-4b-it states four sizes and leaves the rest to the class
        Sizes(
            kv_heads=4,
            head_dim=256,
            defaults={"width": 2304, "n_heads": 8, "n_layers": 26, "hidden_width": 9216},
        ),
        _GELU,
        Key(theirs="vocab_size", ours="vocab_size", kind="integer", default=262208),
        context(131072),
        eps(1e-6),
        LayerRopes(theta=1000000.0, local=10000.0, local_key="rope_local_base_freq"),
        tied(True),
        _BIAS,
        _EMBED_SCALE,
        _SCORE_SCALE,
        cap("attn_logit_softcapping", "score_cap", None),
        cap("final_logit_softcapping", "logit_cap", None),
        LayerTypes(
            window=4096,
            windowed=one_in(6),
            pattern_key="sliding_window_pattern",
            ropes={FULL: "rope", WINDOW: "second_rope"},
        ),
    ),
    names=_NAMES,
    ignored=_IGNORED,
    gguf=gguf_rows.GEMMA3,
)

ROWS = (GEMMA, GEMMA2, GEMMA3)
