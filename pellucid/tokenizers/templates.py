"""Chat templates: programs in Jinja that come with a checkpoint, and are not to be trusted.

They run in Jinja's sandbox with the helpers that transformers gives them, for which templates are
written. Two things are added. What they write is marked (`marked.py`): their own words apart from
those of messages. And they have a budget: a template that counts to 10^12 or writes a gigabyte is
refused in time.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pellucid.tokenizers.marked import Marked, joined

MOST_STEPS = 1_000_000  # calls, operations and turns of loops
MOST_CHARACTERS = 8_000_000  # of any one text, beside four times what the messages hold
MOST_SECONDS = 10.0  # of this thread's work, whatever else the machine does
_WIDEST = 100_000  # of a filter's or a format's width
_MOST_BITS = 4096  # of a whole number
_WIDTH = re.compile(r"\d{5,}|\*|:[^{}]*\{")
_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs")


class Exhausted(jinja2.TemplateError):
    """A template took more than its budget."""


class Budget:
    """What one rendering may still take. `characters` is the limit for one text."""

    def __init__(self, characters: int) -> None:
        self.characters = characters
        self._steps = 0
        self._end = time.thread_time() + MOST_SECONDS

    def charge(self, steps: int = 1) -> None:
        """Take so many steps; Exhausted where that is too much, or the time is over."""
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise Exhausted(f"it takes more than {MOST_STEPS:,} steps")
        if time.thread_time() > self._end:
            raise Exhausted(f"it takes longer than {MOST_SECONDS:g} s")

    def room(self, characters: int) -> None:
        """Exhausted for a text (or list) that is too long."""
        if characters > self.characters:
            raise Exhausted(f"it makes a text of more than {self.characters:,} characters")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates whose every operation is charged and whose texts are marked."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self._local = threading.local()  # a server renders in several threads
        self.concat = self.joined  # of what a template, macro or block writes
        self.filters["tojson"] = _to_json
        self.filters["safe"] = lambda value: value  # for HTML, which this is not
        self.filters["join"] = _join
        self.filters = {name: self._guarded(filter) for name, filter in self.filters.items()}
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _now

    def write(self, template: jinja2.Template, values: Mapping[str, Any], given: int) -> Marked:
        """What `template` writes with `values`, whose texts have `given` characters together."""
        self._local.budget = Budget(MOST_CHARACTERS + 4 * given)
        return Marked(template.render(values))

    @property
    def budget(self) -> Budget:
        """That of the rendering this thread is in."""
        return self._local.budget

    # What compiled templates call (`_Watched`) ----------------------------------------------------

    def own(self, text: str) -> Marked:
        """A constant of the template."""
        return Marked.own(text)

    def joined(self, texts: Iterable[Any]) -> Marked:
        """Texts one after the other."""
        pieces = []
        length = 0
        for piece in texts:
            pieces.append(str(piece))
            length += len(pieces[-1])
            self.budget.charge()
            self.budget.room(length)
        return joined(pieces)

    def concatenated(self, *values: Any) -> Marked:
        """Jinja's ``~``."""
        return self.joined(values)

    def counted(self, values: Any) -> Any:
        """What a loop runs over; each turn is a step."""
        if isinstance(values, Sequence | Mapping | set | jinja2.Undefined):
            self.budget.charge(len(values))
            return values
        found = []
        for value in values:
            self.budget.charge()
            found.append(value)
        return found

    # What Jinja calls -----------------------------------------------------------------------------

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watched().visit(super()._parse(source, name, filename))

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.budget.charge()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            self._check_method(owner, name, args)
        return super().call(__context, __obj, *args, **kwargs)

    def _check_method(self, text: str, name: str, given: Sequence[Any]) -> None:
        if name in _PADDING and any(isinstance(value, int) and value > _WIDEST for value in given):
            raise Exhausted(f"it pads a text to more than {_WIDEST:,} characters")
        if name == "replace" and len(given) >= 2 and all(isinstance(v, str) for v in given[:2]):
            old, new = given[:2]
            self.budget.room(len(text) + text.count(old) * max(0, len(new) - len(old)))
        if name == "join" and given and isinstance(given[0], Sequence):
            self.check_join(text, given[0])

    def check_join(self, between: str, texts: Sequence[Any]) -> None:
        """Exhausted where texts with another between them are too long."""
        held = sum(len(text) for text in texts if isinstance(text, str))
        self.budget.room(held + len(between) * len(texts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.charge()
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            needed = sum(bits) if operator == "*" else bits[0] * min(abs(right), _MOST_BITS + 1)
            if needed > _MOST_BITS:
                raise Exhausted(f"it makes a number of more than {_MOST_BITS:,} bits")
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, Sequence) and isinstance(times, int):
                    self.budget.room(len(many) * max(times, 0))
        elif operator == "+" and isinstance(left, Sequence) and isinstance(right, Sequence):
            self.budget.room(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        made = super().wrap_str_format(value)
        text = getattr(value, "__self__", None)
        if made is None or not isinstance(text, str):
            return made

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_widths(text)
            pieces = text.split("{}")
            if len(pieces) != len(args) + 1 or any(set("{}") & set(piece) for piece in pieces):
                return made(*args, **kwargs)  # all of it counts as said
            return self.joined(
                part for pair in zip(pieces, [*args, ""], strict=True) for part in pair
            )

        return formatted

    def _guarded(self, filter: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is charged; ``functools.wraps`` keeps what Jinja notes on it."""

        @functools.wraps(filter)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            for value in (*args[1:], *kwargs.values()):
                if isinstance(value, int) and abs(value) > _WIDEST:
                    raise Exhausted(f"a filter is given {value:.1e}: at most {_WIDEST:,}")
            texts = [value for value in args if isinstance(value, str)]
            if filter.__name__ == "do_format":
                _check_widths(texts[0] if texts else "")
            if filter.__name__ == "do_replace" and len(texts) == 3:
                self._check_method(texts[0], "replace", texts[1:])
            made = filter(*args, **kwargs)
            self.budget.charge(len(made) if isinstance(made, list | tuple | dict) else 1)
            if isinstance(made, str):
                self.budget.room(len(made))
            return made

        return guarded


class _Watched(NodeTransformer):
    """Puts the calls of `ChatEnvironment` around a template's constants, joins and loops."""

    def _call(self, name: str, values: Sequence[nodes.Node], lineno: int) -> nodes.Call:
        return nodes.Call(
            nodes.EnvironmentAttribute(name), list(values), [], None, None, lineno=lineno
        )

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return self._call("own", [nodes.Const(node.data)], node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            return self._call("own", [node], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concatenated", node.nodes, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._call("counted", [node.iter], node.lineno)
        return node


class _Generation(Extension):
    """``{% generation %}``: transformers' mark around answers; what is in it stays as it is."""

    tags = {"generation"}  # noqa: RUF012  Jinja's attribute

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def constants(template: str) -> set[str]:
    """The strings that a template names in its code; none for one that is malformed."""
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(
            template
        )
    except Exception:  # said when it is rendered
        return set()
    return {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}


def _check_widths(pattern: str) -> None:
    if _WIDTH.search(pattern):
        raise Exhausted("it formats with a width of five digits or more, or one that is computed")


@jinja2.pass_environment
def _join(
    environment: ChatEnvironment, values: Iterable[Any], d: str = "", attribute: Any = None
) -> str:
    """Jinja's own, which would begin with a string that has no marks."""
    if attribute is not None:
        values = (environment.getitem(value, attribute) for value in values)
    texts = [str(value) for value in environment.counted(values)]
    environment.check_join(d, texts)
    return Marked(d).join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
