"""Pellucid: language models you can see through.

GPT-2 and Llama written from scratch, loading real checkpoints, with a name for every tensor
between a prompt and its next token. `load` is the way in; the names are listed in `names`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Resolved on first use, so that `import pellucid` and `pellucid --help` do not wait for torch.
_LAZY = {
    "LanguageModel": "pellucid.language_model",
    "assert_same_model": "pellucid.diff",
    "diff_steps": "pellucid.diff.training.record",
    "finetune": "pellucid.train.finetune.entry",
    "load": "pellucid.language_model",
    "record_step": "pellucid.diff.training.record",
    "Trace": "pellucid.trace",
}
__all__ = [
    "LanguageModel",
    "Trace",
    "assert_same_model",
    "diff",
    "diff_steps",
    "finetune",
    "load",
    "record_step",
    "train",
]

if TYPE_CHECKING:
    from pellucid.diff import assert_same_model, diff
    from pellucid.diff.training.record import diff_steps, record_step
    from pellucid.language_model import LanguageModel, load
    from pellucid.trace import Trace
    from pellucid.train.entry import train_model as train
    from pellucid.train.finetune.entry import finetune


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    try:
        return import_module(f"pellucid.{name}")  # pellucid.tokenizers without a second import
    except ModuleNotFoundError as error:
        if error.name != f"pellucid.{name}":
            raise
    raise AttributeError(f"module 'pellucid' has no attribute {name!r}")
