"""Resolved code as text, in the form that ``ruff format`` leaves alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import torch

from pellucid.source.statements import Block, Ref, Statement, Variable

WIDTH = 100
_BINARY = {
    ast.BitOr: ("|", 6), ast.BitXor: ("^", 7), ast.BitAnd: ("&", 8), ast.Add: ("+", 10),
    ast.Sub: ("-", 10), ast.Mult: ("*", 11), ast.Div: ("/", 11), ast.FloorDiv: ("//", 11),
    ast.Mod: ("%", 11), ast.MatMult: ("@", 11), ast.Pow: ("**", 14),
}  # fmt: skip
_UNARY = {ast.USub: ("-", 13), ast.Invert: ("~", 13), ast.Not: ("not ", 4), ast.UAdd: ("+", 13)}
_COMPARED = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip
_COMPARE, _ATOM, _CHOICE, _TUPLE = 5, 20, 1, 0


def written(node: ast.expr, least: int = _CHOICE) -> str:
    """An expression in one line, in parentheses where it binds less than `least`."""
    text, binds = _form(node)
    return text if binds >= least else f"({text})"


def _form(node: ast.expr) -> tuple[str, int]:
    """Text of an expression, and how tightly it binds."""
    match node:
        case Ref():
            return node.variable.name, _ATOM
        case ast.Name():
            return node.id, _ATOM
        case ast.Constant():
            negative = isinstance(node.value, int | float) and node.value < 0
            return _constant(node.value), 13 if negative else _ATOM
        case ast.Attribute():
            return f"{written(node.value, _ATOM)}.{node.attr}", _ATOM
        case ast.Call():
            parts = [*map(written, node.args), *(_keyword(word) for word in node.keywords)]
            return f"{written(node.func, _ATOM)}({', '.join(parts)})", _ATOM
        case ast.Subscript():
            inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            comma = "," if isinstance(node.slice, ast.Tuple) and len(inside) == 1 else ""
            return f"{written(node.value, _ATOM)}[{', '.join(map(written, inside))}{comma}]", _ATOM
        case ast.Slice():
            return _slice(node), _CHOICE
        case ast.Starred():
            return f"*{written(node.value, 6)}", _CHOICE
        case ast.BinOp() | ast.UnaryOp() | ast.BoolOp() | ast.Compare():
            return _operation(node)
        case ast.IfExp():
            parts = (written(part, 2) for part in (node.body, node.test))
            body, test = parts
            return f"{body} if {test} else {written(node.orelse)}", _CHOICE
        case ast.Tuple():
            parts = ", ".join(map(written, node.elts))
            return (parts + "," if len(node.elts) == 1 else parts), _TUPLE
        case _:
            return _container(node), _ATOM


def _operation(node: ast.expr) -> tuple[str, int]:
    if isinstance(node, ast.UnaryOp):
        sign, binds = _UNARY[type(node.op)]
        return sign + written(node.operand, binds), binds
    if isinstance(node, ast.BoolOp):
        word, binds = (" and ", 3) if isinstance(node.op, ast.And) else (" or ", 2)
        return word.join(written(value, binds + 1) for value in node.values), binds
    if isinstance(node, ast.Compare):
        signs = (_COMPARED[type(op)] for op in node.ops)
        right = (written(value, _COMPARE + 1) for value in node.comparators)
        pairs = " ".join(f"{sign} {value}" for sign, value in zip(signs, right, strict=True))
        return f"{written(node.left, _COMPARE + 1)} {pairs}", _COMPARE
    assert isinstance(node, ast.BinOp), ast.dump(node)
    sign, binds = _BINARY[type(node.op)]
    if sign == "**":
        left, right = written(node.left, binds + 1), written(node.right, 13)
        simple = _simple(node.left) and _simple(node.right)
        return (f"{left}**{right}" if simple else f"{left} ** {right}"), binds
    return f"{written(node.left, binds)} {sign} {written(node.right, binds + 1)}", binds


def _simple(node: ast.expr) -> bool:
    """Whether ``**`` stands close to it: a name, a number, an attribute of a name."""
    if isinstance(node, ast.UnaryOp):
        return _simple(node.operand)
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name | ast.Constant)


def _slice(node: ast.Slice) -> str:
    parts = [node.lower, node.upper]
    texts = ["" if part is None else written(part) for part in parts]
    wide = any(
        part is not None and not (isinstance(part, ast.Name | ast.Constant) or _signed(part))
        for part in parts
    )
    left, right = texts
    colon = ":" if not wide else f"{' ' if left else ''}:{' ' if right else ''}"
    return f"{left}{colon}{right}"


def _signed(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Name | ast.Constant)


def _keyword(word: ast.keyword) -> str:
    return f"{word.arg}={written(word.value)}" if word.arg else f"**{written(word.value, 6)}"


def _container(node: ast.expr) -> str:
    if isinstance(node, ast.List):
        return f"[{', '.join(map(written, node.elts))}]"
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        inside = (f"{written(key)}: {written(value)}" for key, value in pairs if key is not None)
        return "{" + ", ".join(inside) + "}"
    if isinstance(node, ast.GeneratorExp | ast.ListComp):
        (loop,) = node.generators
        target = written(loop.target).strip("()")
        text = f"{written(node.elt)} for {target} in {written(loop.iter)}"
        return f"[{text}]" if isinstance(node, ast.ListComp) else text
    if isinstance(node, ast.JoinedStr):
        return 'f"' + "".join(_piece(value) for value in node.values) + '"'
    raise AssertionError(f"no way to print {ast.dump(node)}")


def _piece(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value).replace("{", "{{").replace("}", "}}")
    assert isinstance(node, ast.FormattedValue), ast.dump(node)
    return "{" + written(node.value) + "}"


def _constant(value: object) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    return "..." if value is ... else repr(value)


# ── Statements ────────────────────────────────────────────────────────────────────────────────────


def lines_of(block: Block, indent: int = 0) -> Iterator[str]:
    """The lines of a block, none wider than `WIDTH` where it can be broken."""
    for statement in block:
        yield from _lines(statement, " " * indent)
        yield from lines_of(statement.body, indent + 4)
        if statement.orelse:
            yield " " * indent + "else:"
            yield from lines_of(statement.orelse, indent + 4)


def headline(statement: Statement) -> str:
    """A statement in one line, without its body."""
    targets = ", ".join(t.name if isinstance(t, Variable) else t for t in statement.targets)
    whole = ", ".join(written(part) for part in statement.parts)
    if len(statement.parts) == 1 and isinstance(statement.parts[0], ast.Tuple):
        whole = _form(statement.parts[0])[0]
    match statement.kind:
        case "assign":
            return f"{targets} = {whole}"
        case "if":
            return f"if {whole}:"
        case "for":
            return f"for {targets} in {whole}:"
        case "do":
            return whole
        case word:
            return f"{word} {whole}"


def _lines(statement: Statement, margin: str) -> Iterator[str]:
    text = margin + headline(statement)
    comment = f"  # {statement.comment}" if statement.comment else ""
    if len(text + comment) <= WIDTH:
        yield text + comment
        return
    if comment and len(text) <= WIDTH:
        yield f"{margin}# {statement.comment}"
        yield text
        return
    if comment:
        yield f"{margin}# {statement.comment}"
    yield from broken(text, margin)


def broken(text: str, margin: str) -> Iterator[str]:
    """A line too long, opened at its last pair of brackets."""
    opened = _last_pair(text)
    if opened is None:
        yield text
        return
    begin, end = opened
    inside = text[begin + 1 : end]
    yield text[: begin + 1]
    whole = f"{margin}    {inside}"
    parts = split_at_commas(inside)
    if len(whole) <= WIDTH and not (len(parts) > 1 and text[begin - 1] in "( =[{,"):
        yield whole
    else:
        for part in parts:
            line = f"{margin}    {part}"
            only = len(parts) == 1 and " for " in part
            if len(line) + 1 > WIDTH:
                *lines, last = broken(line, margin + "    ")
                yield from lines
                yield last + ("" if only else ",")
            else:
                yield line + ("" if only else ",")
    yield margin + text[end:]


def _last_pair(text: str) -> tuple[int, int] | None:
    """Places of the last outermost bracket that is closed, and of what closes it."""
    depth, found, begin, quoted = 0, None, 0, ""
    for place, sign in enumerate(text):
        if quoted:
            quoted = "" if sign == quoted else quoted
        elif sign == '"':
            quoted = sign
        elif sign in "([{":
            begin = place if not depth else begin
            depth += 1
        elif sign in ")]}":
            depth -= 1
            if not depth and place > begin + 1:
                found = begin, place
    return found


def split_at_commas(text: str) -> list[str]:
    """The parts of an argument list."""
    parts, depth, begin, quoted = [], 0, 0, False
    for place, sign in enumerate(text):
        quoted ^= sign == '"'
        if quoted:
            continue
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            parts.append(text[begin:place].strip())
            begin = place + 1
    last = text[begin:].strip()
    return [*parts, last] if last else parts
