"""What a page needs to know of a model and of a run before it asks for numbers."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from pellucid import graph, names
from pellucid.explore.loaded import Loaded
from pellucid.explore.runs import Run
from pellucid.models import Config
from pellucid.walk.prompt_walk import CODE_PROMPT, LLAMA3_PROMPT, LLAMA3_VOCABULARY
from pellucid.walk.script import SCRIPT

KINDS = {
    "tokens": "tokens", "positions": "scalars", "query_growth": "scalars", "mask": "mask",
    "window_mask": "mask", "attn.pattern": "pattern", "logits": "logits", "raw_logits": "logits",
}  # fmt: skip


def describe_model(loaded: Loaded) -> dict[str, Any]:
    """A model's sizes and features."""
    config = loaded.config
    llama3 = config.vocab_size == LLAMA3_VOCABULARY
    return {
        "name": loaded.name,
        "family": config.family,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "layers": config.n_layers,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "width": config.width,
        "mlp_width": config.hidden_width,
        "vocabulary": config.vocab_size,
        "context": config.context_length,
        "dtype": loaded.dtype_name,
        "dialect": loaded.model.dialect.name,
        "device": str(loaded.lm.device),
        "features": features(config),
        "prompt": LLAMA3_PROMPT if llama3 else CODE_PROMPT,
    }


def features(config: Config) -> list[str]:
    """What is not the same in every decoder, in a few words each."""
    places = {"before": "norm before", "after": "norm after", "both": "norm before and after"}
    scaled = [rope.type for rope in (config.rope, config.second_rope) if rope]
    said = {
        "LayerNorm": config.norm == "layer",
        "RMSNorm": config.norm == "rms",
        places[config.norm_places]: True,
        "learned positions": config.rope is None,
        "RoPE": config.rope is not None,
        "two RoPEs": config.second_rope is not None,
        f"RoPE scaling {'/'.join(scaled)}": any(kind != "default" for kind in scaled),
        "layers without RoPE": config.rope is not None and any(not k.rope for k in config.kinds),
        f"{config.n_heads // config.n_kv_heads} queries per key": config.n_heads
        != config.n_kv_heads,
        f"window {config.window}": config.has_windows,
        "query and key norm": bool(config.qk_norm),
        "attention sinks": config.sinks,
        "parallel attention and MLP": config.parallel,
        f"gated MLP ({config.activation})": config.gated,
        f"MLP ({config.activation})": not config.gated,
        "score cap": config.score_cap > 0,
        "logit cap": config.logit_cap > 0,
        "query growth": config.query_growth != 0,
        "tied embedding": config.tied,
        **{f"bias of {part}": True for part in config.biases},
    }
    return [words for words, holds in said.items() if holds]


def describe_run(run: Run, like: str | None = None) -> dict[str, Any]:
    """The manifest of a run: its tokens, and each tensor in order."""
    loaded = run.loaded
    return {
        "run": run.id,
        "model": loaded.name,
        "prompt": loaded.lm.tokenizer.decode(run.ids) if run.prompt is None else run.prompt,
        "ids": run.ids,
        "tokens": run.tokens,
        "edits": [edit.to_json() for edit in run.edits],
        "like": like,
        "python": run.python(),
        "steps": [_step(run, name) for name in run],
        "seconds": run.seconds,
        "bytes": run.bytes,
    }


def _step(run: Run, name: str) -> dict[str, Any]:
    layer = names.layer_of(name)
    dims = [letter for letter in graph.dims(name) if letter != "B"]
    title, formula = words_of(run.loaded.config, graph.leaf(name), layer)
    return {
        "id": name,
        "name": name,
        "title": title or run.loaded.leaf_of(name).sentence.rstrip("."),
        "formula": formula,
        "sentence": run.loaded.leaf_of(name).sentence,
        "kind": kind_of(name),
        "layer": layer,
        "shape": list(run.shape(name)),
        "dims": dims,
        "dtype": dtype_of(run.loaded, name),
        "reads": list(graph.inputs(run.loaded.config, name)),
    }


def kind_of(name: str) -> str:
    """How a tensor is best looked at."""
    leaf = graph.leaf(name)
    if leaf.endswith((".cos", ".sin")):
        return "rope"
    dims = graph.dims(name)
    return KINDS.get(leaf, "matrix" if dims[-1] == "S" else "vectors")


def dtype_of(loaded: Loaded, name: str) -> str:
    """A tensor's dtype, without computing it."""
    leaf, dialect = graph.leaf(name), loaded.model.dialect
    if leaf in ("tokens", "positions"):
        return "int64"
    if leaf in ("mask", "window_mask"):
        return "bool"
    from_rotated = ("attn.scores", "attn.capped_scores", "attn.masked_scores")
    wide = (
        (leaf.endswith((".cos", ".sin")) and dialect.rope != "x")
        or (leaf == "logits" and dialect.logits == "float32")
        or (dialect.rope == "keep" and _turned(loaded.config, name)
            and (leaf in from_rotated or leaf.endswith(("_rotated", "q_scaled"))))
    )  # fmt: skip
    return "float32" if wide and loaded.lm.dtype.itemsize < 4 else loaded.dtype_name


def _turned(config: Config, name: str) -> bool:
    return bool(config.layer(names.layer_of(name) or 0).rope)


@lru_cache(maxsize=4096)
def words_of(config: Config, leaf: str, layer: int | None) -> tuple[str, str]:
    """Title and formula of the walk's step, without shapes: names of values in place of braces."""
    kind = None if layer is None else config.layer(layer)
    wanted = f"layers.N.{leaf}" if layer is not None else leaf.removeprefix("second_")
    for line in SCRIPT.lines:
        if line.name == wanted and line.when(config, kind or config.layer(0)):
            title = line.title if isinstance(line.title, str) else line.title(config, kind)
            formula = line.formula if isinstance(line.formula, str) else line.formula(config, kind)
            return re.sub(r" of (the )?head {\w+}", "", title), _plain(formula, config)
    return "", ""


def _plain(formula: str, config: Config) -> str:
    """A formula of the walk with a name for each ``{argument}``; sizes are numbers."""

    def named(found: re.Match[str]) -> str:
        value = getattr(config, found[1], None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{value:g}"
        return re.sub(r"_(stored|head|last)$", "", found[1])

    return re.sub(r"{(\w+)}", named, formula)
