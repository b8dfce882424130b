"""A side that transformers runs: its config and parameters in our terms."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from pellucid import checkpoints, tokenizers
from pellucid.checkpoints import parameter_shapes
from pellucid.devices import as_dtype
from pellucid.diff.options import Options
from pellucid.diff.sides.side import Side
from pellucid.diff.sides.transformers import from_transformers
from pellucid.diff.sides.wrappers import plain_weights, unwrapped
from pellucid.families import FAMILIES, read_config, split, table
from pellucid.families.keys import NotComputed
from pellucid.generate import encode_prompt
from pellucid.models import Config

LIVE = "hf:"  # before a path: run it in transformers


def live_side(model: Any, label: str) -> Side:
    """A side that runs a transformers model as it is, with its config and weights in our terms.

    Nothing is copied, but for q, k and v that are stored joined in an order of their own. Of a
    family that is not known, or that keeps the pairs of RoPE in another order, only the names are
    known: such a side has neither config nor weights. A config that says what Pellucid does not
    have is read as far as it goes, with a warning.
    """
    model = cast(Any, unwrapped(model))
    stated = json.loads(model.config.to_json_string())
    family = FAMILIES.get(stated["model_type"])
    if family is None or family.pairs != "halves":
        return from_transformers(model, label)
    config = _config(stated, f"{label}: config")
    weights = canonical(config, plain_weights(model), label)
    return from_transformers(model, label, config=config, weights=weights)


def _config(stated: dict[str, Any], where: str) -> Config:
    """The config, as Pellucid has it where it computes less: the model's own tensors then differ.

    Each such key is said in a warning.
    """
    while True:
        try:
            return read_config(stated, where)
        except NotComputed as error:
            if stated.get(error.key, error.expected) == error.expected or error.expected is None:
                raise  # a key inside another one, or weights in a form of their own
            warnings.warn(f"{error}; the tensors show what it changes", stacklevel=2)
            stated = stated | {error.key: error.expected}


def canonical(config: Config, state: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """transformers' parameters under our names, as views."""
    found: dict[str, Tensor] = {}
    shapes = parameter_shapes(config)
    for entry in table(config):
        if entry.stored not in state:
            raise ValueError(
                f"{label} has no {entry.stored}: expected a …LMHeadModel or …ForCausalLM whose "
                "parameters carry transformers' names"
            )
        for name, part in split(entry, state[entry.stored], shapes).items():
            found[name] = torch.cat((found[name], part)) if name in found else part  # head by head
    head = state.get("lm_head.weight")
    if config.tied and head is not None and not torch.equal(head, found["embed.weight"]):
        found["unembed.weight"] = head  # the config says it is the embedding, it is not
    return found


def live_folder(source: str, options: Options) -> Side:
    """``hf:PATH``: the folder in transformers, with eager attention unless `fused` is asked for."""
    try:
        transformers = import_module("transformers")  # an extra: absent from most installations
    except ImportError:
        raise ValueError(
            f"{source} needs transformers, which is not installed: pip install transformers"
        ) from None
    folder = checkpoints.resolve(source.removeprefix(LIVE))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{source}: {folder} has no config.json: transformers reads Hugging Face's layout only"
        )
    logging = transformers.utils.logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=as_dtype(options.dtype) or "auto",
            attn_implementation="sdpa" if options.fused else "eager",
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source}: transformers cannot load it: {line}") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    tokenizer = tokenizers.load(folder)
    return replace(
        live_side(model, source),
        encode=partial(encode_prompt, tokenizer),
        bos_id=tokenizer.bos_id,
        specials=tokenizer.specials,
    )
