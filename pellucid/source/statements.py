"""What resolved code is made of: variables whose names may still change, and statements."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Block = list["Statement"]


@dataclass(eq=False)
class Variable:
    """A name of the resolved code.

    named    it has the name of a traced tensor, which no later name replaces
    passing  made up while resolving: it goes where its one use can hold its expression
    optional may be None in a run, so that ``is None`` is not decided
    """

    name: str
    concrete: Any
    named: bool = False
    passing: bool = False
    optional: bool = False
    annotation: str = "Tensor"
    source: str = ""  # its name in the source, where a trace's name has replaced it
    hint: str = ""  # names of its parts, where it is unpacked
    shape: str = ""  # of a named tensor, with the sizes of this model
    unpacking: ast.expr | None = None  # the use of it that unpacks it

    def ref(self) -> Ref:
        """A use of it."""
        return Ref(self)


class Ref(ast.Name):
    """A use of a variable, printed as the name it then has."""

    def __init__(self, variable: Variable) -> None:
        super().__init__(id="", ctx=ast.Load())
        self.variable = variable


@dataclass(eq=False)
class Statement:
    """One statement; `kind` is assign, if, for, return, do or raise.

    targets  of an assignment or a loop: a variable, or ``self.name`` as text
    parts    expressions: of an assignment one, or one for each target; a test; what is iterated
    body     of an if or a loop; `orelse` of an if
    """

    kind: str
    targets: list[Variable | str] = field(default_factory=list)
    parts: list[ast.expr] = field(default_factory=list)
    comment: str = ""
    body: Block = field(default_factory=list)
    orelse: Block = field(default_factory=list)


def each(block: Block) -> Iterator[tuple[Block, Statement]]:
    """Every statement with the block it stands in, in the order of the text."""
    for statement in list(block):
        yield block, statement
        yield from each(statement.body)
        yield from each(statement.orelse)


def refs(node: ast.AST) -> Iterator[Ref]:
    """The uses of variables in an expression."""
    return (part for part in ast.walk(node) if isinstance(part, Ref))


def uses(block: Block) -> dict[Variable, int]:
    """How often each variable is used."""
    found: dict[Variable, int] = {}
    for _, statement in each(block):
        for part in statement.parts:
            for ref in refs(part):
                found[ref.variable] = found.get(ref.variable, 0) + 1
    return found


def replace_uses(block: Block, old: Variable, new: ast.expr) -> None:
    """Put `new` wherever `old` is used."""

    class Put(ast.NodeTransformer):
        def visit_Ref(self, node: Ref) -> ast.expr:
            return new if node.variable is old else node

    for _, statement in each(block):
        statement.parts = [Put().visit(part) for part in statement.parts]


def without_dead(block: Block) -> None:
    """Take out assignments whose values are not used."""
    while True:
        counted = uses(block)
        dead = [
            (where, statement)
            for where, statement in each(block)
            if statement.kind == "assign"
            and all(isinstance(t, Variable) and not counted.get(t) for t in statement.targets)
        ]
        if not dead:
            return
        for where, statement in dead:
            where.remove(statement)


def name_apart(block: Block, taken: list[Variable]) -> None:
    """Give variables that live at the same time different names.

    `taken` are the parameters. A name may be taken again once its variable has no use left.
    """
    last: dict[Variable, int] = {}
    first: dict[Variable, int] = dict.fromkeys(taken, -1)
    for place, (_, statement) in enumerate(each(block)):
        for part in statement.parts:
            for ref in refs(part):
                last[ref.variable] = place
        for target in statement.targets:
            if isinstance(target, Variable):
                first.setdefault(target, place)
    order = sorted(first, key=lambda variable: first[variable])
    for number, variable in enumerate(order):
        while any(
            other.name == variable.name and last.get(other, -1) > first[variable]
            for other in order[:number]
        ):
            variable.name += "_"
