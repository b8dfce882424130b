"""What a step of the walk is, and how a family writes its steps down.

A step is a small pure function whose arguments are named after the values it needs: an earlier
step, a weight, a field of the config, or one of `RUNNER_NAMES`. Dependencies, shapes and the
printed formula all follow from that; nothing about a step is written twice.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

# text: strings in order; heatmap: one row per token; attention: one row and one column per token;
# rays: complex numbers drawn from the origin; bars: one number per entry
Picture = Literal["text", "heatmap", "attention", "rays", "bars"]
Scope = Literal["once", "layer", "kv_head", "head"]
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
    source: str
    name: str = ""
    title: str = ""
    formula: str | Callable[[Any], str] = ""
    dims: tuple[str, ...] | None = None  # None: names.py has them
    picture: Picture | None = None  # None: as its dims suggest
    when: Callable[[Any], bool] = lambda config: True
    index: str | None = None
    needed: bool = True  # False: only to be shown, no other step wants it


class Script:
    """The steps of one family, in the order in which its file defines them.

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

    def step(
        self,
        per: Scope,
        name: str = "",
        formula: str | Callable[[Any], str] = "",
        *,
        dims: str | None = None,
        picture: Picture | None = None,
        when: Callable[[Any], bool] = lambda config: True,
        index: str | None = None,
    ) -> Callable[[Function], Function]:
        """Decorator: the function is the next step; its docstring is the title.

        Its name becomes the name of its value. Without a docstring it only helps later steps.

        per      how often it is computed: once, per layer, per key/value head, per query head
        formula  ``{argument}`` stands for a name with its shape; or such a text from the config
        dims     letters; left out for a name of names.py, which has them
        when     for which configs; for others, its first argument stands in for its value
        index    the runner's name that says which slice of `name` this is (heads: known)
        """

        def write_down(function: Function) -> Function:
            self.lines.append(
                Line(
                    function=function,
                    arguments=inspect.signature(function).parameters,
                    variable=function.__name__,
                    per=per,
                    source=_source_of(function),
                    name=name,
                    title=function.__doc__ or "",
                    formula=formula,
                    dims=None if dims is None else tuple(dims.split()),
                    picture=picture,
                    when=when,
                    index=per if per in ("kv_head", "head") else index,
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
                source=f'weights["{weight}"]' if weight else variable,
                name=weight or variable,
                title=title,
                formula=formula or f"{variable}, as stored",
                dims=tuple(dims.split()),
                needed=False,
            )
        )

    def include(self, chapter: Script) -> None:
        """The steps of `chapter` come next."""
        self.lines.extend(chapter.lines)


def _source_of(function: Callable[..., Any]) -> str:
    """The body of a step's function without its title, then the helpers of its file it calls."""
    assert isinstance(function, FunctionType), f"{function} is no plain function"
    text = inspect.getsource(function)
    (definition,) = ast.parse(text).body
    assert isinstance(definition, ast.FunctionDef), f"{function} is no plain function"
    first = definition.body[1 if function.__doc__ else 0]
    body = textwrap.dedent("\n".join(text.splitlines()[first.lineno - 1 :]))
    called = [node.func for node in ast.walk(definition) if isinstance(node, ast.Call)]
    called = [function.__globals__.get(node.id) for node in called if isinstance(node, ast.Name)]
    helpers = [
        inspect.getsource(helper).rstrip()
        for helper in dict.fromkeys(called)
        if isinstance(helper, FunctionType) and helper.__module__ == function.__module__
    ]
    return "\n\n".join([body, *helpers])
