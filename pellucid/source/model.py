"""The decoder of one config, resolved: its classes and functions as statements.

Its forward is run through once with tensors that have shapes and no values (the meta device), so
that every size, dtype and choice is known that a run cannot change.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn

from pellucid import graph
from pellucid.models import Cache, Config, Layer, empty_model
from pellucid.models.parts import HeadNorms, LayerNorm, RMSNorm
from pellucid.models.rope import RotaryEmbedding
from pellucid.source.expressions import BATCH, TOKENS
from pellucid.source.resolver import Function, Resolver
from pellucid.source.statements import Block, Ref, Statement, Variable, uses
from pellucid.source.values import Frame, Value, known, tuple_of

KEPT = ("rotate", "repeat_heads", "composed_gelu", "interleaved")


@dataclass(eq=False)
class Class:
    """A resolved module: what it is made of, and its forward."""

    kind: type
    module: nn.Module
    init: Function
    forward: Function


@dataclass(eq=False)
class _Choice:
    """What a layer gets by its kind: the statement that names it, and a value for each kind."""

    before: Statement  # places = {…}, ahead of the loop
    inside: Statement  # cos, sin, mask = places[kind]
    choices: list[tuple[Variable, dict[str, ast.expr]]] = field(default_factory=list)


class ModelResolver(Resolver):
    """Resolves the decoder of a config, with the dialect's rounding."""

    def __init__(self, config: Config, dialect: str) -> None:
        super().__init__(KEPT)
        self.config = config
        self.model = empty_model(config, dialect).to(torch.bfloat16).eval()
        self.classes: dict[type, Class] = {}
        self.kinds: list[str] = []  # the kind of each layer, where layers differ
        self._choices: list[_Choice] = []

    def shape(self, module: object, leaf: str) -> str:
        """Dims of `graph`, with this model's sizes."""
        path = next(path for path, each in self.model.named_modules() if each is module)
        dims = graph.dims(f"{path}.{leaf}" if path else leaf)
        return self.sized(f"({', '.join(dims)})")

    def sized(self, text: str) -> str:
        """A comment or docstring with numbers in place of the letters of shapes."""
        config = self.config
        rope = config.rope or config.second_rope
        turned = config.rotary_width(rope) if rope else 2
        sizes = {
            "C": config.width, "H": config.n_heads, "Hkv": config.n_kv_heads,
            "D": config.head_dim, "F": config.hidden_width, "V": config.vocab_size,
            "D/2": turned // 2, "H·D": config.n_heads * config.head_dim,
        }  # fmt: skip

        def numbered(shape: re.Match[str]) -> str:
            words = shape[1].split(", ")
            return f"({', '.join(str(sizes.get(word, word)) for word in words)})"

        return re.sub(r"\(((?:[\w…/·]+, )*[\w…/·]+)\)", numbered, text)

    def resolved(self) -> list[Class | Function]:
        """Classes and functions, each before those that it uses."""
        with torch.device("meta"), torch.no_grad():
            tokens = torch.zeros(BATCH, TOKENS, dtype=torch.long)
            cache = Variable("cache", Cache(self.config.n_layers), optional=True)
            cache.annotation = "Cache | None"
            env = {
                "tokens": Value(tokens, Variable("tokens", tokens).ref()),
                "cache": Value(cache.concrete, cache.ref()),
                "starts": known(None),
                "last": known(False),
            }
            self._class(self.model, env)
            order = [*self.classes.values()][::-1]
            for made in order:
                self._init(made)
        functions = list(self.functions.values())
        return self._in_order([*order, *functions])

    def _in_order(self, parts: list[Class | Function]) -> list[Class | Function]:
        """As the decoder's own source has them: from the whole to its parts."""
        rank = ["Decoder", "Block", "Attention", "repeat_heads", "rotate", "interleaved", "rope",
                "second_rope", "GatedMLP", "MLP", "composed_gelu"]  # fmt: skip
        names = [p.kind.__name__ if isinstance(p, Class) else p.name for p in parts]
        places = [rank.index(name) if name in rank else len(rank) for name in names]
        return [parts[number] for number in sorted(range(len(parts)), key=places.__getitem__)]

    def _class(self, module: nn.Module, env: dict[str, Value]) -> Function:
        """The forward of a module's class, resolved once."""
        kind = type(module)
        if kind not in self.classes:
            normal, self.fixed_shapes = self.fixed_shapes, not _is_norm(kind)
            code = _method(kind, "forward")
            forward = self.function(code, {"self": known(module), **env}, me=module)
            self.fixed_shapes = normal
            empty = Function("__init__", [], [], known(None))
            self.classes[kind] = Class(kind, module, empty, forward)
        return self.classes[kind].forward

    def _init(self, made: Class) -> None:
        code = _method(made.kind, "__init__")
        module = made.module
        env: dict[str, Value] = {"self": known(module), "config": known(self.config)}
        env["dialect"] = known(self.model.dialect)
        env["dialect_name"] = known(self.model.dialect.name)
        if _is_norm(made.kind):
            env["width"] = Value(1, Variable("width", 1, annotation="int").ref())
        wanted = code.__code__.co_varnames[: code.__code__.co_argcount]
        env = {name: value for name, value in env.items() if name in wanted}
        made.init = self.function(code, env, "__init__", me=module)

    # ── Modules ───────────────────────────────────────────────────────────────────────────────────

    def module_call(self, target: Value, arguments: list[Value], frame: Frame) -> Value:
        """A call of a module: dropout is nothing here, a RoPE is a function, the rest a call."""
        module = target.concrete
        if isinstance(module, nn.Dropout):
            return arguments[0]
        if isinstance(module, RotaryEmbedding):
            return self._rope_call(module, arguments, frame)
        said = [leaf for value in arguments for leaf in self.leaves(value, frame)]
        if not type(module).__module__.startswith("pellucid"):
            concrete = module(*(value.concrete for value in arguments))
        else:
            arguments = [self.bound(value, "x", frame, passing=True) for value in arguments]
            code = _method(type(module), "forward")
            names = code.__code__.co_varnames[1 : code.__code__.co_argcount]
            forward = self._class(module, dict(zip(names, arguments, strict=True)))
            said = [leaf for value in arguments for leaf in self.leaves(value, frame)]
            said = [leaf for leaf, used in zip(said, forward.used, strict=True) if used]
            concrete = forward.result.concrete
            if _is_norm(type(module)):
                concrete = arguments[0].concrete
        return Value(concrete, ast.Call(self.text(target, frame), said, []))

    def _rope_call(self, module: nn.Module, arguments: list[Value], frame: Frame) -> Value:
        """cos and sin of a RoPE, which has no weights: a function, by the name of its module."""
        name = next(name for name, child in self.model.named_children() if child is module)
        names = ("positions", "dtype")
        env = dict(zip(names, arguments, strict=True))
        made = self.function(
            _method(type(module), "forward"), {"self": known(module), **env}, name, me=module
        )
        for variable in made.parameters:
            if variable.name == "dtype":
                variable.annotation = "torch.dtype"
        self.functions[name] = made
        said = [leaf for value in arguments for leaf in self.leaves(value, frame)]
        said = [leaf for leaf, used in zip(said, made.used, strict=True) if used]
        before = name.removesuffix("rope")
        variables = [
            Variable(f"{before}{leaf}", concrete, named=True)
            for leaf, concrete in zip(("cos", "sin"), made.result.concrete, strict=True)
        ]
        call = ast.Call(ast.Name(name, ast.Load()), said, [])
        self.emit(Statement("assign", list(variables), [call]), frame)
        return tuple_of([Value(v.concrete, v.ref()) for v in variables])

    def constructed(
        self, target: Value, arguments: list[Value], words: dict[str, Value], frame: Frame
    ) -> Value:
        """``Block(config, dialect)``: the same without what this file knows."""
        kind = target.concrete
        if kind in (nn.Dropout, RotaryEmbedding):
            return known(None)
        own = kind.__module__.startswith("pellucid")
        name = ast.Name(kind.__name__, ast.Load()) if own else self.text(target, frame)
        if own and not (_is_norm(kind) and self.config.norm_weight):
            return Value(None, ast.Call(name, [], []))
        if own:
            arguments = [value for value in arguments if isinstance(value.concrete, int)]
        keywords = [ast.keyword(word, self.text(value, frame)) for word, value in words.items()]
        keywords = [k for k in keywords if k.arg != "bias" or not _is_true(k.value)]
        said = [self.text(value, frame) for value in arguments]
        return Value(None, ast.Call(name, said, keywords))

    def call(self, node: ast.Call, frame: Frame) -> Value:
        """As for any function; modules by their name are found, not asked for."""
        if isinstance(node.func, ast.Attribute) and node.func.attr == "add_module":
            return known(None)
        return super().call(node, frame)

    # ── Layers of several kinds ───────────────────────────────────────────────────────────────────

    def loop(self, node: ast.For, frame: Frame) -> None:
        """``for layer, kind, layer_cache in zip(…)``; without the kind where layers are alike."""
        assert isinstance(node.iter, ast.Call) and isinstance(node.target, ast.Tuple), "a zip"
        made = Statement("for")
        inner = Frame({**frame.env}, frame.scope, made.body, frame.comments, frame.me, frame.owner)
        over: list[ast.expr] = []
        for target, argument in zip(node.target.elts, node.iter.args, strict=True):
            assert isinstance(target, ast.Name), "a name for each"
            value = self.resolve(argument, frame)
            kinds = value.concrete if value.known else ()
            if isinstance(kinds, tuple) and kinds and len(set(kinds)) == 1:
                inner.env[target.id] = known(kinds[0])
                continue
            first = value.concrete[0]
            variable = Variable(target.id, first, optional=not value.known)
            variable.annotation = f"{type(first).__name__} | None"
            made.targets.append(variable)
            inner.env[target.id] = Value(first, variable.ref(), isinstance(first, nn.Module))
            if isinstance(first, Layer):
                self.kinds = [kind_name(self.config, kind) for kind in kinds]
                over.append(ast.Name("KINDS", ast.Load()))
            else:
                over.append(self.text(value, frame))
        self.run(node.body, inner)
        self._merge(inner, frame)
        for choice in self._choices:
            _close(choice, made.body)
        strict = [ast.keyword("strict", ast.Constant(True))]
        made.parts = [ast.Call(ast.Name("zip", ast.Load()), over, strict)]
        frame.block += [choice.before for choice in self._choices]
        frame.block.append(made)

    def select(self, choices: dict[Any, Value], key: Value, frame: Frame) -> Value:
        """``places[kind]``: what differs between kinds is looked up, the rest is shared."""
        assert isinstance(key.node, Ref), "the kind of a layer"
        inside, before = Statement("assign"), Statement("assign")
        choice = _Choice(before, inside)
        names = {kind_name(self.config, kind): kind for kind in choices}
        value = self._shared({name: choices[names[name]] for name in sorted(names)}, "", choice)
        places = Variable("places", None)
        before.targets = [places]
        inside.parts = [ast.Subscript(places.ref(), key.node, ast.Load())]
        self._choices.append(choice)
        self.emit(inside, frame)
        return value

    def _shared(self, values: dict[str, Value], name: str, choice: _Choice) -> Value:
        first, *others = values.values()
        if all(other is first or _same(first, other) for other in others):
            return first
        rows = {kind: v.parts for kind, v in values.items() if isinstance(v.parts, list)}
        if len(rows) == len(values) and len({len(row) for row in rows.values()}) == 1:
            fields = first.fields or ("cos", "sin")
            parts = [
                self._shared(
                    {kind: row[place] for kind, row in rows.items()}, fields[place], choice
                )
                for place in range(len(fields))
            ]
            return Value(first.concrete, parts=parts, fields=first.fields)
        there = next(value for value in values.values() if value.concrete is not None)
        variable = Variable(name, there.concrete, named=True, source=name)
        variable.optional = any(value.concrete is None for value in values.values())
        if there.parts is not None:
            variable.hint, variable.annotation = "cos sin", "tuple[Tensor, Tensor] | None"
        if name == "allowed":
            variable.name = "mask"
        codes = {kind: self.text(value, Frame({}, {}, [])) for kind, value in values.items()}
        choice.choices.append((variable, codes))
        return Value(there.concrete, variable.ref())


def kind_name(config: Config, kind: Layer) -> str:
    """A word for a kind of layer, in which the kinds of a config differ."""
    seen = "window" if kind.window else "full"
    by_window = {k.window: k for k in config.kinds}
    if len(by_window) == len(set(config.kinds)):
        return seen
    turned = kind.rope or "no rope"
    return (
        turned
        if len({k.rope for k in config.kinds}) == len(set(config.kinds))
        else f"{seen}, {turned}"
    )


def _close(choice: _Choice, body: Block) -> None:
    """Write what is looked up, of what the layers use."""
    counted = uses(body)
    used = [(variable, codes) for variable, codes in choice.choices if counted.get(variable)]
    choice.inside.targets = [variable for variable, _ in used]
    kinds = list(used[0][1])
    rows = [[codes[kind] for _, codes in used] for kind in kinds]
    values = [row[0] if len(row) == 1 else ast.Tuple(row, ast.Load()) for row in rows]
    choice.before.parts = [ast.Dict([ast.Constant(kind) for kind in kinds], values)]


def _same(one: Value, other: Value) -> bool:
    if one.known and other.known:
        return one.concrete == other.concrete
    return (
        isinstance(one.node, Ref)
        and isinstance(other.node, Ref)
        and one.node.variable is other.node.variable
    )


def _is_norm(kind: type) -> bool:
    return issubclass(kind, RMSNorm | LayerNorm | HeadNorms)


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _method(kind: type, name: str) -> FunctionType:
    """A method as the class that defines it has it."""
    return next(vars(k)[name] for k in kind.__mro__ if name in vars(k))
