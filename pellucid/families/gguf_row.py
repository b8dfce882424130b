"""What llama.cpp's files call the keys and tensors of a family: what a row of `gguf_rows` is.

A key of a GGUF file is a key of ``config.json`` under another name, so the family's parts read and
write it as they do there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
    "attn_sinks.weight": "attn.sinks",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "mlp_out_norm",
}
NORMS = frozenset(
    {"attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm", "norm", "attn.q_norm", "attn.k_norm"}
)


def gguf_names(
    changes: Mapping[str, str] | None = None,
    plus_one: frozenset[str] = frozenset(),
    zero_bias: frozenset[str] = frozenset(),
    reorders_all: bool = False,
) -> Names:
    """llama.cpp's names of tensors; `changes` are those that take the place of the usual ones."""
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
        reorders_all=reorders_all,
        buffers={},
    )


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """How llama.cpp's files state a family.

    architecture  ``general.architecture``
    keys          key after the architecture's name -> key of config.json
    assumed       config.json's keys where no key of the file states them, as llama.cpp assumes
    fixed         keys that llama.cpp needs and that always have this value
    flags         a tensor of block 0 -> the flag of config.json that its presence is
    names         of the tensors
    pairs         where the files keep the two rows that RoPE turns together, see `PairOrder`
    share         config.json's key for the share of a head that RoPE turns
    period        every how many layers one sees everything where the file does not say; 0: it
                  always says; None: layers are alike
    some_turned   ``attention.rope_pattern`` says which layers RoPE turns (Granite with windows)
    plain_in_windows
                  RoPE's scaling counts in layers that see everything only (OLMo 3)
    head          "own": every file has one, a tied one too; "tied": none has
    growth        ``attention.temperature_scale`` is in RoPE's table (Ministral 3)
    chosen_by     the key whose presence tells this family from others of its architecture
    comes_back    the family as which its files are read, where that is another
    wide_at       layers of the one size whose queries are divided by √(width / heads), not by √D
    scale_key     config.json's key for what queries are divided by, where llama.cpp works it out
    longrope      the tensors of long and short factors are read
    normed_from   models of so many layers have normed heads, and smaller ones have not
    """

    architecture: str
    keys: Mapping[str, str] = field(default_factory=lambda: KEYS)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    names: Names = field(default_factory=gguf_names)
    pairs: Pairs = "halves"
    share: str = ""
    period: int | None = None
    some_turned: bool = False
    plain_in_windows: bool = False
    head: Literal["", "own", "tied"] = ""
    growth: bool = False
    chosen_by: str = ""
    comes_back: str = ""
    wide_at: int = 0
    scale_key: str = ""
    longrope: bool = False
    normed_from: int = 0
