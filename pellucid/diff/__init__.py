"""Hold two implementations of a model against each other and say where and why they part."""

from __future__ import annotations

from pellucid.callable_module import make_callable
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


make_callable(__name__, lambda: diff)  # ``pellucid.diff(a, b)``
