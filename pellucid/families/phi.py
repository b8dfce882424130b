"""Phi 1 to 4, and others that turn a part of each head: StableLM, Nemotron, GLM."""

from __future__ import annotations

from pellucid.families import gguf_rows
from pellucid.families.layers import EveryWindow
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
    context,
    eps,
    norm_of_each_head,
    tied,
)
from pellucid.families.rope_keys import Rope
from pellucid.families.row import Family

_LAYER_NORM = {"norm": "layer", "norm_bias": True}
_DROPOUTS = frozenset({"embd_pdrop", "resid_pdrop"})
_GATE_UP = {"mlp.gate_up_proj": "mlp.gate_proj|mlp.up_proj"}

PHI = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    source="models/phi/modeling_phi.py: PhiAttention, PhiMLP, PhiDecoderLayer",
    features={**_LAYER_NORM, "parallel": True, "gated": False},
    parts=(
        Sizes(),
        Activation(
            choices={"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
            default="gelu_new",
        ),
        VOCABULARY,
        context(2048),
        eps(1e-5, "layer_norm_eps"),
        Rope(share=0.5),
        tied(False),
        Bias(products=("qkv", "o", "mlp", "head")),
        Key(
            theirs="qk_layernorm",
            ours="qk_norm",
            kind="flag",
            default=False,
            into=lambda there: "head" if there else "",
            back=bool,
        ),
    ),
    names=Names(
        layer={
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn.q_proj",
            "self_attn.k_proj": "attn.k_proj",
            "self_attn.v_proj": "attn.v_proj",
            "self_attn.q_layernorm": "attn.q_norm",
            "self_attn.k_layernorm": "attn.k_norm",
            "self_attn.dense": "attn.o_proj",
            "mlp.fc1": "mlp.up_proj",
            "mlp.fc2": "mlp.down_proj",
        },
        after={"final_layernorm": "norm"},
    ),
    ignored=_DROPOUTS,
    gguf=gguf_rows.PHI2,
)

PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    source="models/phi3/modeling_phi3.py: Phi3Attention, Phi3MLP",
    parts=(
        Sizes(),
        SILU,
        VOCABULARY,
        context(4096),
        eps(1e-5),
        Rope(
            share=1.0,
            types=("default", "longrope"),
            aliases={"su": "longrope", "yarn": "longrope"},  # as older files call it
            original=4096,
        ),
        tied(False),
        Only(values={"attention_bias": False, "mlp_bias": False, "lm_head_bias": False}),
        Only(values={"full_attn_mod": 1}),
        EveryWindow(window=None),
    ),
    names=Names(
        layer={
            "input_layernorm": "attn_norm",
            "self_attn.qkv_proj": "attn.q_proj|attn.k_proj|attn.v_proj",
            "self_attn.o_proj": "attn.o_proj",
            "post_attention_layernorm": "mlp_norm",
            "mlp.gate_up_proj": "mlp.gate_proj|mlp.up_proj",
            "mlp.down_proj": "mlp.down_proj",
        }
    ),
    ignored=_DROPOUTS | {"auto_map", "interpolate_factor"},
    gguf=gguf_rows.PHI3,
)

STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    source="models/stablelm/modeling_stablelm.py: StableLmAttention, StableLmDecoderLayer",
    features=_LAYER_NORM,
    parts=(
        Sizes(kv_heads=32, square=True),
        SILU,
        VOCABULARY,
        context(4096),
        eps(1e-5, "layer_norm_eps"),
        Rope(share=0.25),
        tied(False),
        Bias(key="use_qkv_bias", products=("qkv",)),
        Key(theirs="use_parallel_residual", ours="parallel", kind="flag", default=False),
        norm_of_each_head("qk_layernorm"),
    ),
    names=Names(
        layer=llama_layer(
            {
                "self_attn.q_layernorm.norms": "attn.q_norm",
                "self_attn.k_layernorm.norms": "attn.k_norm",
            }
        ),
        norm_per_head=True,
    ),
    ignored=frozenset({"hidden_dropout", "rotary_scaling_factor"}),
    gguf=gguf_rows.STABLELM,
)

NEMOTRON = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    source="models/nemotron/modeling_nemotron.py: NemotronLayerNorm1P, NemotronMLP",
    features={**_LAYER_NORM, "norm_offset": True, "gated": False},
    parts=(
        Sizes(),
        RELU2,
        VOCABULARY,
        context(4096),
        eps(1e-5, "norm_eps"),
        Rope(share=0.5),
        tied(False),
        Bias(key="attention_bias", products=("qkv", "o")),
        Bias(key="mlp_bias", products=("mlp",)),
    ),
    ignored=frozenset({"hidden_dropout"}),
    gguf=gguf_rows.NEMOTRON,
)

GLM = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    source="models/glm/modeling_glm.py: GlmAttention, GlmMLP, apply_rotary_pos_emb",
    pairs="neighbours",
    parts=(
        Sizes(kv_heads=2, head_dim=128),
        SILU,
        VOCABULARY,
        context(131072),
        eps(1.5625e-07),
        Rope(share=0.5),
        tied(False),
        Bias(key="attention_bias", products=("qkv",), default=True),
    ),
    names=Names(layer=llama_layer(_GATE_UP)),
    gguf=gguf_rows.GLM,
)

GLM4 = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    source="models/glm4/modeling_glm4.py: Glm4Attention, Glm4DecoderLayer",
    features={"norm_places": "both"},
    pairs="neighbours",
    parts=GLM.parts,
    names=Names(
        layer=llama_layer(
            {
                **_GATE_UP,
                "post_self_attn_layernorm": "attn_out_norm",
                "post_mlp_layernorm": "mlp_out_norm",
            }
        )
    ),
    gguf=gguf_rows.GLM4,
)

ROWS = (PHI, PHI3, STABLELM, NEMOTRON, GLM, GLM4)
