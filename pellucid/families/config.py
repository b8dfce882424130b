"""Hugging Face's ``config.json`` to our config and back, by the row of its family.

Key names, defaults and their meaning are those of transformers' configuration classes and
``modeling_rope_utils.py`` (versions 4 and 5). Every key is used, on a list of harmless ones, or an
error; what the family's own class in transformers does not know changes nothing there: a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from pellucid.families.keys import ConfigKeys, NotComputed
from pellucid.families.refused import MISSING
from pellucid.families.row import Family
from pellucid.families.rows import FAMILIES
from pellucid.models import ModelConfig

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
# Keys by which others say that the weights are levels, whatever class reads them
QUANTISING = ("quantization", "quantization_args", "quant_config", "compression_config")
# Models that see pictures -> the model_type of the part that reads and writes text, under the key
# text_config, where that part does not say its own
WITH_TEXT_PART = {"gemma3": "gemma3_text", "mistral3": "mistral"}
DROPOUTS = ("embed_dropout", "attn_dropout", "resid_dropout")  # formats need not state them


def family_of(model_type: str, where: str) -> Family:
    """The row of a ``model_type``; ValueError, in one line that names what is missing, for none."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in MISSING:
        raise ValueError(
            f"{where}: {model_type} has {MISSING[model_type]}, which Pellucid does not compute"
        )
    raise ValueError(
        f"{where}: model_type is {model_type!r}; Pellucid has {', '.join(sorted(FAMILIES))}"
    )


def read_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The config that a ``config.json`` states.

    ValueError, beginning with `where`, for a family that Pellucid does not have, for a key that is
    missing, unknown or of the wrong kind, and for values that do not fit each other.
    """
    keys = ConfigKeys(values, where)
    model_type = keys.text("model_type")
    _refuse_quantised(keys)
    if model_type in WITH_TEXT_PART:
        text = keys.table("text_config")
        if text is None:
            raise ValueError(f"{where}: text_config is missing; expected an object")
        inner = {"model_type": WITH_TEXT_PART[model_type], **text}
        return read_config(inner, f"{where}: text_config")
    family = family_of(model_type, where)
    keys.must_be("is_encoder_decoder", False)
    keys.must_be("add_cross_attention", False)
    found: dict[str, Any] = dict(family.features)
    try:
        for part in family.parts:
            part.read(keys, found)
        for key in QUANTISING:
            keys.must_be(key, None)
        keys.note_rest(IGNORED | family.ignored, f"transformers' {family.architecture}")
        return family.make(**{"family": model_type, **found})
    except NotComputed:
        raise
    except ValueError as error:
        words = str(error)
        raise ValueError(words if words.startswith(where) else f"{where}: {words}") from None


def _refuse_quantised(keys: ConfigKeys) -> None:
    how = keys.table("quantization_config")
    if how is not None and how.get("quant_method") != "pellucid":  # ours: see quantised.py
        raise ValueError(
            f"{keys.where}: the weights are quantised (quantization_config); Pellucid reads "
            "float32, bfloat16, float16 and its own int8 and int4: take the repository the "
            "quantised one was made from"
        )


def write_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` of a config, as transformers 4 and 5 read it.

    ValueError for a config that its family's format cannot state.
    """
    family = family_of(config.family, "config")
    stated = {"architectures": [family.architecture], "model_type": family.model_type}
    for part in family.parts:
        stated |= part.write(config)
    stated |= family.stated
    stated["torch_dtype"] = str(dtype).removeprefix("torch.")
    again = read_config(stated, f"a {config.family} config")
    again = replace(again, **{name: getattr(config, name) for name in DROPOUTS})
    apart = [
        f"{field.name} {getattr(config, field.name)!r}"
        for field in fields(config)
        if getattr(config, field.name) != getattr(again, field.name)
    ]
    if apart:
        raise ValueError(
            f"the format of {config.family} models cannot state {', '.join(apart)}: such a model "
            "would come back as another"
        )
    return stated
