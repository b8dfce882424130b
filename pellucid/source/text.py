"""The file as text: what stands above the code, its classes and functions, how it is run."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from itertools import groupby

import torch

from pellucid.families import family_of, write_config
from pellucid.models import Config, RopeConfig
from pellucid.models.census import census
from pellucid.source.loading import cache_text, generating_text, loading_text
from pellucid.source.model import KEPT, Class, ModelResolver
from pellucid.source.printer import WIDTH, lines_of
from pellucid.source.resolver import Function
from pellucid.source.statements import Variable, each, name_apart

_LEGEND = "B batch, T tokens in this pass, S tokens seen so far; other sizes are this model's own."
_UNTOLD = ("architectures", "dtype", "torch_dtype", "transformers_version", "model_type")


def file_text(
    config: Config, dialect: str, title: str = "", spelt: Callable[[str], str] = str
) -> str:
    """One file with the forward of a model, a loader, a KV cache and greedy generation.

    title  what the model is called; spelt  from the family's names to those in the files
    """
    resolver, body = _forward(config, dialect)
    tail = [
        cache_text(config),
        loading_text(config, spelt, resolver.kinds),
        generating_text(config),
    ]
    code = "\n".join((*_kinds(resolver.kinds), *body)) + "\n\n" + "\n".join(tail)
    return "\n".join((*_header(config, dialect, title), *_imports(code), code)).rstrip() + "\n"


def forward_text(config: Config, dialect: str) -> str:
    """The classes and functions of that file, and its greedy loop, for any config."""
    return "\n".join((*_forward(config, dialect)[1], "", generating_text(config)))


def _forward(config: Config, dialect: str) -> tuple[ModelResolver, list[str]]:
    resolver = ModelResolver(config, dialect)
    parts = resolver.resolved()
    return resolver, [line for part in parts for line in ("", "", *_part_lines(part, resolver))]


def _header(config: Config, dialect: str, title: str) -> Iterator[str]:
    """What the model is, how many parameters it has, and where each number comes from."""
    counted = census(config)
    family = family_of(config.family, "config")
    yield f'"""{title or family.architecture}: {counted.total:,} parameters, one file.'
    yield ""
    yield f'python model.py FOLDER "prompt": greedy text. Rounds as {dialect}. By `pellucid code`.'
    yield ""
    yield from _wrapped(f"Parameters: {counted.written}.")
    yield from _wrapped(f"From config.json: {_stated(config)}.")
    yield _LEGEND
    yield '"""'
    yield ""


def _stated(config: Config) -> str:
    keys = {
        key: value
        for key, value in write_config(config, torch.float32).items()
        if key not in _UNTOLD
    }
    return ", ".join(
        f"{key} {_shown_value(value)}" for key, value in keys.items() if value not in (None, False)
    )


def _shown_value(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_shown_value(each)}" for key, each in value.items()) + ")"
    if isinstance(value, list):
        one = value[0] if value and all(each == value[0] for each in value) else None
        return (
            f"{len(value)} × {_shown_value(one)}" if one is not None else f"a list of {len(value)}"
        )
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _imports(code: str) -> Iterator[str]:
    """The modules that the code uses, as ``ruff`` orders them."""
    yield "from __future__ import annotations"
    yield ""
    yield "import json"
    if "math." in code:
        yield "import math"
    yield "import sys"
    yield "from collections.abc import Iterator"
    yield "from pathlib import Path"
    yield ""
    yield "import torch"
    if "F." in code.replace('"F."', ""):
        yield "import torch.nn.functional as F"
    yield "from safetensors.torch import load_file"
    yield "from torch import Tensor, nn"


def _kinds(kinds: list[str]) -> Iterator[str]:
    """The kind of each layer, in as few words as its pattern takes."""
    if not kinds:
        return
    count = len(kinds)
    period = next(p for p in range(1, count + 1) if kinds == (kinds[:p] * (count // p + 1))[:count])
    runs = [(kind, len(list(group))) for kind, group in groupby(kinds[:period])]
    one = " + ".join(f'["{kind}"]' + (f" * {times}" if times > 1 else "") for kind, times in runs)
    one = one.replace('"] + ["', '", "') if all(times == 1 for _, times in runs) else one
    runs = runs if " + " in one else runs[:1]
    whole = count // period
    if period < count:
        one = f"({one})" if len(runs) > 1 else one
        one += f" * {whole + (count % period > 0)}" + (f"[:{count}]" if count % period else "")
    yield ""
    yield f"KINDS = {one}  # of the {count} layers"


def _part_lines(part: Class | Function, resolver: ModelResolver) -> Iterator[str]:
    if isinstance(part, Function):
        yield from _function_lines(part, resolver, _function_doc(part.name, resolver.config), 0)
        return
    yield f"class {part.kind.__name__}(nn.Module):"
    yield f'    """{_class_doc(part.kind.__name__, resolver.config)}"""'
    if len(part.init.block) > 1:
        yield ""
        yield from _function_lines(part.init, resolver, "", 4)
    yield ""
    doc = part.forward.doc.splitlines()[0]
    yield from _function_lines(part.forward, resolver, _forward_doc(part, doc, resolver), 4)


def _forward_doc(part: Class, doc: str, resolver: ModelResolver) -> str:
    """The shapes of a forward's docstring, in this model's numbers, with the names it has here."""
    name = part.kind.__name__
    if name == "Decoder":
        return resolver.sized("tokens (B, T) -> logits (B, T, V).")
    first = part.forward.parameters[0].name
    doc = doc.replace("x (", f"{first} (", 1)
    return doc.replace("C)", "width)") if "Norm" in name else resolver.sized(doc)


def _function_lines(
    function: Function, resolver: ModelResolver, doc: str, indent: int
) -> Iterator[str]:
    margin = " " * indent
    name_apart(function.block, function.parameters)
    given = [p for p, used in zip(function.parameters, function.used, strict=True) if used]
    own = ["self"] if indent else []
    parameters = [
        f"{p.name}: {p.annotation}{' = None' * (p.annotation == 'Cache | None')}" for p in given
    ]
    line = f"{margin}def {function.name}({', '.join((*own, *parameters))}) -> {_returns(function)}:"
    if len(line) <= WIDTH:
        yield line
    else:
        yield f"{margin}def {function.name}("
        inside = f"{margin}    {', '.join((*own, *parameters))}"
        if len(inside) <= WIDTH:
            yield inside
        else:
            yield from (f"{margin}    {each}," for each in (*own, *parameters))
        yield f"{margin}) -> {_returns(function)}:"
    if doc:
        yield f'{margin}    """{doc}"""'
    _note_shapes(function)
    for _, statement in each(function.block):
        if function.name in KEPT:  # of queries and keys alike
            statement.comment = statement.comment.replace(", H, ", ", heads, ")
        statement.comment = resolver.sized(statement.comment)
    yield from lines_of(function.block, indent + 4)


def _returns(function: Function) -> str:
    if function.name == "__init__":
        return "None"
    pair = isinstance(function.result.concrete, tuple)
    return "tuple[Tensor, Tensor]" if pair else "Tensor"


def _note_shapes(function: Function) -> None:
    """Say the shape of a named tensor where it is another than that of the one before."""
    last = ""
    for _, statement in each(function.block):
        for variable in statement.targets:
            if not isinstance(variable, Variable) or not variable.shape:
                continue
            plain = len(statement.targets) == 1 and variable.shape != last
            if plain and "(" not in statement.comment:
                statement.comment = f"{statement.comment} {variable.shape}".strip()
            last = variable.shape


# ── What classes and functions say of themselves ──────────────────────────────────────────────────


def _class_doc(name: str, config: Config) -> str:
    acts = {"silu": "silu", "relu2": "relu²"}
    act = acts.get(config.activation, "gelu")
    weight = {True: " · (1 + weight)", False: " · weight"}[config.norm_offset]
    weight = weight if config.norm_weight else ""
    bias = " + bias" if config.norm_bias else ""
    docs = {
        "Decoder": "Tokens to logits.",
        "Block": _block_doc(config),
        "Attention": _attention_doc(config),
        "GatedMLP": f"down({act}(gate(x)) × up(x)) (Shazeer, 2020).",
        "MLP": f"down({act}(up(x))).",
        "RMSNorm": f"x / sqrt(mean(x²) + eps){weight} over the last axis (Zhang & Sennrich, 2019).",
        "HeadNorms": f"LayerNorm of each head{weight}, which each has of its own (Command R+).",
        "WholeNorm": "RMSNorm of all heads of a token together, as one row of numbers.",
        "LayerNorm": f"(x − mean) / sqrt(variance + eps){weight}{bias} (Ba et al., 2016).",
    }
    return docs[name]


def _block_doc(config: Config) -> str:
    if config.parallel:
        return "Attention and MLP side by side: both read one norm of the stream and add to it."
    places = {"before": "before", "after": "behind", "both": "before and behind"}
    where = places[config.norm_places]
    return f"Attention, then MLP, each adding to the stream, with a norm {where} each."


def _attention_doc(config: Config) -> str:
    width = config.head_dim
    if config.n_kv_heads == config.n_heads:
        return f"Attention (Vaswani et al., 2017) with {config.n_heads} heads of {width}."
    shared = (
        "1 key/value head" if config.n_kv_heads == 1 else f"{config.n_kv_heads} key/value heads"
    )
    heads = f"{config.n_heads} query heads, {shared} of {width}"
    return f"Grouped-query attention (Ainslie et al., 2023): {heads}."


def _function_doc(name: str, config: Config) -> str:
    head, groups = config.head_dim, config.n_heads // config.n_kv_heads
    ropes = {"rope": config.rope, "second_rope": config.second_rope}
    if name in ropes:
        rope = ropes[name]
        assert rope is not None, "a RoPE that some layer asks for"
        return _rope_doc(rope, config)
    ropes_there = [rope for rope in ropes.values() if rope]
    turned = config.rotary_width(ropes_there[0]) if ropes_there else head
    some = "" if turned == head else f"of the first {turned} components "
    docs = {
        "repeat_heads": f"x (B, {config.n_kv_heads}, S, {head}) -> (B, {config.n_heads}, S, "
        f"{head}): each head serves {groups} heads of queries in a row.",
        "rotate": f"Turn each pair i, i + {turned // 2} {some}of x (B, heads, T, {head}).",
        "interleaved": f"x with pair i at i and i + {head // 2} -> with pair i at 2i and 2i + 1.",
        "composed_gelu": "GELU's tanh form, one operation at a time (Hendrycks & Gimpel, 2016).",
    }
    return docs[name]


def _rope_doc(rope: RopeConfig, config: Config) -> str:
    scaled = {
        "default": "",
        "linear": f", all {rope.factor:g} times slower",
        "llama3": f", slow ones {rope.factor:g} times slower (Llama 3.1)",
        "yarn": f", slow ones {rope.factor:g} times slower (YaRN)",
        "longrope": ", each divided by a factor of its own (LongRoPE, 2024)",
        "dynamic": f", slower for texts beyond {rope.original_context} tokens",
    }[rope.type]
    pairs = config.rotary_width(rope) // 2
    return f"cos and sin of position × frequency, (T, {pairs}) each{scaled}."
