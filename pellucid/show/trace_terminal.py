"""A trace as a list: name, dims, shape and dtype of each tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pellucid.trace import Trace

_NUMBERED = re.compile(r"\b(layers|step)\.\d+\.")


def listing(trace: Trace, path: Path, *, every: bool) -> list[str]:
    """The lines of ``pellucid trace``: the tensors, and what the file at `path` holds.

    every  a line per tensor; otherwise layers and steps that look alike share one, ``layers.*``
    """
    size = path.stat().st_size
    return [
        *_rows(trace, every),
        "",
        f"{path}: {len(trace):,} tensor{'s' * (len(trace) != 1)}, {size:,} bytes",
    ]


def trace_as_json(trace: Trace, path: Path) -> dict[str, Any]:
    """The object of ``pellucid trace --json``: the file, the trace's notes, a row per tensor."""
    tensors = [
        {
            "name": name,
            "dims": list(trace.dims(name)),
            "shape": list(tensor.shape),
            "dtype": _dtype(tensor),
        }
        for name, tensor in trace.items()
    ]
    return {"file": str(path), "bytes": path.stat().st_size, **trace.meta, "tensors": tensors}


def _rows(trace: Trace, every: bool) -> list[str]:
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, tensor in trace.items():
        kind = (" ".join(trace.dims(name)), str(tuple(tensor.shape)), _dtype(tensor))
        pattern = name if every else _NUMBERED.sub(r"\1.*.", name)
        alike.setdefault((pattern, *kind), []).append(name)
    table = [
        (_common_name(names), dims, shape, dtype, f"× {len(names)}" if names[1:] else "")
        for (_, dims, shape, dtype), names in alike.items()
    ]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    return [
        "  ".join(
            f"{text:<{width}}" for text, width in zip(row, [*widths, 0], strict=True)
        ).rstrip()
        for row in table
    ]


def _common_name(names: Sequence[str]) -> str:
    """One name for several that differ in a number: ``step.2.layers.*.attn.q``."""
    split = [name.split(".") for name in names]
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*split, strict=True))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
