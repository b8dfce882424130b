"""Resolved code made short: without unused values and without names for other names."""

from __future__ import annotations

import ast

from pellucid.source.printer import WIDTH, headline, written
from pellucid.source.statements import (
    Block,
    Ref,
    Statement,
    Variable,
    each,
    refs,
    replace_uses,
    uses,
    without_dead,
)

BRIEF = 86  # how long a line may become by taking in the one before it


def tidy(block: Block) -> None:
    """Take out unused values, and put a value that is used once where it is used."""
    without_dead(block)
    if len(block) > 1 and block[-1].kind == "return" and isinstance(block[-1].parts[0], ast.Tuple):
        made = [part.variable for part in block[-1].parts[0].elts if isinstance(part, Ref)]
        if made == block[-2].targets and len(block[-2].parts) == len(made):
            block[-1].parts = [ast.Tuple(block.pop(-2).parts, ast.Load())]
    for where, statement in each(block):
        if statement.kind != "assign" or len(statement.targets) != 1:
            continue
        (variable,) = statement.targets
        if not isinstance(variable, Variable) or uses(block).get(variable) != 1:
            continue
        after = where[where.index(statement) + 1 :]
        user = next((s for s in after if _reads(s, variable)), None)
        last = user is not None and user.kind == "return" and isinstance(user.parts[0], Ref)
        brief = (
            user is not None
            and not variable.named
            and user is after[0]
            and not _indexed(after[0], variable)
        )
        if user is None or not (variable.passing or last or brief):
            continue
        (code,) = statement.parts
        wider = len(written(code, 10)) - len(variable.name)
        most = WIDTH - 12 if variable.passing or last else BRIEF
        if len(headline(user)) + wider + len(user.comment or variable.name) > most:
            continue
        replace_uses(where, variable, code)
        if last:
            own = [variable.name] if variable.named and not user.comment else []
            user.comment = user.comment or " ".join([*own, statement.comment]).strip()
        where.remove(statement)


def _indexed(statement: Statement, variable: Variable) -> bool:
    """Whether a statement takes a part of a variable, or reads an attribute or method of it."""
    return any(
        isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.value, Ref)
        and node.value.variable is variable
        for part in statement.parts
        for node in ast.walk(part)
    )  # fmt: skip


def _reads(statement: Statement, variable: Variable) -> bool:
    return any(ref.variable is variable for part in statement.parts for ref in refs(part))
