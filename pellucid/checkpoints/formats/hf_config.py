"""Hugging Face's ``config.json`` to our configs and back.

Key names, defaults and their meaning are those of transformers' ``LlamaConfig``, ``GPT2Config``
and ``modeling_rope_utils.py`` (versions 4 and 5). Every key is used, on the list below, or an
error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from pellucid.checkpoints.config_keys import ConfigKeys
from pellucid.models import Config, GPTConfig, LlamaConfig, RopeConfig

# Keys that do not change what a model computes from its tokens.
IGNORED = frozenset(
    {
        # bookkeeping: who wrote the file, and which class reads it (the tensors decide, by name)
        "_name_or_path", "architectures", "transformers_version", "transformers.js_config",
        "is_llama_config", "unsloth_fixed", "unsloth_version", "license",
        # the dtype is the tensors' own
        "dtype", "torch_dtype",
        # how a model was initialised and trained
        "initializer_range", "attention_dropout", "neftune_noise_alpha", "gradient_checkpointing",
        # how transformers runs it
        "use_cache", "_flash_attn_2_enabled", "_attn_implementation",
        "_attn_implementation_autoset", "attn_implementation", "torchscript", "use_bfloat16",
        "tf_legacy_loss", "pruned_heads", "chunk_size_feed_forward", "return_dict",
        "output_attentions", "output_hidden_states", "return_dict_in_generate", "output_scores",
        # which tokens to stop at and how to sample: the tokenizer and the caller decide
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
        "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
        "bad_words_ids", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
        "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
        "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "num_return_sequences", "remove_invalid_values",
        "exponential_decay_length_penalty", "prefix", "task_specific_params",
        # heads for classification, which the tensors would show
        "finetuning_task", "id2label", "label2id", "num_labels", "_num_labels", "problem_type",
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        "summary_first_dropout", "tokenizer_class", "tie_encoder_decoder", "is_decoder",
        "cross_attention_hidden_size",
    }
)  # fmt: skip
_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
# Hugging Face's name -> ours; the other fields of RopeConfig have one name in both
_ROPE_NAMES = {"rope_theta": "theta", "original_max_position_embeddings": "original_context"}
_ROPE_READ = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    ),
}  # fmt: skip


def read_config(values: Mapping[str, Any], where: str) -> Config:
    """The config that a ``config.json`` states.

    ValueError, beginning with `where`, for another family than Llama and GPT-2, for a key that is
    missing, unknown or of the wrong kind, and for values that do not fit each other.
    """
    keys = ConfigKeys(values, where)
    family = keys.text("model_type")
    if family not in ("llama", "gpt2"):
        raise ValueError(f"{where}: model_type is {family!r}; Pellucid has 'llama' and 'gpt2'")
    how = keys.table("quantization_config")
    if how is not None and how.get("quant_method") != "pellucid":  # ours: see quantised.py
        raise ValueError(
            f"{where}: the weights are quantised (quantization_config); Pellucid reads float32, "
            "bfloat16, float16 and its own int8 and int4: take the repository the quantised one "
            "was made from"
        )
    keys.must_be("is_encoder_decoder", False)
    keys.must_be("add_cross_attention", False)
    arguments = _llama(keys) if family == "llama" else _gpt2(keys)
    keys.close(IGNORED)
    try:
        if family == "llama":
            rope = RopeConfig(**arguments.pop("rope"))
            return LlamaConfig(**arguments, rope=rope)
        return GPTConfig(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _llama(keys: ConfigKeys) -> dict[str, Any]:
    for key, only in (
        ("hidden_act", "silu"),
        ("pretraining_tp", 1),
        ("partial_rotary_factor", 1.0),
        ("rope_interleaved", False),
    ):
        keys.must_be(key, only)
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", None)
    if head_dim is None:
        if heads < 1 or width % heads:
            raise ValueError(
                f"{keys.where}: hidden_size {width} does not divide into {heads} heads, and there "
                "is no head_dim"
            )
        head_dim = width // heads
    context = keys.integer("max_sequence_length", 2048)  # the first Llama conversions' key
    context = keys.integer("max_position_embeddings", context)
    return {
        "width": width,
        "n_heads": heads,
        "n_kv_heads": keys.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "n_layers": keys.integer("num_hidden_layers"),
        "hidden_width": keys.integer("intermediate_size"),
        "vocab_size": keys.integer("vocab_size"),
        "context_length": context,
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "rope": _rope(keys, context),
        "tied": keys.flag("tie_word_embeddings", False),
        "attention_bias": keys.flag("attention_bias", False),
        "mlp_bias": keys.flag("mlp_bias", False),
    }


def _rope(keys: ConfigKeys, context: int) -> dict[str, Any]:
    """Arguments of `RopeConfig` from any of the three spellings.

    ``rope_theta`` beside ``rope_scaling`` with ``type`` (the oldest) or ``rope_type``, and
    transformers 5's ``rope_parameters``, which holds theta too. A parameter that the type does not
    use is passed over, as transformers does.
    """
    theta = keys.number("rope_theta", 10000.0)
    outside = keys.integer("original_max_position_embeddings", None)
    scaling, parameters = keys.table("rope_scaling"), keys.table("rope_parameters")
    inside = ConfigKeys(parameters or scaling or {}, f"{keys.where}: rope")
    old, new = inside.text("type", "default"), inside.text("rope_type", None)
    kind = new or old
    if kind not in _ROPE_READ:
        raise ValueError(
            f"{keys.where}: unknown rope type {kind!r}; expected one of {', '.join(_ROPE_READ)}"
        )
    found: dict[str, Any] = {"type": kind, "theta": inside.number("rope_theta", theta)}
    original = inside.integer("original_max_position_embeddings", outside) or context
    stated = {
        name: value
        for name in sorted({name for names in _ROPE_READ.values() for name in names})
        if (value := inside.number(name, None)) is not None
    }
    truncate = inside.flag("truncate", True)
    inside.must_be("partial_rotary_factor", 1.0)
    inside.close({"finetuned"})
    if kind == "yarn":
        found["truncate"] = truncate
        stated.setdefault("factor", context / original)
        # transformers takes 0 for absent here
        stated = {name: value for name, value in stated.items() if value or name == "factor"}
    if kind != "default" and "factor" not in stated:
        raise ValueError(f"{keys.where}: rope type {kind!r} needs a factor")
    if kind in ("dynamic", "llama3", "yarn"):
        found["original_context"] = context if kind == "dynamic" else original
    return found | {name: stated[name] for name in _ROPE_READ[kind] if name in stated}


def _gpt2(keys: ConfigKeys) -> dict[str, Any]:
    for key, only in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("reorder_and_upcast_attn", False),
    ):
        keys.must_be(key, only)
    activation = keys.text("activation_function", "gelu_new")
    if activation not in _GELU:
        raise ValueError(
            f"{keys.where}: activation_function is {activation!r}; "
            f"expected one of {', '.join(_GELU)}"
        )
    old_context = keys.integer("n_ctx", None)
    return {
        "width": keys.integer("n_embd"),
        "n_layers": keys.integer("n_layer"),
        "n_heads": keys.integer("n_head"),
        "hidden_width": keys.integer("n_inner", 0),
        "vocab_size": keys.integer("vocab_size"),
        "context_length": keys.integer("n_positions", old_context or 1024),
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "gelu": _GELU[activation],
        "tied": keys.flag("tie_word_embeddings", True),
        "qkv_bias": keys.flag("qkv_bias", True),  # our own key, see `write_config`
        "embed_dropout": keys.number("embd_pdrop", 0.1),
        "attn_dropout": keys.number("attn_pdrop", 0.1),
        "resid_dropout": keys.number("resid_pdrop", 0.1),
    }


def write_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` of a config, as transformers 4 and 5 read it.

    transformers has no GPT-2 without biases of q, k and v. Such a model is saved with biases of
    zero, which compute the same, and with a key of our own, ``"qkv_bias": false``, by which we
    drop them again. ValueError for a config that the format cannot state.
    """
    if config.rope is None:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": config.width,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_inner": config.hidden_width,
            "vocab_size": config.vocab_size,
            "n_positions": config.context_length,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
            "tie_word_embeddings": config.tied,
            "embd_pdrop": config.embed_dropout,
            "attn_pdrop": config.attn_dropout,
            "resid_pdrop": config.resid_dropout,
            **({} if "qkv" in config.biases else {"qkv_bias": False}),
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_width,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config),
        "tie_word_embeddings": config.tied,
        "attention_bias": "qkv" in config.biases,
        "mlp_bias": "mlp" in config.biases,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _rope_scaling(config: Config) -> dict[str, Any] | None:
    """``rope_scaling``, the spelling that transformers 4 and 5 both read."""
    rope = config.rope
    assert rope is not None, "a family with RoPE"
    if rope.type == "default":
        return None
    if rope.type == "dynamic" and rope.original_context != config.context_length:
        raise ValueError(
            f"dynamic RoPE grows from {rope.original_context} tokens, but the context length is "
            f"{config.context_length}: Hugging Face's config states one number for both"
        )
    theirs = {ours: theirs for theirs, ours in _ROPE_NAMES.items()}
    read = _ROPE_READ[rope.type]
    if rope.type in ("llama3", "yarn"):
        read = (*read, "original_context")
    if rope.type == "yarn":
        read = (*read, "truncate")
    stated = {
        theirs.get(field.name, field.name): getattr(rope, field.name)
        for field in fields(rope)
        if field.name in read and getattr(rope, field.name) is not None
    }
    return {"rope_type": rope.type, **stated}
