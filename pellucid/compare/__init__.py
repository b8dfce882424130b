"""Hold two implementations of a model against each other and say where and why they part."""

from __future__ import annotations

from pellucid.compare.diff import compare
from pellucid.compare.report import Report
from pellucid.compare.sides import Side, from_model, from_trace

__all__ = ["Report", "Side", "compare", "from_model", "from_trace"]
