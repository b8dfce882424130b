"""Modules that are calls too: ``pellucid.diff(a, b)`` beside ``pellucid.diff.Report``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Parameter, Signature, cleandoc, signature
from types import ModuleType
from typing import Any


def make_callable(name: str, opened: Callable[[], Callable[..., Any]]) -> None:
    """Let the module `name` be called; its help then begins with how.

    opened  gives the function, so that it is imported on first use
    """
    module = sys.modules[name]
    about = module.__doc__ or ""
    del module.__doc__

    class CallableModule(ModuleType):
        def __call__(self, *values: Any, **named: Any) -> Any:
            return opened()(*values, **named)

        @property
        def __signature__(self) -> Signature:
            return signature(opened())

        @property
        def __doc__(self) -> str:
            call = f"{name}{as_lines(signature(opened()))}"
            return f"{call}\n\n{cleandoc(opened().__doc__ or '')}\n\n{about}"

    module.__class__ = CallableModule


def as_lines(parameters: Signature) -> str:
    """A signature as it would be written in a file, one parameter in a line."""
    lines, named = [], False
    for each in parameters.parameters.values():
        if each.kind is Parameter.KEYWORD_ONLY and not named:
            lines, named = [*lines, "*"], True
        kind = "" if each.annotation is Parameter.empty else f": {each.annotation}"
        default = "" if each.default is Parameter.empty else f" = {each.default!r}"
        lines.append(f"{each.name}{kind}{default}")
    inside = "".join(f"    {line},\n" for line in lines)
    given = parameters.return_annotation
    return f"(\n{inside})" + ("" if given is Signature.empty else f" -> {given}")
