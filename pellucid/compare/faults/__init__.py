"""The public benchmark: seeded faults, an independent port to put them in, and a runner."""

from __future__ import annotations

from pellucid.compare.faults.run import Row, Table, run_benchmark, run_healthy
from pellucid.compare.faults.subjects import Subject, from_language_model
from pellucid.compare.faults.table import markdown

__all__ = [
    "Row",
    "Subject",
    "Table",
    "from_language_model",
    "markdown",
    "run_benchmark",
    "run_healthy",
]
