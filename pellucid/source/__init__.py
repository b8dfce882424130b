"""Resolved source: the code of exactly one model, or one step, without the choices it never takes.

``pellucid.code("demo")`` is the text of one plain file: the forward of this model, a loader for its
folder and greedy generation with a KV cache. It is made of the decoder's own source: each choice
that the config decides is made, each size is a number, each name is the trace's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pellucid.models import Config
from pellucid.source.text import file_text

__all__ = ["code", "file_text"]


def code(source: str | Path = "demo", *, dialect: str | None = None) -> str:
    """One file with the forward of a model; it needs torch and safetensors alone.

    source   a folder, ``owner/name``, a demo, a config.json or params.json, or a published shape
    dialect  whose rounding; None: that of the layout at hand, ``hf`` without weights

    The file reads folders in Hugging Face's layout. Raises ValueError or OSError, in one line, for
    a source that is none of these and for quantised weights, which it could not read.
    """
    from pellucid.checkpoints.model_report import find_config

    title, config = find_config(str(source))
    layout, spelt = _files(str(source), config)
    return file_text(config, dialect or layout, title, spelt)


def _files(source: str, config: Config) -> tuple[str, Callable[[str], str]]:
    """Layout of a model's files, and from a name of the family's table to theirs."""
    from pellucid.checkpoints import open_checkpoint
    from pellucid.checkpoints.formats.quantised import QuantisedWeights
    from pellucid.families import left_out_prefix
    from pellucid.families.shapes import SHAPES

    if source in SHAPES or Path(source).is_file():
        return "hf", str
    try:
        checkpoint = open_checkpoint(source)
    except FileNotFoundError:  # a config without weights
        return "hf", str
    if isinstance(checkpoint.weights, QuantisedWeights):
        raise ValueError(
            f"{source}: its weights are quantised, which no plain file reads; give the model that "
            "they were made of"
        )
    if checkpoint.layout != "hf":
        return checkpoint.dialect, str
    return "hf", left_out_prefix(config, checkpoint.weights.stored)
