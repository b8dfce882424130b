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

    def call(self: ModuleType, *values: Any, **named: Any) -> Any:
        return opened()(*values, **named)

    def told(self: ModuleType) -> str:
        how = f"{name}{as_lines(signature(opened()))}"
        return f"{how}\n\n{cleandoc(opened().__doc__ or '')}\n\n{about}"

    shown = {"__signature__": property(lambda self: signature(opened())), "__doc__": property(told)}
    module.__class__ = type("CallableModule", (ModuleType,), {"__call__": call, **shown})


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
