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
    "code": "pellucid.source",
    "convert": "pellucid.checkpoints",
    "examine_machine": "pellucid.doctor",
    "diff_steps": "pellucid.diff.training.record",
    "direct_logit_attribution": "pellucid.interpret",
    "fetch": "pellucid.checkpoints",
    "finetune": "pellucid.train.finetune.entry",
    "head_jobs": "pellucid.interpret",
    "label_report": "pellucid.evaluate.labels",
    "load": "pellucid.language_model",
    "logit_lens": "pellucid.interpret",
    "model_report": "pellucid.checkpoints.model_report",
    "patch": "pellucid.interpret",
    "plan_training": "pellucid.train.plan_report",
    "quantise_checkpoint": "pellucid.evaluate.quantise",
    "record": "pellucid.diff.sides.record",
    "record_step": "pellucid.diff.training.record",
    "report_as_html": "pellucid.show.diff_report",
    "report_as_text": "pellucid.show.diff_report",
    "run_bench": "pellucid.bench.session",
    "serve_models": "pellucid.serve",
    "steer": "pellucid.interpret",
    "text_report": "pellucid.evaluate.text_report",
    "Trace": "pellucid.trace",
    "walk_prompt": "pellucid.prompt_walk",
}
__all__ = [
    "LanguageModel",
    "Trace",
    "assert_same_model",
    "code",
    "convert",
    "diff",
    "diff_steps",
    "direct_logit_attribution",
    "examine_machine",
    "fetch",
    "finetune",
    "head_jobs",
    "label_report",
    "load",
    "logit_lens",
    "model_report",
    "patch",
    "plan_training",
    "quantise_checkpoint",
    "record",
    "record_step",
    "report_as_html",
    "report_as_text",
    "run_bench",
    "serve_models",
    "steer",
    "text_report",
    "train",
    "walk_prompt",
]

if TYPE_CHECKING:
    from pellucid.bench.session import run_bench
    from pellucid.checkpoints import convert, fetch
    from pellucid.checkpoints.model_report import model_report
    from pellucid.diff import assert_same_model, diff
    from pellucid.diff.sides.record import record
    from pellucid.diff.training.record import diff_steps, record_step
    from pellucid.doctor import examine_machine
    from pellucid.evaluate.labels import label_report
    from pellucid.evaluate.quantise import quantise_checkpoint
    from pellucid.evaluate.text_report import text_report
    from pellucid.interpret import (
        direct_logit_attribution,
        head_jobs,
        logit_lens,
        patch,
        steer,
    )
    from pellucid.language_model import LanguageModel, load
    from pellucid.prompt_walk import walk_prompt
    from pellucid.serve import serve_models
    from pellucid.show.diff_report import report_as_html, report_as_text
    from pellucid.source import code
    from pellucid.trace import Trace
    from pellucid.train.entry import train_model as train
    from pellucid.train.finetune.entry import finetune
    from pellucid.train.plan_report import plan_training


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    try:
        return import_module(f"pellucid.{name}")  # pellucid.tokenizers without a second import
    except ModuleNotFoundError as error:
        if error.name != f"pellucid.{name}":
            raise
    raise AttributeError(f"module 'pellucid' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completes after ``pellucid.``: the calls, and the modules imported already."""
    found = globals().items()
    ours = {name for name, value in found if getattr(value, "__name__", "") == f"pellucid.{name}"}
    return sorted({*__all__, *ours, *(name for name, _ in found if name.startswith("__"))})
