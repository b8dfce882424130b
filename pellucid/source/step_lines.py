"""The lines of a resolved file that compute a step of the walk."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from textwrap import dedent

from pellucid import graph, names
from pellucid.models import Config
from pellucid.source.text import forward_text

_PREFIXES = {
    "Decoder": "", "Block": "layers.N.", "Attention": "layers.N.attn.", "MLP": "layers.N.mlp.",
    "GatedMLP": "layers.N.mlp.", "rope": "rope.", "second_rope": "second_rope.",
}  # fmt: skip
# A step of the walk alone -> the tensor that it leads to, of those that the model has.
_LEADS_TO = (
    (r"_norm\.\w+$", "_norm"),
    (r"\.w([qkv])_heads?$", r".\1"),
    (r"\.([qk])_(pairs|complex|turned|turned_pairs)$", r".\1_rotated"),
    (r"\.([qk])_(side_by_side(_rotated)?|mean_square)$", r".\1_normed"),
    (r"\.scores_and_sink$", ".pattern"),
    (r"\.z_side_by_side$", ".out"),
    (r"attn\.out$", "attn_out"),
    (r"mlp\.inner$", "mlp.act"),
    (r"rope\.(exponents|frequencies|scaled_frequencies|divisors)$", "rope.angles"),
    (r"rope\.cis$", "rope.cos"),
    (r"^embed_at_position$", "embed_normed"),
    (r"^embed_normed$", "embed_scaled"),
)
_BEGINS = "layers.0.resid_pre"  # the stream; in the file it is `x` ahead of the loop


@dataclass(eq=False)
class _Scope:
    """A class's forward, or a function: its statements, and those of ``__init__``."""

    body: list[ast.stmt]
    init: list[ast.stmt]


class StepLines:
    """Finds the lines of ``pellucid code`` for the steps of a walk; resolves when first asked.

    config, dialect  as for `pellucid.source.file_text`; the model may be one that has no file
    """

    def __init__(self, config: Config, dialect: str) -> None:
        self.config, self.dialect = config, dialect
        self._found: dict[str, list[list[str]]] = {}

    def lines(self, name: str, most: int | None = None) -> list[str]:
        """Lines that compute tensor `name`, without the file's indentation; none for the prompt.

        most  of them, though never fewer than the statement itself has; None: all

        Its statement stands behind what only leads to it and ahead of what it calls. A step that
        the file has no name for, such as a row of pairs, has the lines of the tensor it leads to.
        """
        key = name if name == _BEGINS and name in self._homes else names.general(name)
        if key not in self._found:
            self._found[key] = self._written(key)
        before, own, called = self._found[key]
        if most is not None:
            room = max(0, most - len(own))
            before = before[len(before) - min(room, len(before)) :]
            called = called[len(called) - min(room, len(called)) :]
        return [*before, *own, *called]

    @cached_property
    def _text(self) -> list[str]:
        return forward_text(self.config, self.dialect).splitlines()

    @cached_property
    def _scopes(self) -> dict[str, _Scope]:
        found = {}
        for part in ast.parse("\n".join(self._text)).body:
            if isinstance(part, ast.FunctionDef):
                found[part.name] = _Scope(part.body, [])
            elif isinstance(part, ast.ClassDef):
                methods = {m.name: m.body for m in part.body if isinstance(m, ast.FunctionDef)}
                if "forward" in methods:
                    found[part.name] = _Scope(methods["forward"], methods.get("__init__", []))
        return found

    @cached_property
    def _homes(self) -> dict[str, tuple[_Scope, ast.stmt]]:
        """Name of a tensor, with N for the layer -> its statement: the first that makes it."""
        found: dict[str, tuple[_Scope, ast.stmt]] = {}
        for name, prefix in _PREFIXES.items():
            if name not in self._scopes:
                continue
            scope = self._scopes[name]
            for statement in _each(scope.body):
                for leaf in self._names(statement):
                    found.setdefault(prefix + leaf, (scope, statement))
            if prefix.endswith("rope."):
                found.setdefault(f"{prefix}cos", (scope, scope.body[-1]))
            for statement in scope.init:
                for leaf in _modules(statement):
                    found.setdefault(f"{prefix}{leaf}.weight", (scope, statement))
        decoder = self._scopes["Decoder"]
        ahead = [s for s in decoder.body if isinstance(s, ast.Assign) and "x" in _made(s)]
        found[_BEGINS] = decoder, ahead[-1]
        greedy = next(s for s in _each(self._scopes["generate"].body) if "token" in _made(s))
        found["next_token"] = _Scope([], []), greedy
        return found

    def _names(self, statement: ast.stmt) -> list[str]:
        """What a statement makes: its variables, and the tensor that its comment names."""
        said = self._text[statement.lineno - 1].partition("  # ")[2].split(" ")
        last = self._text[(statement.end_lineno or statement.lineno) - 1].partition("  # ")[2]
        return [*_made(statement), *said[:1], *last.split(" ")[:1]]

    def _home(self, name: str) -> tuple[_Scope, ast.stmt] | None:
        while name not in self._homes:
            further = (re.sub(pattern, after, name) for pattern, after in _LEADS_TO)
            following = next((one for one in further if one != name), None)
            if following is None:
                return None
            name = following
        return self._homes[name]

    def _written(self, name: str) -> list[list[str]]:
        """Lines before the statement of a tensor, its own, and those of what it calls."""
        home = self._home(name)
        if home is None:
            return [[], [], []]
        scope, statement = home
        called = self._called(statement)
        before = [] if called else self._leading(scope, statement)
        return [
            [line for each in statements for line in self._lines_of(each)]
            for statements in (before, [statement], called)
        ]

    def _leading(self, scope: _Scope, statement: ast.stmt) -> list[ast.stmt]:
        """What makes the variables that a statement reads and the trace has no name for.

        ``k`` of the scores is no traced k: the heads of the keys were repeated meanwhile.
        """
        found: list[ast.stmt] = []
        waiting = [statement]
        while waiting:
            reader = waiting.pop()
            before = [s for s in _each(scope.body) if s.lineno < reader.lineno]
            for name in _read(reader):
                maker = next((s for s in reversed(before) if name in _made(s)), None)
                if maker and maker not in found and self._is_between(maker):
                    found.append(maker)
                    waiting.append(maker)
        return sorted(found, key=lambda each: each.lineno)

    def _is_between(self, statement: ast.stmt) -> bool:
        """Whether it makes no tensor of the trace, and is not about earlier tokens."""
        of_cache = any(isinstance(n, ast.Name) and n.id == "cache" for n in ast.walk(statement))
        return not of_cache and not any(
            home is statement and (graph.known(name) or name.endswith("rope.angles"))
            for name, (_, home) in self._homes.items()
        )

    def _called(self, statement: ast.stmt) -> list[ast.stmt]:
        """What a statement calls: the whole of a norm or function, the end of a larger module."""
        for node in ast.walk(statement):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in self._scopes:
                return _code(self._scopes[node.func.id])
            if isinstance(node.func, ast.Attribute):
                kind = self._kind_of(node.func.attr)
                if kind:
                    body = _code(self._scopes[kind])
                    return body[-1:] if kind in _PREFIXES else body
        return []

    def _kind_of(self, module: str) -> str | None:
        """The class of a module by its name, of those in the file."""
        for scope in self._scopes.values():
            for statement in scope.init:
                value = statement.value if isinstance(statement, ast.Assign) else None
                if module in _modules(statement) and isinstance(value, ast.Call):
                    kind = value.func
                    return kind.id if isinstance(kind, ast.Name) else None
        return None

    def _lines_of(self, statement: ast.stmt) -> list[str]:
        lines = self._text[statement.lineno - 1 : statement.end_lineno]
        return dedent("\n".join(lines)).splitlines()


def _each(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Assignments and returns, in order, those inside loops and branches too."""
    for statement in body:
        if isinstance(statement, ast.For | ast.If):  # a branch where layers differ
            yield from _each(statement.body)
        elif isinstance(statement, ast.Assign | ast.Return):
            yield statement


def _made(statement: ast.stmt) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def _modules(statement: ast.stmt) -> list[str]:
    """``self.attn = Attention()``: attn."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [t.attr for t in targets if isinstance(t, ast.Attribute)]


def _code(scope: _Scope) -> list[ast.stmt]:
    """Its statements without the docstring."""
    return [s for s in scope.body if not isinstance(s, ast.Expr)]


def _read(statement: ast.stmt) -> list[str]:
    """Variables that it reads for more than their dtype or place."""
    about = {
        id(node.value)
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and node.attr in ("dtype", "device")
    }
    return [
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in about
    ]
