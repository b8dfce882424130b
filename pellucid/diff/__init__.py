"""Hold two implementations of a model against each other and say where and why they part."""

from __future__ import annotations

import sys
from inspect import signature
from types import ModuleType

from pellucid.diff.options import Options
from pellucid.diff.report import Report
from pellucid.diff.sides.side import Side, from_model, from_trace
from pellucid.diff.stages import compare
from pellucid.diff.two_models import as_side, assert_same_model, diff

__all__ = [
    "Options",
    "Report",
    "Side",
    "as_side",
    "assert_same_model",
    "compare",
    "diff",
    "from_model",
    "from_trace",
]


class _Callable(ModuleType):
    """``pellucid.diff(a, b)`` is a call, and ``pellucid.diff.Report`` a name in here."""

    __call__ = staticmethod(diff)
    __signature__ = signature(diff)  # else `inspect` takes the first parameter for a self


sys.modules[__name__].__class__ = _Callable
