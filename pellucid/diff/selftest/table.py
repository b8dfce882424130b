"""The benchmark's rows as a table a person reads: one line per fault, misses said in words."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.diff.selftest.run import Row, Table


def markdown(table: Table) -> str:
    """The whole measurement: shares, then one line per fault and control, then every miss."""
    rows = table.rows
    parts = [
        _shares(table),
        "## Faults\n",
        _lines([row for row in rows if not row.control], rows),
        "## Controls\n",
        _controls([row for row in rows if row.control]),
        "## Misses\n",
        _misses(rows),
    ]
    return "\n".join(parts)


def by_fault(table: Table) -> str:
    """One line per fault: where and what it is, on which models, and how many of them were told."""
    lines = ["| fault | cause | models | found and named |", "|---|---|---|---|"]
    faults = [row for row in table.rows if not row.control]
    for name in dict.fromkeys(row.fault for row in faults):
        here = [row for row in faults if row.fault == name]
        models = ", ".join(dict.fromkeys(row.model.removesuffix("-like") for row in here))
        right = f"{sum(row.right for row in here)} of {len(here)}"
        lines.append(f"| {name} | {here[0].cause} | {models} | {right} |")
    return "\n".join([*lines, ""])


def mark(row: Row) -> str:
    """What became of a fault: found, hidden by rounding, or what was said instead."""
    if row.control:
        return "quiet" if row.right else "FIRED"
    if row.located:
        return "found" if row.named and row.static_right else "found, other cause"
    if row.found_first:
        return "WRONG PLACE"
    seen = "static only" if row.detected else "not seen"
    return f"{seen} (below rounding)" if row.below_rounding else seen


def _shares(table: Table) -> str:
    summary = table.summary()
    known = ("float32", "bfloat16", "float16")
    dtypes = [dtype for dtype in known if f"{dtype} faults" in summary]
    lines = [
        "| | " + " | ".join(dtypes) + " |",
        "|---|" + "---|" * len(dtypes),
    ]
    for what, words in (
        ("faults", "runs with a fault"),
        ("detected", "detected"),
        ("located", "exact first tensor"),
        ("misplaced", "another first tensor"),
        ("cause right", "cause right, of those located"),
        ("static right", "static stages right, where weights and config are visible"),
    ):
        numbers = [summary[f"{dtype} {what}"] for dtype in dtypes]
        shown = [
            f"{number:.0f}" if what in ("faults", "misplaced") else f"{number:.1%}"
            for number in numbers
        ]
        lines.append(f"| {words} | " + " | ".join(shown) + " |")
    fired = f"{summary['controls fired']:.0f} of {summary['controls']:.0f}"
    return "\n".join([*lines, "", f"Controls that fired: {fired}.", ""])


def _lines(faults: Sequence[Row], rows: Sequence[Row]) -> str:
    models = list(dict.fromkeys(row.model for row in rows))
    columns = [(model, dtype) for model in models for dtype in _dtypes(rows)]
    head = " | ".join(f"{model} {dtype}" for model, dtype in columns)
    lines = [
        f"| fault | first tensor | cause | {head} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for name, first, cause in dict.fromkeys((row.fault, row.first, row.cause) for row in faults):
        cells = []
        for model, dtype in columns:
            here = [
                mark(row)
                for row in faults
                if (row.fault, row.first, row.model, row.dtype) == (name, first, model, dtype)
            ]
            cells.append(" / ".join(dict.fromkeys(here)))
        lines.append(f"| {name} | `{first}` | {cause} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _controls(controls: Sequence[Row]) -> str:
    lines = ["| control | runs | verdicts | fired |", "|---|---|---|---|"]
    for name in dict.fromkeys(row.fault for row in controls):
        here = [row for row in controls if row.fault == name]
        verdicts = ", ".join(dict.fromkeys(row.verdict for row in here))
        fired = sum(not row.right for row in here)
        lines.append(f"| {name} | {len(here)} | {verdicts} | {fired} |")
    return "\n".join([*lines, ""])


def _misses(rows: Sequence[Row]) -> str:
    missed = [row for row in rows if not row.right or (not row.control and not row.located)]
    if not missed:
        return "None.\n"
    lines = [
        "| fault | model | dtype | B shows | became | cause found | size of the fault |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in missed:
        shows = "weights and config" if row.shown else "tensors only"
        size = "" if row.effect is None else f"{row.effect:.1e}"
        found = row.found_cause or ", ".join(row.found_static)
        cells = (row.fault, row.model, row.dtype, shows, mark(row), found, size)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _dtypes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.dtype for row in rows))
