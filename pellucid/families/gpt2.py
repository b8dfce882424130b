"""GPT-2 and its descendants under its ``model_type``."""

from __future__ import annotations

from typing import Any

from pellucid.families import gguf_rows
from pellucid.families.keys import REQUIRED, ConfigKeys
from pellucid.families.names import Names
from pellucid.families.parts import Activation, Only, eps, factor, tied
from pellucid.families.row import Family
from pellucid.models import GPTConfig, ModelConfig


class _Sizes:
    """Width, layers, heads, hidden width, vocabulary and context under GPT-2's keys."""

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in the sizes; `GPTConfig` works out the others."""
        old_context = keys.integer("n_ctx", None)
        found |= {
            "width": _size(keys, "n_embd", "hidden_size"),
            "n_layers": _size(keys, "n_layer", "num_hidden_layers"),
            "n_heads": _size(keys, "n_head", "num_attention_heads"),
            "hidden_width": keys.integer("n_inner", 0),
            "vocab_size": keys.integer("vocab_size"),
            "context_length": _size(
                keys, "n_positions", "max_position_embeddings", old_context or 1024
            ),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """All of them."""
        return {
            "n_embd": config.width,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_inner": config.hidden_width,
            "vocab_size": config.vocab_size,
            "n_positions": config.context_length,
        }


def _size(keys: ConfigKeys, key: str, other: str, default: Any = REQUIRED) -> int:
    """A size under GPT-2's key or transformers' other name of it; ValueError where they differ."""
    also = keys.integer(other, None)
    stated = keys.integer(key, default if also is None else also)
    if also is not None and stated != also:
        raise ValueError(
            f"{keys.where}: {key} is {stated} and {other}, its other name, {also}: leave one out"
        )
    return stated


class _QKVBias:
    """``"qkv_bias": false``, a key of our own: transformers has no GPT-2 without these biases.

    Such a model is saved with biases of zero, which compute the same, and we drop them again.
    """

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in ``qkv_bias``."""
        found["qkv_bias"] = keys.flag("qkv_bias", True)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The key where it says something."""
        return {} if "qkv" in config.biases else {"qkv_bias": False}


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    source="models/gpt2/modeling_gpt2.py: GPT2Attention, GPT2MLP, GPT2Block",
    stated={},
    make=GPTConfig,
    parts=(
        Only(
            values={
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "reorder_and_upcast_attn": False,
            }
        ),
        _Sizes(),
        eps(1e-5, "layer_norm_epsilon"),
        Activation(
            key="activation_function",
            choices={
                "gelu_new": "gelu_new",  # an operation at a time
                "gelu_pytorch_tanh": "gelu_tanh",  # the same formula in one kernel
                "gelu": "gelu",
            },
            default="gelu_new",
        ),
        tied(True),
        factor("embd_pdrop", "embed_dropout", 0.1),
        factor("attn_pdrop", "attn_dropout", 0.1),
        factor("resid_pdrop", "resid_dropout", 0.1),
        _QKVBias(),
    ),
    names=Names(
        prefix="transformer.",
        blocks="h",
        before={"wte": "embed", "wpe": "pos_embed"},
        layer={
            "ln_1": "attn_norm",
            "attn.c_attn": "attn.q_proj|attn.k_proj|attn.v_proj",
            "attn.c_proj": "attn.o_proj",
            "ln_2": "mlp_norm",
            "mlp.c_fc": "mlp.up_proj",
            "mlp.c_proj": "mlp.down_proj",
        },
        after={"ln_f": "norm"},
        transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        zero_bias=frozenset({"attn.c_attn"}),
        # the causal mask and its filling, in files of transformers < 4.31
        buffers={"attn.bias": None, "attn.masked_bias": None},
    ),
    gguf=gguf_rows.GPT2,
)
