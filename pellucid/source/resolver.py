"""Functions, resolved: statements are run through once, calls of our own functions are opened.

    resolver = Resolver()
    function = resolver.function(code, {"x": value, "dialect": known(dialect)})

`tap` leaves the name of its tensor: as a variable, or in a comment where a variable has to keep
one name on both ways through a branch or a loop.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pellucid import trace
from pellucid.source.expressions import Expressions
from pellucid.source.statements import (
    Block,
    Ref,
    Statement,
    Variable,
    each,
    replace_uses,
    uses,
)
from pellucid.source.tidying import tidy
from pellucid.source.values import Frame, Value, definition, known, parts_of, tuple_of

_KNOWN_CALLS: dict[Any, bool] = {trace.names_steps: True, torch.compiler.is_compiling: False}
_MODULE_CLASS = nn.Module


@dataclass(eq=False)
class Function:
    """A resolved function: its parameters, its body, and what it returns in the meta run."""

    name: str
    parameters: list[Variable]
    block: Block
    result: Value
    doc: str = ""
    used: list[bool] = field(default_factory=list)


class Resolver(Expressions):
    """Resolves functions.

    kept  names of functions that stay functions in the text; calls of others are opened
    """

    in_16_bits = True  # the run's activations: what is float32 in it is so in every run

    def __init__(self, kept: tuple[str, ...] = ()) -> None:
        self.kept = kept
        self.functions: dict[str, Function] = {}
        self._inside: list[str] = []  # kept functions at work: one that calls itself is opened
        self._computed: set[Any] = set()  # functions inside functions, computed as they are

    # ── Statements ────────────────────────────────────────────────────────────────────────────────

    def run(self, body: list[ast.stmt], frame: Frame) -> None:
        """Resolve statements until one returns."""
        for statement in body:
            if frame.result is not None:
                return
            there = len(frame.block)
            getattr(self, f"_run_{type(statement).__name__}")(statement, frame)
            end = statement.lineno if hasattr(statement, "body") else statement.end_lineno
            lines = range(statement.lineno, (end or statement.lineno) + 1)
            comment = "; ".join(frame.comments[line] for line in lines if line in frame.comments)
            if comment and len(frame.block) > there and not hasattr(statement, "body"):
                frame.block[-1].comment = frame.block[-1].comment or comment

    def _run_Assign(self, node: ast.Assign, frame: Frame) -> None:
        (target,) = node.targets
        self.assign(target, self.resolve(node.value, frame), frame)

    def _run_AnnAssign(self, node: ast.AnnAssign, frame: Frame) -> None:
        if node.value is not None:
            self.assign(node.target, self.resolve(node.value, frame), frame)

    def _run_AugAssign(self, node: ast.AugAssign, frame: Frame) -> None:
        assert isinstance(node.target, ast.Name), "a name"
        target = ast.Name(node.target.id, ast.Load())
        self.assign(node.target, self.resolve(ast.BinOp(target, node.op, node.value), frame), frame)

    def assign(self, target: ast.expr, value: Value, frame: Frame) -> None:
        """Give a value to a name, an attribute or several of them."""
        if isinstance(target, ast.Tuple):
            self._assign_several(target.elts, value, frame)
        elif isinstance(target, ast.Name):
            frame.env[target.id] = self.bound(value, target.id, frame)
        elif not value.known and isinstance(target, ast.Attribute):
            code = self.text(value, frame)
            if not isinstance(code, ast.Tuple):
                self.emit(Statement("assign", [f"self.{target.attr}"], [code]), frame)

    def _assign_several(self, targets: list[ast.expr], value: Value, frame: Frame) -> None:
        parts = parts_of(value)
        if parts is None:
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            variables = [
                Variable(name, concrete, source=name)
                for name, concrete in zip(names, value.concrete, strict=True)
            ]
            self.emit(Statement("assign", list(variables), [self.text(value, frame)]), frame)
            for name, variable in zip(names, variables, strict=True):
                frame.env[name] = Value(variable.concrete, variable.ref())
            return
        fresh = [
            (target, part)
            for target, part in zip(targets, parts, strict=True)
            if isinstance(target, ast.Name) and not part.known and not isinstance(part.node, Ref)
            and part.parts is None
        ]  # fmt: skip
        if len(fresh) < 2:
            for target, part in zip(targets, parts, strict=True):
                self.assign(target, part, frame)
            return
        variables = [Variable(target.id, part.concrete, source=target.id) for target, part in fresh]
        code = [self.text(part, frame) for _, part in fresh]
        self.emit(Statement("assign", list(variables), code), frame)
        new = {
            id(part): Value(v.concrete, v.ref())
            for (_, part), v in zip(fresh, variables, strict=True)
        }
        for target, part in zip(targets, parts, strict=True):
            self.assign(target, new.get(id(part), part), frame)

    def _run_Return(self, node: ast.Return, frame: Frame) -> None:
        frame.result = known(None) if node.value is None else self.resolve(node.value, frame)

    def _run_Assert(self, node: ast.Assert, frame: Frame) -> None:
        """What the package checks of itself is not said again."""

    def _run_Raise(self, node: ast.Raise, frame: Frame) -> None:
        assert isinstance(node.exc, ast.Call), "an error with a message"
        message = self.resolve(node.exc.args[0], frame)
        code = ast.Call(node.exc.func, [self.text(message, frame)], [])
        self.emit(Statement("raise", [], [code]), frame)

    def _run_Expr(self, node: ast.Expr, frame: Frame) -> None:
        if not isinstance(node.value, ast.Constant):
            value = self.resolve(node.value, frame)
            if value.node is not None and not value.known:
                self.emit(Statement("do", [], [value.node]), frame)

    def _run_FunctionDef(self, node: ast.FunctionDef, frame: Frame) -> None:
        there = {name: value.concrete for name, value in frame.env.items()}
        scope = {**frame.scope, **there}
        module = ast.Module([node], [])
        exec(compile(ast.fix_missing_locations(module), node.name, "exec"), scope)
        self._computed.add(scope[node.name])
        frame.env[node.name] = known(scope[node.name])

    def _run_If(self, node: ast.If, frame: Frame) -> None:
        test = self.resolve(node.test, frame)
        truth = self.truth(test)
        if truth is not None:
            self.run(node.body if truth else node.orelse, frame)
            return
        made = Statement("if", [], [self.text(test, frame)])
        inner = Frame({**frame.env}, frame.scope, made.body, frame.comments, frame.me, frame.owner)
        self.run(node.body, inner)
        assert inner.result is None and not node.orelse, "a return in a branch that a run decides"
        self._merge(inner, frame)
        if made.body:
            frame.block.append(made)

    def _run_For(self, node: ast.For, frame: Frame) -> None:
        if isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) == "zip":
            self.loop(node, frame)
            return
        assert isinstance(node.target, ast.Name), "a loop over something known"
        for element in self.resolve(node.iter, frame).concrete:
            frame.env[node.target.id] = known(element)
            self.run(node.body, frame)

    def loop(self, node: ast.For, frame: Frame) -> None:
        """A loop over the layers."""
        raise NotImplementedError

    def _merge(self, inner: Frame, frame: Frame) -> None:
        """After a branch or a loop: a variable that it sets keeps one name on both ways."""
        for name, value in inner.env.items():
            before = frame.env.get(name)
            if before is None or before is value or not isinstance(value.node, Ref):
                continue
            old, new = before.node, value.node
            assert isinstance(old, Ref), f"{name} is set in a branch and known before it"
            if old.variable is new.variable:
                continue
            for _, statement in each(inner.block):
                if new.variable in statement.targets and new.variable.named:
                    statement.comment = statement.comment or new.variable.name
                statement.targets = [
                    old.variable if target is new.variable else target
                    for target in statement.targets
                ]
            replace_uses(inner.block, new.variable, old.variable.ref())
            if old.variable.named and old.variable.name != name:
                self._comment(frame.block, old.variable, old.variable.name)
                old.variable.name = name

    def _comment(self, block: Block, variable: Variable, text: str) -> None:
        for _, statement in each(block):
            if variable in statement.targets:
                statement.comment = f"{text} {statement.comment}".strip()
                return

    # ── Calls ─────────────────────────────────────────────────────────────────────────────────────

    def call(self, node: ast.Call, frame: Frame) -> Value:
        """The value of a call: computed, opened, or kept."""
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "super()":
            return self._call_above(node, frame)
        target = self.resolve(node.func, frame)
        function = target.concrete
        arguments: list[Value] = []
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                arguments += self.unpacked(self.resolve(argument.value, frame), frame)
            else:
                arguments.append(self.resolve(argument, frame))
        words = {word.arg or "": self.resolve(word.value, frame) for word in node.keywords}
        if function is trace.tap:
            return self.tapped(arguments[0].concrete, arguments[1].concrete, arguments[2], frame)
        if isinstance(function, _MODULE_CLASS):
            return self.module_call(target, arguments, frame)
        if isinstance(function, type) and issubclass(function, _MODULE_CLASS):
            return self.constructed(target, arguments, words, frame)
        if isinstance(function, type) and issubclass(function, tuple) and function is not tuple:
            return self._named_tuple(function, arguments, words)
        code = function.__func__ if isinstance(function, MethodType) else function
        own = isinstance(code, FunctionType) and code.__module__.startswith("pellucid")
        if function in _KNOWN_CALLS if own or (callable(function) and target.known) else False:
            return known(_KNOWN_CALLS[function])
        if own and target.known and function not in self._computed:
            assert isinstance(code, FunctionType)
            if code.__name__ in self.kept and code.__name__ not in self._inside:
                return self._kept_call(code, arguments, words, frame)
            return self.opened(function, arguments, words, frame)
        return self._outside(target, arguments, words, frame)

    def _named_tuple(self, kind: Any, arguments: list[Value], words: dict[str, Value]) -> Value:
        given = dict(zip(kind._fields, arguments, strict=False)) | words
        missing = {name: known(value) for name, value in kind._field_defaults.items()}
        return tuple_of([(missing | given)[name] for name in kind._fields], kind)

    def opened(
        self, function: Any, arguments: list[Value], words: dict[str, Value], frame: Frame
    ) -> Value:
        """A call of our own: its statements come here, its result is the value."""
        me, code = frame.me, function
        if isinstance(function, MethodType):
            me, code = function.__self__, function.__func__
            arguments = [known(me), *arguments]
        owner = _defining(me, code)
        tree, comments = definition(code)
        env = self.given(code, tree, arguments, words)
        bound = {name: self.bound(value, name, frame, passing=True) for name, value in env.items()}
        inner = Frame(bound, code.__globals__, frame.block, comments, me, owner)
        self.run(tree.body, inner)
        return inner.result or known(None)

    def given(
        self,
        code: FunctionType,
        tree: ast.FunctionDef,
        arguments: list[Value],
        words: dict[str, Value],
    ) -> dict[str, Value]:
        """Parameter -> value, defaults included."""
        names = [argument.arg for argument in tree.args.args]
        defaults = code.__defaults__ or ()
        env = {
            name: known(value)
            for name, value in zip(names[len(names) - len(defaults) :], defaults, strict=True)
        }
        env |= {name: known(value) for name, value in (code.__kwdefaults__ or {}).items()}
        return env | dict(zip(names, arguments, strict=False)) | words

    def _call_above(self, node: ast.Call, frame: Frame) -> Value:
        """``super().method(…)``: the method of the class above."""
        assert isinstance(node.func, ast.Attribute) and frame.owner is not None, "outside a class"
        above = frame.owner.__mro__[frame.owner.__mro__.index(frame.owner) + 1 :]
        name = node.func.attr
        found = next(kind for kind in above if name in vars(kind))
        if found is nn.Module:
            return Value(None, ast.Name("super().__init__()", ast.Load()))
        method = MethodType(vars(found)[name], frame.me)
        arguments = [self.resolve(argument, frame) for argument in node.args]
        return self.opened(method, arguments, {}, frame)

    def _outside(
        self, target: Value, arguments: list[Value], words: dict[str, Value], frame: Frame
    ) -> Value:
        """A call of torch or Python: computed where everything is known, else kept."""
        function = target.concrete
        if function is torch.promote_types and arguments[1].concrete is torch.float32:
            return known(torch.float32)  # whatever the first, up to float32
        tensor = getattr(function, "__self__", None)
        if isinstance(tensor, Tensor) and function.__name__ == "to":
            return self._cast(target, arguments, frame)
        if isinstance(tensor, Tensor) and function.__name__ == "transpose":
            there = _turned_back(target.node, [value.concrete for value in arguments])
            if there is not None:
                return Value(function(*(value.concrete for value in arguments)), there)
        if function is torch.softmax and self._same_dtype(arguments[0], words.get("dtype")):
            words = {name: value for name, value in words.items() if name != "dtype"}
        concretes = [value.concrete for value in arguments]
        named = {name: value.concrete for name, value in words.items()}
        concrete = function(*concretes, **named)
        everything = [*arguments, *words.values()]
        settled = target.known and all(value.known for value in everything)
        spoken = any(value.node is not None for value in everything)
        if settled and not spoken and not isinstance(concrete, Tensor):
            return known(concrete)
        keywords = [ast.keyword(name, self.text(value, frame)) for name, value in words.items()]
        said = [self.text(value, frame) for value in arguments]
        code = ast.Call(self.text(target, frame), said, keywords)
        return Value(concrete, code, known=settled and not isinstance(concrete, Tensor))

    def _same_dtype(self, tensor: Value, dtype: Value | None) -> bool:
        return dtype is not None and dtype.concrete == tensor.concrete.dtype

    def _cast(self, target: Value, arguments: list[Value], frame: Frame) -> Value:
        """``x.to(dtype)``: nothing where x has that dtype already, in 16 bits and in 32."""
        assert isinstance(target.node, ast.Attribute), "a method has a name"
        (dtype,) = arguments
        tensor = target.concrete.__self__
        if tensor.dtype == dtype.concrete:
            return Value(tensor, target.node.value)
        concrete = tensor.to(dtype.concrete)
        if self.in_16_bits and dtype.concrete is torch.float32:  # whatever the weights are
            method = ast.Attribute(target.node.value, "float", ast.Load())
            return Value(concrete, ast.Call(method, [], []))
        return Value(concrete, ast.Call(target.node, [self.text(dtype, frame)], []))

    def shape(self, module: object, leaf: str) -> str:
        """The shape of a named tensor, as a comment states it."""
        return ""

    def tapped(self, module: object, leaf: str, value: Value, frame: Frame) -> Value:
        """``tap(self, leaf, value)``: the value under that name."""
        name, shape = leaf.rpartition(".")[2], self.shape(module, leaf)
        if isinstance(value.node, Ref):
            variable = value.node.variable
            if not variable.named:
                variable.name, variable.named, variable.passing = name, True, False
                variable.shape = shape
                if name != leaf:
                    self._comment(frame.block, variable, leaf)
            return value
        variable = Variable(name, value.concrete, named=True, source=name, shape=shape)
        comment = leaf if name != leaf else ""
        self.emit(Statement("assign", [variable], [self.text(value, frame)], comment), frame)
        return Value(value.concrete, variable.ref())

    def module_call(self, target: Value, arguments: list[Value], frame: Frame) -> Value:
        """A call of a module."""
        raise NotImplementedError

    def constructed(
        self, target: Value, arguments: list[Value], words: dict[str, Value], frame: Frame
    ) -> Value:
        """A module made of a class."""
        raise NotImplementedError

    # ── Functions that stay ───────────────────────────────────────────────────────────────────────

    def function(
        self,
        code: FunctionType,
        env: dict[str, Value],
        name: str = "",
        *,
        me: object = None,
    ) -> Function:
        """A function with these arguments; what is known of them is no parameter any more."""
        tree, comments = definition(code)
        made = Function(name or code.__name__, [], [], known(None), ast.get_docstring(tree) or "")
        inside = {
            name: self._parameter(name, value, made.parameters) for name, value in env.items()
        }
        frame = Frame(inside, code.__globals__, made.block, comments, me, _defining(me, code))
        self.run(tree.body, frame)
        made.result = frame.result or known(None)
        if frame.result is not None:
            self.emit(Statement("return", [], [self.text(frame.result, frame)]), frame)
        tidy(made.block)
        counted = uses(made.block)
        made.used = [bool(counted.get(variable)) for variable in made.parameters]
        return made

    def _parameter(self, name: str, value: Value, parameters: list[Variable]) -> Value:
        """What a function finds under a parameter's name: what is known stays known."""
        if value.known and not isinstance(value.concrete, nn.Module):
            return Value(value.concrete, None, known=True)
        if value.known:
            return value
        if isinstance(value.parts, list):
            names = value.fields or [name] * len(value.parts)
            parts = [
                self._parameter(
                    part.node.variable.name if isinstance(part.node, Ref) else own, part, parameters
                )
                for own, part in zip(names, value.parts, strict=True)
            ]
            return Value(value.concrete, parts=parts, fields=value.fields)
        variable = Variable(name, value.concrete, optional=value.optional, source=name)
        if isinstance(value.node, Ref):
            variable.annotation = value.node.variable.annotation
            variable.hint = value.node.variable.hint
        parameters.append(variable)
        return Value(value.concrete, variable.ref())

    def leaves(self, value: Value, frame: Frame) -> list[ast.expr]:
        """What a call hands over for one argument: one expression for each parameter."""
        if value.known:
            return []
        if isinstance(value.parts, list):
            return [leaf for part in value.parts for leaf in self.leaves(part, frame)]
        return [self.text(value, frame)]

    def _kept_call(
        self,
        code: FunctionType,
        arguments: list[Value],
        words: dict[str, Value],
        frame: Frame,
    ) -> Value:
        tree, _ = definition(code)
        env = self.given(code, tree, arguments, words)
        self._inside.append(code.__name__)
        made = self.function(code, env)
        self._inside.pop()
        if len(made.block) == 1 and isinstance(made.block[0].parts[0], Ref):
            number = made.parameters.index(made.block[0].parts[0].variable)
            return Value(made.result.concrete, self._leaves_of(env, frame)[number])
        made = self.functions.setdefault(code.__name__, made)
        leaves = self._leaves_of(env, frame)
        said = [leaf for leaf, used in zip(leaves, made.used, strict=True) if used]
        call = ast.Call(ast.Name(made.name, ast.Load()), said, [])
        concrete = code(**{name: value.concrete for name, value in env.items()})
        return Value(concrete, call)

    def _leaves_of(self, env: dict[str, Value], frame: Frame) -> list[ast.expr]:
        return [leaf for value in env.values() for leaf in self.leaves(value, frame)]


def _defining(me: object, code: FunctionType) -> type | None:
    """The class of `me` that defines a method."""
    return next((kind for kind in type(me).__mro__ if code in vars(kind).values()), None)


def _turned_back(method: ast.expr | None, axes: list[int]) -> ast.expr | None:
    """What is transposed for the second time, and so as it was."""
    before = method.value if isinstance(method, ast.Attribute) else None
    if not isinstance(before, ast.Call) or not isinstance(before.func, ast.Attribute):
        return None
    same = before.func.attr == "transpose" and [ast.unparse(a) for a in before.args]
    return before.func.value if same == [str(axis) for axis in axes] else None
