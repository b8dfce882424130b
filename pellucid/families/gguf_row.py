"""What llama.cpp's files call the keys and tensors of a family: a table beside the family's row.

A key of a GGUF file is a key of ``config.json`` under another name, so the family's parts read and
write it as they do there. Source: llama.cpp's ``gguf-py/gguf/constants.py`` (names),
``convert_hf_to_gguf.py`` (what is written) and ``src/llama-model.cpp`` (what is read, and what is
assumed where nothing is written).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pellucid.families.names import Names, Pairs

KEYS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_LAYER: Mapping[str, str] = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q_proj",
    "attn_k": "attn.k_proj",
    "attn_v": "attn.v_proj",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_output": "attn.o_proj",
    "post_attention_norm": "attn_out_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "mlp_out_norm",
}
_JOINED_QKV = {"attn_qkv": "attn.q_proj|attn.k_proj|attn.v_proj"}
NORMS = frozenset(
    {"attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm", "norm", "attn.q_norm", "attn.k_norm"}
)


def gguf_names(
    changes: Mapping[str, str] | None = None,
    plus_one: frozenset[str] = frozenset(),
    zero_bias: frozenset[str] = frozenset(),
) -> Names:
    """llama.cpp's names of tensors; `changes` are joined tensors that take the place of theirs."""
    moved = {ours for joined in (changes or {}).values() for ours in joined.split("|")}
    kept = {theirs: ours for theirs, ours in _LAYER.items() if ours not in moved}
    return Names(
        prefix="",
        blocks="blk",
        before={"token_embd": "embed", "position_embd": "pos_embed"},
        layer={**kept, **(changes or {})},
        after={"output_norm": "norm"},
        head="output",
        plus_one=plus_one,
        zero_bias=zero_bias,
        buffers={},
    )


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """How llama.cpp's files state a family.

    architecture  ``general.architecture``
    keys          key after the architecture's name -> key of config.json
    assumed       config.json's keys where no key of the file states them, as llama.cpp assumes
    biases        a tensor of block 0 -> the flag of config.json that its presence is
    names         of the tensors
    pairs         where the files keep the two rows that RoPE turns together, see `Order`
    share         config.json's key for the share of a head that RoPE turns
    wide_at       layers of the one size whose queries are divided by √(width / heads), not by √D
    scale_key     config.json's key for what queries are divided by, where llama.cpp works it out
    longrope      the tensors of long and short factors are read
    """

    architecture: str
    keys: Mapping[str, str] = field(default_factory=lambda: KEYS)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    names: Names = field(default_factory=gguf_names)
    pairs: Pairs = "halves"
    share: str = ""
    wide_at: int = 0
    scale_key: str = ""
    longrope: bool = False


QK_BIAS = {"attn_q.bias": "attention_bias"}
MLP_BIAS = {"ffn_up.bias": "mlp_bias"}
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
LLAMA = Gguf(architecture="llama", biases=QK_BIAS | MLP_BIAS, pairs="neighbours")
QWEN2 = Gguf(architecture="qwen2")
QWEN3 = Gguf(architecture="qwen3", biases=QK_BIAS)
OLMO2 = Gguf(architecture="olmo2", biases=QK_BIAS)
GRANITE = Gguf(
    architecture="granite",
    keys={
        **KEYS,
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    biases=QK_BIAS | MLP_BIAS,
    pairs="neighbours",
)
GEMMA = Gguf(architecture="gemma", names=gguf_names(plus_one=NORMS))
GEMMA2 = Gguf(
    architecture="gemma2",
    keys={**KEYS, **CAPS, **WINDOW},
    names=GEMMA.names,
    wide_at=46,
    scale_key="query_pre_attn_scalar",
)
GEMMA3 = replace(
    GEMMA2,
    architecture="gemma3",
    keys={
        **GEMMA2.keys,
        "rope.freq_base_swa": "rope_local_base_freq",
        "attention.sliding_window_pattern": "sliding_window_pattern",
    },
    wide_at=62,
)
PHI3 = Gguf(
    architecture="phi3",
    keys={
        **KEYS,
        **WINDOW,
        "rope.scaling.original_context_length": "original_max_position_embeddings",
    },
    names=gguf_names({**_JOINED_QKV, "ffn_up": "mlp.gate_proj|mlp.up_proj"}),
    share="partial_rotary_factor",
    longrope=True,
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
    names=gguf_names(_JOINED_QKV, zero_bias=frozenset({"attn_qkv"})),
)
