"""What a step of the walk is, and how steps are written down.

A step is a small pure function whose arguments are named after the values it needs: an earlier
step, a weight, a field of the config, or one of `RUNNER_NAMES`. Dependencies, shapes and the
printed formula all follow from that; nothing about a step is written twice.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from types import FunctionType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

# text: strings in order; heatmap: one row per token; attention: one row and one column per token;
# rays: complex numbers drawn from the origin; bars: one number per entry
Picture = Literal["text", "heatmap", "attention", "rays", "bars"]
Scope = Literal["once", "rope", "layer", "kv_head", "head"]
When = Callable[[Any, Any], bool]  # of a `ModelConfig` and the `Layer` at work
Words = str | Callable[[Any, Any], str]  # as they are, or of the same two
Function = TypeVar("Function", bound=Callable[..., Any])

RUNNER_NAMES = {
    "tokens": "token ids (T)",
    "token_strings": "the text of each token, or None",
    "specials": "id and text of every special token, or None",
    "dialect": "the cast points of the reference whose rounding is reproduced",
    "token_count": "T",
    "device": "where the tokens are",
    "dtype": "dtype of the activations, x in numerics.py",
    "wide": "dtype, but float32 at least",
    "last_row": "the row of the logits to compute, or None for all",
    "stream": "the residual stream that leaves a layer (T, C)",
    "layer": "number of the current layer",
    "head": "number of the current query head",
    "kv_head": "number of the key/value head it reads",
    "group": "query heads per key/value head",
    "original_context": "tokens that the first RoPE was trained on, or None",
    "rope": "the RoPE of the current layer",
    "pairs": "how many pairs of a head's components it turns",
    "z_of_heads": "z of every head, in order",
}


@dataclass(frozen=True, eq=False)
class Step:
    """One step between the text and the next token, computed.

    name     of the tensor, `layers.0.attn.q`; a name of names.py means the same tensor here
    title    one line for a reader
    formula  how it was computed, with the shapes at hand: ``a[17,64] · b[8,64]ᵀ → [17,8]``
    value    the tensor, without a batch axis; strings for a step about text
    dims     a letter per axis, as in names.py
    source   the code that computed it
    picture  how to draw it, if at all
    inputs   addresses of the steps and names of the weights it was computed from
    index    which slice of `name` this is: (head,) for one head
    """

    name: str
    title: str
    formula: str
    value: Any
    dims: tuple[str, ...]
    source: str
    picture: Picture | None
    inputs: tuple[str, ...]
    index: tuple[int, ...] = ()

    @property
    def address(self) -> str:
        """Name and index, `layers.0.attn.q[3]`: a trace has this value under it."""
        return f"{self.name}[{','.join(map(str, self.index))}]" if self.index else self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, or how many strings there are."""
        return tuple(self.value.shape) if isinstance(self.value, Tensor) else (len(self.value),)

    @property
    def dtype(self) -> str:
        """Such as "bfloat16" or "complex64"; "text" for strings."""
        if not isinstance(self.value, Tensor):
            return "text"
        return str(self.value.dtype).removeprefix("torch.")

    def stats(self) -> dict[str, float | None]:
        """min, max, mean and std (of the population) of the numbers; None each without any.

        Complex numbers count by their modulus, booleans as 0 and 1. Cells that the mask closed
        (-inf, or the dtype's lowest number) are left out.
        """
        pieces = _summaries(self.value) if isinstance(self.value, Tensor) else []
        count = sum(size for size, *_ in pieces)
        if not count:
            return dict.fromkeys(("min", "max", "mean", "std"))
        mean = sum(size * m for size, _, _, m, _ in pieces) / count
        variance = sum(size * (v + (m - mean) ** 2) for size, _, _, m, v in pieces) / count
        return {
            "min": min(low for _, low, _, _, _ in pieces),
            "max": max(high for _, _, high, _, _ in pieces),
            "mean": mean,
            "std": variance**0.5,
        }

    def _repr_html_(self) -> str:
        """For notebooks: title, formula, numbers, and a picture of what can be drawn as one."""
        from pellucid.notebook import picture, summary, table

        parts = [f"<p><b>{escape(self.title or self.name)}</b><br>{escape(self.formula)}</p>"]
        if isinstance(self.value, Tensor):
            head = ("address", "shape", "dtype", "min", "max", "mean")
            parts.append(table(head, [(self.address, *summary(self.value))]))
            if self.picture in ("heatmap", "attention", "bars") and not self.value.is_complex():
                parts.append(picture(self.value, self.address))
        else:
            parts.append(table(("",), [(text,) for text in self.value]))
        return "".join(parts)

    def to_json(self) -> dict[str, Any]:
        """This step's entry in the JSON of ``pellucid walk``."""
        return {
            "name": self.name,
            "address": self.address,
            "title": self.title,
            "formula": self.formula,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "stats": self.stats(),
        }


def _summaries(value: Tensor) -> list[tuple[int, float, float, float, float]]:
    """Count, min, max, mean and variance of some rows at a time: a weight in float64 is large."""
    value = value.detach() if value.ndim else value.detach()[None]
    rows = max(1, (1 << 20) * len(value) // max(1, value.numel()))
    found = []
    for piece in value.split(rows):
        cells = _open_cells(piece)
        if cells.numel():
            variance, mean = torch.var_mean(cells, correction=0)
            low, high = cells.aminmax()
            found.append((cells.numel(), *(n.item() for n in (low, high, mean, variance))))
    return found


def _open_cells(value: Tensor) -> Tensor:
    value = value.abs() if value.is_complex() else value
    if value.is_floating_point():
        closed = value <= torch.finfo(value.dtype).min
        value = value[~closed] if closed.any() else value
    return value.double()


@dataclass(frozen=True, kw_only=True)
class Line:
    """A step before it is run; without a title it is a silent one, which only helps others."""

    function: Callable[..., Any]
    arguments: Mapping[str, inspect.Parameter]  # what it asks for, by name
    variable: str
    per: Scope
    body: str
    helpers: tuple[str, ...] = ()  # the source of functions that the body calls
    name: str = ""
    title: Words = ""
    formula: Words = ""
    dims: tuple[str, ...] | None = None  # None: graph.py has them
    picture: Picture | None = None  # None: as its dims suggest
    when: When = lambda config, layer: True
    otherwise: str = ""
    index: str | None = None
    needed: bool = True  # False: it is only shown, no other step reads it
    chapter: str = ""

    @property
    def stand_in(self) -> str:
        """What takes the place of its value where the step is left out."""
        return self.otherwise or next(iter(self.arguments))

    def reworded(self, words: Mapping[str, str]) -> Line:
        """The same step for other values: `words` are names it uses -> names to use instead."""

        anew = partial(renamed, words=words)

        def inside_braces(text: Words) -> Words:
            if not isinstance(text, str):
                return lambda config, layer: str(inside_braces(text(config, layer)))
            return re.sub(r"{\w+}", lambda found: anew(found[0]), text)

        def function(**there: Any) -> Any:
            return self.function(**{own: there[words.get(own, own)] for own in self.arguments})

        scopes: Mapping[str, Scope] = {"head": "kv_head"} if "head" in words else {}
        return replace(
            self,
            function=function,
            arguments={words.get(own, own): kind for own, kind in self.arguments.items()},
            variable=anew(self.variable),
            per=scopes.get(self.per, self.per),
            index=scopes.get(self.index or "", self.index),
            body=anew(self.body),
            name=anew(self.name),
            title=inside_braces(self.title),
            formula=inside_braces(self.formula),
            dims=self.dims and tuple(words.get(letter, letter) for letter in self.dims),
            otherwise=anew(self.otherwise),
        )


def renamed(text: str, words: Mapping[str, str]) -> str:
    """`text`, a name or code, with the `words` in it replaced, but for what stands in quotes."""
    return re.sub(r'"[^"]*"|\w+', lambda found: words.get(found[0], found[0]), text)


class Script:
    """Steps in the order in which they are taken; a whole walk, or a part to include in one.

    `weights` names them: the name a step uses -> the checkpoint's, with N for the layer. A step
    that asks for ``wq`` gets it in the dtype of the activations; for ``wq_stored``, as the file
    has it. ``bq`` is the bias beside ``wq``, 0 where there is none; ``bq_head`` its part that
    belongs to the current head.
    """

    def __init__(self, weights: Mapping[str, str] | None = None) -> None:
        weights = weights or {}
        biases = {
            f"b{variable[1:]}": name.removesuffix("weight") + "bias"
            for variable, name in weights.items()
            if variable.startswith("w")
        }
        self.weights = {**weights, **biases}
        self.lines: list[Line] = []
        self._chapter = ""

    def chapter(self, title: str) -> None:
        """The steps that follow belong to the chapter `title`."""
        self._chapter = title

    def step(
        self,
        per: Scope,
        name: str = "",
        formula: Words = "",
        *,
        called: str = "",
        title: Words = "",
        dims: str | None = None,
        picture: Picture | None = None,
        when: When = lambda config, layer: True,
        otherwise: str = "",
        index: str | None = None,
    ) -> Callable[[Function], Function]:
        """Decorator: the function is the next step; its docstring is the title.

        Its name becomes the name of its value. Without a title it only helps later steps.

        per        how often it is computed: once, per RoPE, layer, key/value head, query head
        formula    ``{argument}`` stands for a name with its shape
        called     another name for the value: of several functions for it, one may have a `when`
        title      in place of the docstring
        dims       letters; left out for a name of graph.py, which has them
        when       for which config and kind of layer
        otherwise  what stands in for its value where it is left out: else its first argument
        index      the runner's name that says which slice of `name` this is (heads: known)
        """

        def write_down(function: Function) -> Function:
            body, helpers = _source_of(function)
            self.lines.append(
                Line(
                    function=function,
                    arguments=inspect.signature(function).parameters,
                    variable=called or function.__name__,
                    per=per,
                    body=body,
                    helpers=helpers,
                    name=name,
                    title=title or function.__doc__ or "",
                    formula=formula,
                    dims=None if dims is None else tuple(dims.split()),
                    picture=picture,
                    when=when,
                    otherwise=otherwise,
                    index=per if per in ("kv_head", "head") else index,
                    chapter=self._chapter,
                )
            )
            return function

        return write_down

    def show(self, variable: str, title: str, formula: str = "", *, dims: str) -> None:
        """The next step shows what is there already: a runner's name, or a weight as stored."""
        weight = self.weights.get(variable)
        argument = f"{variable}_stored" if weight else variable
        self.lines.append(
            Line(
                function=lambda **there: there[argument],
                arguments={argument: inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY)},
                variable=f"{variable}_shown",
                per="layer" if weight else "once",
                body=f'weights["{weight}"]' if weight else variable,
                name=weight or variable,
                title=title,
                formula=formula or f"{variable}, as stored",
                dims=tuple(dims.split()),
                needed=False,
                chapter=self._chapter,
            )
        )

    def include(
        self,
        part: Script,
        words: Mapping[str, str] | None = None,
        titles: Mapping[str, Words] | None = None,
        when: When = lambda config, layer: True,
    ) -> None:
        """The steps of `part` come next.

        words   for other values than those it was written for, with weights of the same kind
        titles  a title it has -> the one to have instead
        when    for which config and kind of layer, beside what each step says
        """
        words, titles = words or {}, titles or {}
        both = [_both(line.when, when) for line in part.lines]
        for line, needed in zip(part.lines, both, strict=True):
            told = titles.get(line.title, line.title) if isinstance(line.title, str) else line.title
            line = replace(line, title=told, when=needed, chapter=line.chapter or self._chapter)
            self.lines.append(line.reworded(words))
        weights = part.weights.items()
        self.weights |= {renamed(own, words): renamed(name, words) for own, name in weights}

    def words(self) -> set[str]:
        """The names in it: of values, of what they are computed from, of weights."""
        texts = [text for pair in self.weights.items() for text in pair]
        for line in self.lines:
            texts += (line.variable, line.name, *line.arguments)
        return {word for text in texts for word in re.findall(r"\w+", text)}

    def titles(self) -> set[str]:
        """The titles in it that are the same for every config."""
        return {line.title for line in self.lines if isinstance(line.title, str)}


def _both(one: When, other: When) -> When:
    return lambda config, layer: one(config, layer) and other(config, layer)


def _source_of(function: Callable[..., Any]) -> tuple[str, tuple[str, ...]]:
    """The body of a step's function without its title, and the helpers of its file it calls."""
    assert isinstance(function, FunctionType), f"{function} is no plain function"
    text = inspect.getsource(function)
    (definition,) = ast.parse(text).body
    assert isinstance(definition, ast.FunctionDef), f"{function} is no plain function"
    first = definition.body[1 if function.__doc__ else 0]
    body = textwrap.dedent("\n".join(text.splitlines()[first.lineno - 1 :]))
    helpers = dict.fromkeys(_called_by(function))
    return body, tuple(inspect.getsource(helper).rstrip() for helper in helpers)


def _called_by(function: FunctionType) -> list[FunctionType]:
    """The functions of the walk that a function calls, and those that they call."""
    found: list[FunctionType] = []
    (definition,) = ast.parse(inspect.getsource(function)).body
    assert isinstance(definition, ast.FunctionDef), f"{function} is no plain function"
    for node in (node for line in definition.body for node in ast.walk(line)):
        called = node.func if isinstance(node, ast.Call) else None
        helper = function.__globals__.get(called.id) if isinstance(called, ast.Name) else None
        if isinstance(helper, FunctionType) and helper.__module__.startswith("pellucid.walk"):
            found += [helper, *_called_by(helper)]
    return found
