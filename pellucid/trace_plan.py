"""Before a trace runs: whether the model has such names, and how much it would hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pellucid import graph, names
from pellucid.edits import Edit, Edits
from pellucid.numerics import Dialect
from pellucid.spelling import nearest, suggestion
from pellucid.trace import Globs

_FROM_ROTATED = ("attn.q_rotated", "attn.k_rotated", "attn.scores", "attn.masked_scores")


def check_names(config: Any, only: Globs = (), edit: Mapping[str, Edit] | None = None) -> None:
    """ValueError for a glob of `only`, KeyError for an edit, that means no tensor of the model."""
    known = tuple(graph.expand(config))
    for given in (only,) if isinstance(only, str) else tuple(only):
        globs = [names.without_step(glob) for glob in names.spellings(given)]
        if not any(fnmatchcase(name, glob) for name in known for glob in globs):
            near = suggestion(given, [*known, *_mended(given, known)])
            raise ValueError(
                f"no tensor of this model is called {given}{near or ': names look like '}"
                f"{'' if near else 'layers.0.attn.q or logits'}"
            )
    Edits(edit or {}).check_known(known)


def _mended(glob: str, known: Sequence[str]) -> list[str]:
    """The glob with each part that no name has as the nearest that one has; [] if none fits."""
    parts = {part for name in known for part in name.split(".")}
    mended = ".".join(
        part if any(fnmatchcase(each, part) for each in parts) else nearest(part, parts) or part
        for part in glob.split(".")
    )
    return [mended] if any(fnmatchcase(name, mended) for name in known) else []


def estimated_bytes(
    config: Any,
    batch: int,
    tokens: int,
    seen: int,
    itemsize: int,
    only: Globs,
    dialect: Dialect | None = None,
) -> int:
    """Bytes a trace of one pass would hold: the sum over the names that `only` keeps.

    `itemsize` is the activation dtype's; `dialect` says which tensors are float32 all the same
    (None: none of them).
    """
    globs = (only,) if isinstance(only, str) else tuple(only)
    sizes = graph.sizes(config, batch=batch, tokens=tokens, seen=seen)
    return sum(
        graph.elements(name, sizes) * _itemsize(graph.row(name).leaf, itemsize, dialect)
        for name in graph.expand(config)
        if any(fnmatchcase(name, glob) for glob in globs)
    )


def run_bytes(
    config: Any,
    batch: int,
    tokens: int,
    steps: int,
    itemsize: int,
    only: Globs = "*",
    dialect: Dialect | None = None,
) -> int:
    """Bytes a trace of a pass and of so many decoding steps after it would hold."""
    whole = estimated_bytes(config, batch, tokens, tokens, itemsize, only, dialect)
    # A step's size grows by the same amount with each token seen: the mean of the first and last.
    first, last = (
        estimated_bytes(config, batch, 1, seen, itemsize, only, dialect)
        for seen in (tokens + 1, tokens + steps)
    )
    return whole + steps * (first + last) // 2


def _itemsize(leaf: str, activation: int, dialect: Dialect | None) -> int:
    if leaf in ("tokens", "positions", "mask"):
        return 1 if leaf == "mask" else 8  # bool and int64
    wide = dialect is not None and (
        (leaf in ("rope.cos", "rope.sin") and dialect.rope != "x")
        or (leaf in _FROM_ROTATED and dialect.rope == "keep")
        or (leaf == "logits" and dialect.logits == "float32")
    )
    return max(activation, 4) if wide else activation
