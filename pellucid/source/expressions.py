"""Expressions, resolved: what is known is computed, a decided choice is made, the rest is kept."""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.source.statements import Ref, Statement, Variable
from pellucid.source.values import (
    Frame,
    Value,
    attribute,
    known,
    literal,
    node_of,
    parts_of,
    tuple_of,
)

BATCH, TOKENS = 1009, 10007  # of the run on the meta device: no size of a model is one of these
_OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.MatMult: operator.matmul, ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_, ast.USub: operator.neg, ast.Invert: operator.invert,
    ast.Not: operator.not_, ast.UAdd: operator.pos, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda part, whole: part in whole, ast.NotIn: lambda part, whole: part not in whole,
}  # fmt: skip


class Expressions:
    """Resolves expressions; calls are left to the class that builds on it."""

    fixed_shapes = True  # whether a size that no run changes is written as a number

    def resolve(self, node: ast.expr, frame: Frame) -> Value:
        """The value of an expression."""
        return getattr(self, f"_{type(node).__name__}")(node, frame)

    def call(self, node: ast.Call, frame: Frame) -> Value:
        """The value of a call."""
        raise NotImplementedError

    def select(self, choices: dict[Any, Value], key: Value, frame: Frame) -> Value:
        """The value of one of several, by a key that a loop changes."""
        raise NotImplementedError

    def text(self, value: Value, frame: Frame) -> ast.expr:
        """The expression that says a value."""
        return node_of(value, frame.me)

    def emit(self, statement: Statement, frame: Frame) -> None:
        """Put a statement behind those that are there."""
        frame.block.append(statement)

    def bound(self, value: Value, name: str, frame: Frame, *, passing: bool = False) -> Value:
        """A value under a name: itself where it has one or is known."""
        if value.known or isinstance(value.node, Ref):
            return value
        if isinstance(value.parts, list):
            parts = [self.bound(part, name, frame, passing=passing) for part in value.parts]
            return Value(value.concrete, parts=list(parts), fields=value.fields)
        if isinstance(value.parts, dict) or _is_own(value.node, passing):
            return value
        variable = Variable(name, value.concrete, passing=passing, source=name)
        self.emit(Statement("assign", [variable], [self.text(value, frame)]), frame)
        return Value(value.concrete, variable.ref())

    def _Call(self, node: ast.Call, frame: Frame) -> Value:
        return self.call(node, frame)

    def _Constant(self, node: ast.Constant, frame: Frame) -> Value:
        return known(node.value)

    def _Name(self, node: ast.Name, frame: Frame) -> Value:
        if node.id in frame.env:
            return frame.env[node.id]
        there = frame.scope if node.id in frame.scope else vars(builtins)
        concrete = there[node.id]
        # a module or a function of torch keeps the name under which the source knows it
        foreign = callable(concrete) or type(concrete).__name__ == "module"
        return Value(concrete, ast.Name(node.id, ast.Load()) if foreign else None, known=True)

    def _Attribute(self, node: ast.Attribute, frame: Frame) -> Value:
        owner = self.resolve(node.value, frame)
        if owner.fields and isinstance(owner.parts, list):
            return owner.parts[owner.fields.index(node.attr)]
        concrete = getattr(owner.concrete, node.attr)
        if isinstance(owner.concrete, nn.Module):
            if isinstance(concrete, Tensor):
                return Value(concrete, attribute(self.text(owner, frame), node.attr))
            return known(concrete)
        if not owner.known or type(owner.concrete).__name__ == "module":
            code = attribute(self.text(owner, frame), node.attr)
            return Value(concrete, code, known=owner.known)
        return known(concrete)

    def _Tuple(self, node: ast.Tuple | ast.List, frame: Frame) -> Value:
        parts: list[Value] = []
        for part in node.elts:
            if isinstance(part, ast.Starred):
                parts += self.unpacked(self.resolve(part.value, frame), frame)
            else:
                parts.append(self.resolve(part, frame))
        return tuple_of(parts)

    def _List(self, node: ast.List, frame: Frame) -> Value:
        made = self._Tuple(node, frame)
        assert made.known, "a list of what is not known"
        return known(list(made.concrete))

    def unpacked(self, value: Value, frame: Frame) -> list[Value]:
        """The parts of a tuple, for ``*value``."""
        parts = parts_of(value)
        if parts is not None:
            return parts
        assert isinstance(value.node, Ref), "only a variable is unpacked into arguments"
        names = value.node.variable.hint.split()
        variables = [
            Variable(name, concrete, source=name)
            for name, concrete in zip(names, value.concrete, strict=True)
        ]
        for statement in frame.block:  # once is enough
            if statement.kind == "assign" and statement.parts[0] is value.node.variable.unpacking:
                there = (t for t in statement.targets if isinstance(t, Variable))
                return [Value(variable.concrete, variable.ref()) for variable in there]
        use = value.node.variable.ref()
        value.node.variable.unpacking = use
        self.emit(Statement("assign", list(variables), [use]), frame)
        return [Value(variable.concrete, variable.ref()) for variable in variables]

    def _Set(self, node: ast.Set, frame: Frame) -> Value:
        return known({self.resolve(part, frame).concrete for part in node.elts})

    def _Dict(self, node: ast.Dict, frame: Frame) -> Value:
        pairs = {
            self.resolve(key, frame).concrete: self.resolve(value, frame)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
        return Value({key: part.concrete for key, part in pairs.items()}, parts=pairs)

    def _comprehended(self, node: Any, frame: Frame) -> list[tuple[Value, ...]]:
        """The elements of a comprehension over something known, one after the other."""
        (loop,) = node.generators
        assert not loop.ifs, "a comprehension with a condition"
        found = []
        inner = Frame({**frame.env}, frame.scope, frame.block, me=frame.me, owner=frame.owner)
        for each in parts_of(known(list(self.resolve(loop.iter, frame).concrete))) or ():
            inner.env[loop.target.id] = each
            parts = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
            found.append(tuple(self.resolve(part, inner) for part in parts))
        return found

    def _DictComp(self, node: ast.DictComp, frame: Frame) -> Value:
        pairs = {
            key.concrete: self.bound(value, "value", frame)
            for key, value in self._comprehended(node, frame)
        }
        return Value({key: part.concrete for key, part in pairs.items()}, parts=pairs)

    def _SetComp(self, node: ast.SetComp, frame: Frame) -> Value:
        return known({element.concrete for (element,) in self._comprehended(node, frame)})

    def _GeneratorExp(self, node: ast.GeneratorExp, frame: Frame) -> Value:
        (loop,) = node.generators
        over = self.resolve(loop.iter, frame)
        element = self.resolve(node.elt, frame)
        count = ast.Call(ast.Name("range", ast.Load()), [literal(len(over.concrete))], [])
        loops = [ast.comprehension(ast.Name("_", ast.Store()), count, [], 0)]
        return Value(None, ast.GeneratorExp(self.text(element, frame), loops))

    def _ListComp(self, node: ast.ListComp, frame: Frame) -> Value:
        """A list made of tensors side by side, in a ``zip``: its element is written once."""
        (loop,) = node.generators
        assert isinstance(loop.iter, ast.Call) and isinstance(loop.target, ast.Tuple)
        over = [self.resolve(each, frame) for each in loop.iter.args]
        inner = Frame({**frame.env}, frame.scope, frame.block, me=frame.me, owner=frame.owner)
        for target, value in zip(loop.target.elts, over, strict=True):
            assert isinstance(target, ast.Name)
            inner.env[target.id] = Value(value.concrete[0], ast.Name(target.id, ast.Load()))
        element = self.resolve(node.elt, inner)
        zipped = ast.Call(
            loop.iter.func, [self.text(value, frame) for value in over], loop.iter.keywords
        )
        text = ast.ListComp(
            self.text(element, inner), [ast.comprehension(loop.target, zipped, [], 0)]
        )
        return Value([element.concrete] * len(over[0].concrete), text)

    def _operation(
        self, op: ast.AST, values: list[Value], code: Callable[..., ast.expr], frame: Frame
    ) -> Value:
        """A value computed of others: a number where they are, unless one has a name to show."""
        concrete = _OPERATIONS[type(op)](*(value.concrete for value in values))
        settled = all(value.known for value in values)
        spoken = any(value.node is not None for value in values)
        root = isinstance(op, ast.Pow) and isinstance(concrete, float)  # 64**-0.5 says more
        if settled and not spoken and not root:
            return known(concrete)
        return Value(concrete, code(*(self.text(value, frame) for value in values)), settled)

    def _BinOp(self, node: ast.BinOp, frame: Frame) -> Value:
        left, right = self.resolve(node.left, frame), self.resolve(node.right, frame)
        if isinstance(left.parts, dict) and isinstance(right.parts, dict):
            parts = {**left.parts, **right.parts}
            return Value({**left.concrete, **right.concrete}, parts=parts)
        if isinstance(node.op, ast.Mult) and _is_one(right) and isinstance(left.concrete, Tensor):
            return left
        if isinstance(left.concrete, list) and left.known and right.known:
            sides = self.text(left, frame), self.text(right, frame)
            return Value(
                left.concrete * right.concrete, ast.BinOp(sides[0], node.op, sides[1]), True
            )
        return self._operation(node.op, [left, right], lambda a, b: ast.BinOp(a, node.op, b), frame)

    def _UnaryOp(self, node: ast.UnaryOp, frame: Frame) -> Value:
        value = self.resolve(node.operand, frame)
        return self._operation(node.op, [value], lambda a: ast.UnaryOp(node.op, a), frame)

    def _Compare(self, node: ast.Compare, frame: Frame) -> Value:
        left, right = self.resolve(node.left, frame), self.resolve(node.comparators[0], frame)
        assert len(node.ops) == 1, "one comparison at a time"
        (op,) = node.ops
        if isinstance(op, ast.Is | ast.IsNot) and not left.optional:
            return known(_OPERATIONS[type(op)](left.concrete, right.concrete))
        if left.known and right.known:
            return known(_OPERATIONS[type(op)](left.concrete, right.concrete))
        return self._operation(op, [left, right], lambda a, b: ast.Compare(a, [op], [b]), frame)

    def _BoolOp(self, node: ast.BoolOp, frame: Frame) -> Value:
        ends = isinstance(node.op, ast.Or)  # an `or` ends with what is true
        left: list[Value] = []
        for place, part in enumerate(node.values):
            value = self.resolve(part, frame)
            truth = self.truth(value)
            if truth is None or (place == len(node.values) - 1 and not left):
                left.append(value)
            elif truth == ends:
                return value if not left else self._joined(node, [*left, value], frame)
        return left[0] if len(left) == 1 else self._joined(node, left, frame)

    def _joined(self, node: ast.BoolOp, values: list[Value], frame: Frame) -> Value:
        code = ast.BoolOp(node.op, [self.text(value, frame) for value in values])
        return Value(values[-1].concrete, code)

    def truth(self, value: Value) -> bool | None:
        """What a test decides; None where that depends on the run."""
        if value.known:
            return bool(value.concrete)
        return bool(value.parts) if value.parts is not None else None

    def _IfExp(self, node: ast.IfExp, frame: Frame) -> Value:
        test = self.resolve(node.test, frame)
        truth = self.truth(test)
        if truth is not None:
            return self.resolve(node.body if truth else node.orelse, frame)
        body, orelse = self.resolve(node.body, frame), self.resolve(node.orelse, frame)
        sides = self.text(body, frame), self.text(orelse, frame)
        return Value(body.concrete, ast.IfExp(self.text(test, frame), *sides))

    def _Subscript(self, node: ast.Subscript, frame: Frame) -> Value:
        value, key = self.resolve(node.value, frame), self.resolve(node.slice, frame)
        if isinstance(value.parts, dict):
            return value.parts[key.concrete] if key.known else self.select(value.parts, key, frame)
        if isinstance(value.parts, list) and key.known:
            return value.parts[key.concrete]
        concrete = value.concrete[key.concrete]
        if value.known and key.known and (value.node is None):
            return known(concrete)
        if isinstance(value.concrete, torch.Size) and key.known and self.fixed_shapes:
            sizes = concrete if isinstance(concrete, tuple) else (concrete,)
            if not {BATCH, TOKENS} & set(sizes):
                return known(tuple(concrete) if isinstance(concrete, tuple) else concrete)
        code = ast.Subscript(self.text(value, frame), self._index(node.slice, frame), ast.Load())
        return Value(concrete, code)

    def _index(self, node: ast.expr, frame: Frame) -> ast.expr:
        if isinstance(node, ast.Tuple):
            return ast.Tuple([self._index(part, frame) for part in node.elts], ast.Load())
        if isinstance(node, ast.Slice):
            ends = (node.lower, node.upper)
            return ast.Slice(*(end and self.text(self.resolve(end, frame), frame) for end in ends))
        return self.text(self.resolve(node, frame), frame)

    def _Slice(self, node: ast.Slice, frame: Frame) -> Value:
        ends = [
            known(None) if end is None else self.resolve(end, frame)
            for end in (node.lower, node.upper)
        ]
        concrete = slice(*(end.concrete for end in ends))
        return (
            Value(concrete, None if all(e.known for e in ends) else node, known=False)
            if not all(end.known for end in ends)
            else known(concrete)
        )

    def _JoinedStr(self, node: ast.JoinedStr, frame: Frame) -> Value:
        pieces: list[ast.expr] = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                value = self.resolve(part.value, frame)
                if value.known:
                    pieces.append(ast.Constant(format(value.concrete)))
                else:
                    pieces.append(ast.FormattedValue(self.text(value, frame), -1))
            else:
                pieces.append(part)
        return Value("", ast.JoinedStr(pieces))


def _is_own(node: ast.expr | None, passing: bool) -> bool:
    """Whether it is ``self.weight``, which needs no second name; `passing`: or ``x.dtype``."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
        return False
    return passing or node.value.id == "self"


def _is_one(value: Value) -> bool:
    number = isinstance(value.concrete, int | float) and not isinstance(value.concrete, bool)
    return value.known and number and value.concrete == 1
