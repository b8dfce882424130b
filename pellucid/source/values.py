"""What an expression is worth while code is resolved: known, said by code, or made of parts."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

from pellucid.source.statements import Block, Ref


@dataclass(eq=False)
class Value:
    """An expression's value.

    concrete  what it is in one run on the meta device: shapes and dtypes, no numbers
    node      how the code says it; None for what is known, or has parts
    known     the same in every run, whatever the weights, the text and the activations' dtype
    parts     of a tuple (a list), or of a dict
    fields    names of the parts of a named tuple
    """

    concrete: Any
    node: ast.expr | None = None
    known: bool = False
    parts: list[Value] | dict[Any, Value] | None = None
    fields: tuple[str, ...] = ()

    @property
    def optional(self) -> bool:
        """Whether it may be None in another run."""
        return isinstance(self.node, Ref) and self.node.variable.optional


def known(concrete: Any) -> Value:
    """A value that every run shares."""
    return Value(concrete, known=True)


def tuple_of(parts: Sequence[Value], kind: Callable[..., Any] | None = None) -> Value:
    """A tuple, or a named tuple of class `kind`; known where all its parts are."""
    concretes = [part.concrete for part in parts]
    fields = tuple(getattr(kind, "_fields", ()))
    concrete = tuple(concretes) if kind is None else kind(*concretes)
    if all(part.known and part.node is None for part in parts):
        return known(concrete)
    return Value(concrete, parts=list(parts), fields=fields)


def parts_of(value: Value) -> list[Value] | None:
    """The parts of a tuple or list; None where it has none that are told apart."""
    if isinstance(value.parts, list):
        return value.parts
    if value.known and value.node is None and isinstance(value.concrete, tuple | list):
        return [known(part) for part in value.concrete]
    return None


def node_of(value: Value, me: object = None) -> ast.expr:
    """The expression that says a value; `me` is what code calls ``self``."""
    if value.node is not None:
        return value.node
    if isinstance(value.parts, list):
        return ast.Tuple([node_of(part, me) for part in value.parts], ast.Load())
    assert value.parts is None, "a dict of values has no text"
    return literal(value.concrete, me)


def literal(concrete: Any, me: object = None) -> ast.expr:
    """A known value as text."""
    if isinstance(concrete, tuple):
        return ast.Tuple([literal(part, me) for part in concrete], ast.Load())
    if isinstance(concrete, list):
        return ast.List([literal(part, me) for part in concrete], ast.Load())
    if isinstance(concrete, nn.Module):
        assert isinstance(me, nn.Module), "only a module's own code names its parts"
        if concrete is me:
            return ast.Name("self", ast.Load())
        names = [name for name, child in me.named_children() if child is concrete]
        assert names, f"{type(concrete).__name__} is no part of {type(me).__name__}"
        return attribute(ast.Name("self", ast.Load()), names[0])
    function = getattr(concrete, "__name__", "")
    if function and getattr(F, function, None) is concrete:
        return attribute(ast.Name("F", ast.Load()), function)
    assert (
        concrete is None
        or isinstance(concrete, int | float | str)
        or concrete is ...
        or (type(concrete).__name__ == "dtype")
    ), f"no text for {concrete!r}"
    return _root(concrete) or ast.Constant(concrete)


def _root(number: Any) -> ast.expr | None:
    """``2048**0.5`` for a number that is the root of a whole one, or one over it."""
    for exponent in (0.5, -0.5):
        whole = round(number ** (1 / exponent)) if isinstance(number, float) and number > 0 else 0
        if 1 < whole < 10**6 and len(repr(number)) > 8 and whole**exponent == number:
            return ast.BinOp(ast.Constant(whole), ast.Pow(), ast.Constant(exponent))
    return None


def attribute(owner: ast.expr, name: str) -> ast.expr:
    """``owner.name``."""
    return ast.Attribute(owner, name, ast.Load())


@dataclass(eq=False)
class Frame:
    """One function while it is resolved.

    env       value of each local name
    scope     the globals of its module
    block     where its statements go
    comments  of its source, by line; those on lines of their own under minus the next line
    me        the module whose method it is; `owner` the class that defines it
    """

    env: dict[str, Value]
    scope: Mapping[str, Any]
    block: Block
    comments: Mapping[int, str] = field(default_factory=dict)
    me: object = None
    owner: type | None = None
    result: Value | None = None


@lru_cache(maxsize=512)
def definition(function: FunctionType) -> tuple[ast.FunctionDef, Mapping[int, str]]:
    """A function's syntax tree and its comments."""
    text = textwrap.dedent(inspect.getsource(function))
    (tree,) = ast.parse(text).body
    assert isinstance(tree, ast.FunctionDef), f"{function} is no plain function"
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    own = {line for line in comments if text.splitlines()[line - 1].lstrip().startswith("#")}
    return tree, {line: text for line, text in comments.items() if line not in own}
