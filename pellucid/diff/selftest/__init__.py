"""The public benchmark: seeded faults, an independent port to put them in, and a runner."""

from __future__ import annotations

from pellucid.diff.selftest.run import Row, Table, run_benchmark, run_healthy
from pellucid.diff.selftest.subjects import Subject, from_language_model, random_features
from pellucid.diff.selftest.table import markdown

__all__ = [
    "Row",
    "Subject",
    "Table",
    "from_language_model",
    "markdown",
    "random_features",
    "run_benchmark",
    "run_healthy",
]
