"""One random model twice: ours, and transformers' of the folder we saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import GPT, LLAMA, random_model, random_tokens

from pellucid import checkpoints
from pellucid.models import Config, Model, RopeConfig

SHAPE = replace(LLAMA, width=32, head_dim=16, hidden_width=96)
SCALED = RopeConfig(theta=500000.0, type="llama3", factor=8.0, original_context=32)
CONFIGS: dict[str, Config] = {
    "mha": replace(SHAPE, n_kv_heads=4),
    "gqa": SHAPE,
    "mqa, tied": replace(SHAPE, n_kv_heads=1, tied=True),
    "odd widths": LLAMA,
    "biases": replace(SHAPE, biases=("qkv", "o", "mlp")),
    "linear": replace(SHAPE, rope=RopeConfig(type="linear", factor=4.0)),
    "dynamic": replace(SHAPE, rope=RopeConfig(type="dynamic", factor=2.0, original_context=64)),
    "llama3": replace(SHAPE, rope=SCALED),
    "yarn": replace(SHAPE, rope=RopeConfig(type="yarn", factor=2.0, original_context=32)),
    "gpt2": replace(GPT, width=64, head_dim=16, hidden_width=96),
    "gpt2, untied": replace(GPT, width=64, head_dim=16, hidden_width=96, tied=False),
}


def pair(
    config: Config, folder: Path, dtype: torch.dtype = torch.float32, attention: str = "eager"
) -> tuple[Model, Any]:
    """Ours, and transformers' model of the same weights, loaded from `folder`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    ours = random_model(config, dtype)
    checkpoints.save(folder, config, ours.state_dict())
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    )
    return ours, theirs.eval()


def rows(config: Config, *lengths: int) -> list[list[int]]:
    """Random token ids, one row of each length."""
    return [random_tokens(config, n, seed=n).tolist() for n in lengths]
