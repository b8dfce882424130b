"""What a page needs to know of a model and of a run before it asks for numbers."""

from __future__ import annotations

import re
from typing import Any

from pellucid import graph, names
from pellucid.explore.loaded import Loaded
from pellucid.explore.runs import ExploredRun
from pellucid.models import Config
from pellucid.prompt_walk import LLAMA3_PROMPT, LLAMA3_VOCABULARY, example_prompt
from pellucid.walk.runner import stand_ins
from pellucid.walk.script import SCRIPT

KINDS = {
    "tokens": "tokens", "positions": "scalars", "query_growth": "scalars", "mask": "mask",
    "window_mask": "mask", "attn.pattern": "pattern", "logits": "logits", "raw_logits": "logits",
}  # fmt: skip
# Where the walk's title is about its last step only, which has the tensor's name.
TITLES = {
    "attn.q_rotated": "Queries, turned by their position",
    "attn.k_rotated": "Keys, turned by their position",
}
ENGLISH = "The Eiffel Tower is in the city of"


def describe_model(loaded: Loaded) -> dict[str, Any]:
    """A model's sizes and features."""
    config = loaded.config
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
        "prompt": _prompt(loaded),
    }


def _prompt(loaded: Loaded) -> str:
    """Something that the model probably has an answer to."""
    checkpoint = loaded.lm.checkpoint
    if checkpoint is not None and checkpoint.folder.parent.name == "demos":
        return example_prompt(checkpoint)
    return LLAMA3_PROMPT if loaded.config.vocab_size == LLAMA3_VOCABULARY else ENGLISH


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


def describe_run(run: ExploredRun, like: str | None = None) -> dict[str, Any]:
    """The manifest of a run: its tokens, and each tensor in order."""
    loaded = run.loaded
    return {
        "run": run.id,
        "model": loaded.name,
        "prompt": _text(run) if run.prompt is None else run.prompt,
        "ids": run.ids,
        "tokens": run.tokens,
        "edits": [edit.to_json() for edit in run.edits],
        "like": like,
        "python": run.python(),
        "steps": [_step(run, name) for name in run],
        "seconds": run.seconds,
        "bytes": run.bytes,
    }


def _text(run: ExploredRun) -> str:
    try:
        return run.loaded.lm.tokenizer.decode(run.ids)
    except ValueError:  # an id that only the embedding's padding has
        return "".join(run.tokens)


def _step(run: ExploredRun, name: str) -> dict[str, Any]:
    layer = names.layer_of(name)
    dims = [letter for letter in graph.dims(name) if letter != "B"]
    title, formula = words_of(run.loaded, name)
    return {
        "id": name,
        "name": name,
        "title": title,
        "formula": formula,
        "sentence": sentence_of(run.loaded, name),
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


def words_of(loaded: Loaded, name: str) -> tuple[str, str]:
    """Title and formula of a tensor's step in the walk, as this model has it, without shapes."""
    layer, leaf = names.layer_of(name), graph.leaf(name)
    key = leaf, loaded.config.layer(layer or 0)  # alike in all layers of a kind
    if key not in loaded.words:
        loaded.words[key] = _words(loaded, name, layer, leaf)
    return loaded.words[key]


def _words(loaded: Loaded, name: str, layer: int | None, leaf: str) -> tuple[str, str]:
    config = loaded.config
    kind = config.layer(layer or 0)
    wanted = f"layers.N.{leaf}" if layer is not None else leaf.removeprefix("second_")
    title = formula = ""
    for line in SCRIPT.lines:
        if line.name == wanted and line.when(config, kind):
            title, formula = (
                words if isinstance(words, str) else words(config, kind)
                for words in (line.title, line.formula)
            )
            break
    title = re.sub(r" of (the )?(key/value )?head {\w+}", "", title)
    title = re.sub(r"(key/value )?head {\w+}", "each head", title)
    return TITLES.get(leaf, title) or sentence_of(loaded, name).rstrip("."), _plain(
        formula, loaded, layer
    )


def sentence_of(loaded: Loaded, name: str) -> str:
    """The table's sentence; what it says of batches is left out, a run has none."""
    return re.sub(r" \(B, [^)]*\)", "", loaded.leaf_of(name).sentence)


def _plain(formula: str, loaded: Loaded, layer: int | None) -> str:
    """A formula of the walk with a name for each ``{argument}`` that this model has."""
    config = loaded.config
    instead = stand_ins(SCRIPT.lines, config, config.layer(layer or 0))

    def named(found: re.Match[str]) -> str:
        sign, argument = found[1] or "", found[2]
        weight = SCRIPT.weights.get(argument.removesuffix("_stored").removesuffix("_head"), "")
        if weight and weight.replace("layers.N.", f"layers.{layer}.") not in loaded.weights:
            return "" if sign else argument
        value = getattr(config, argument, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{sign}{value:g}"
        return sign + re.sub(r"_(stored|head|last)$", "", instead.get(argument, argument))

    return re.sub(r"( [+×] |, | with )?{(\w+)}", named, formula)
