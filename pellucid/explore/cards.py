"""The card of a step: formula with its shapes, the code of this model, and what was checked.

Three witnesses: the step's own operation again at higher precision (`diff.replay`), the walk, which
writes the arithmetic a second time, and the stream, which computing a layer again must reproduce.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.diff.replay.operations import SOURCES, inner_length
from pellucid.diff.replay.replay import Replay
from pellucid.explore.manifest import TITLES, sentence_of, words_of
from pellucid.explore.runs import TAIL, ExploredRun
from pellucid.models import Config
from pellucid.walk import Step, walk_part

# Largest distance of the walk, in units of the largest number: some operations in a row.
APART = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
MOST_WORK = 1e11  # multiplications of a check; larger ones are left out
_TAP = re.compile(r'\btap\(\s*(?:self|module|model),\s*"([\w.]+)"')


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was held against what: `value` must be at most `limit`."""

    what: str
    value: float | None
    limit: float | None
    holds: bool


def card(run: ExploredRun, name: str, head: int | None = None) -> dict[str, Any]:
    """The card of a named tensor; of one head where it has heads (None: the first).

    KeyError for a name that the run has not, IndexError for a head that it has not.
    """
    if name not in run:
        _ = run[name]  # raises, with the names that are near
    per_head = [letter for letter in graph.dims(name)[1:2] if letter in ("H", "Hkv")]
    count = run.shape(name)[0] if per_head else 0
    if head is not None and per_head and not 0 <= head < run.loaded.config.n_heads:
        raise IndexError(f"head {head}: this model has the heads 0 to {count - 1}")
    group = run.loaded.config.n_heads // run.loaded.config.n_kv_heads
    query = head or 0
    own = (query // group if per_head == ["Hkv"] else query) if per_head else None
    step = _walked(run, name, query)
    title, formula = words_of(run.loaded, name)
    lines = run.loaded.code.lines(name.replace(".sin", ".cos"))  # one statement makes both
    return {
        "step": name,
        "head": own,
        "title": step.title if step and step.title and graph.leaf(name) not in TITLES else title,
        "formula": step.formula if step and step.title else formula,
        "sentence": sentence_of(run.loaded, name),
        "source": source_of(name, run.loaded.config.gated),
        "code": "\n".join(lines),
        "walk": step.source if step else "",
        "inputs": list(graph.inputs(run.loaded.config, name)),
        "checks": [asdict(check) for check in checks(run, name, own, step)],
    }


def _walked(run: ExploredRun, name: str, head: int) -> Step | None:
    """The walk's step, computed from the stream that enters the layer; None where it has none."""
    config = run.loaded.config
    where = _begins(config, name)
    steps = walk_part(
        config, run.loaded.weights, run.ids, layer=where, stream=run.stream[where][0], head=head,
        dialect=run.loaded.model.dialect, dtype=run.loaded.lm.dtype,
    )  # fmt: skip
    return next((step for step in steps if step.name == name), None)


def _begins(config: Config, name: str) -> int:
    """The layer whose part of the walk has a step; what layers share is in the first to read it."""
    layer = names.layer_of(name)
    if layer is not None:
        return layer
    if name in TAIL:
        return config.n_layers
    for layer, kind in enumerate(config.kinds):
        rows = graph.rows(config, kind)
        if any(name in graph.inputs(config, f"layers.{layer}.{leaf}") for leaf in rows):
            return layer
    return 0


def checks(run: ExploredRun, name: str, head: int | None, step: Step | None) -> list[Check]:
    """What holds of a step; an edited tensor is held against nothing."""
    found: list[Check] = []
    layer = names.layer_of(name)
    if any(edit.name == name for edit in run.edits):
        return [Check(what="this run changes it here", value=None, limit=None, holds=True)]
    if graph.leaf(name) not in SOURCES:
        found += _replayed(run, name)
    if step is not None and isinstance(step.value, Tensor) and not _edited_before(run, layer):
        seen = _like(run[name], name, head, step)
        value = apart(step.value, seen)
        limit = APART[run.loaded.lm.dtype]
        found.append(
            Check(what="the walk, a second writing", value=value, limit=limit, holds=value <= limit)
        )
    if graph.leaf(name) == "attn.pattern" and not run.loaded.config.sinks:
        found.append(_rows_add_up(run[name]))
    if layer is not None and layer in run.reproduced:
        value = run.reproduced[layer]
        what = "the stream after this layer, computed again"
        found.append(Check(what=what, value=value, limit=0.0, holds=value == 0))
    return found


def _edited_before(run: ExploredRun, layer: int | None) -> bool:
    """Whether an edit acts between what the walk begins with and its step."""
    return any(names.layer_of(edit.name) in (layer, None) for edit in run.edits)


def _replayed(run: ExploredRun, name: str) -> list[Check]:
    setting = run.loaded.setting()
    own = Replay(run, setting)
    arguments = own.arguments(name)
    if math.prod(run.shape(name)) * inner_length(setting, name, arguments) > MOST_WORK:
        return []
    near, exact = own.compute(name), Replay(run, setting.wide()).compute(name)
    seen = run[name]
    if near.dtype == torch.bool:
        wrong = float((near != seen).sum())
        return [Check(what="its rule", value=wrong, limit=0.0, holds=not wrong)]
    result = own.hold(name, exact, near, seen)
    limit = result.error_b / result.ratio if result.ratio else own.explained_error(name)
    what = f"its operation again in {str(exact.dtype).removeprefix('torch.')}, from its own inputs"
    holds = result.verdict in ("identical", "within-rounding")
    return [Check(what=what, value=result.error_b, limit=limit, holds=holds)]


def _rows_add_up(pattern: Tensor) -> Check:
    off = float((pattern.double().sum(-1) - 1).abs().max())
    limit = pattern.shape[-1] * torch.finfo(pattern.dtype).eps
    return Check(what="each row adds up to 1", value=off, limit=limit, holds=off <= limit)


def _like(seen: Tensor, name: str, head: int | None, step: Step) -> Tensor:
    """The run's tensor in the shape of the walk's step: one head, or the last row of logits."""
    seen = seen[0] if graph.has_batch(name) else seen
    seen = seen[head] if step.index and head is not None else seen
    return seen[-1] if seen.ndim == step.value.ndim + 1 else seen


def apart(said: Tensor, seen: Tensor) -> float:
    """Largest distance in units of the largest number; masked cells must both be masked."""
    said, seen = said.double(), seen.double()
    closed = seen < -1e30
    if said.shape != seen.shape or not torch.equal(closed, said < -1e30):
        return math.inf
    said, seen = said[~closed], seen[~closed]
    if not seen.numel():
        return 0.0
    return float((said - seen).abs().max() / seen.abs().max().clamp(min=1e-30))


def source_of(name: str, gated: bool) -> dict[str, Any]:
    """File of the decoder, number of the first line and lines of the statement that names it."""
    leaf = graph.leaf(name)
    found = _taps().get(leaf) or _taps().get(leaf.rpartition(".")[2], [])
    if not found:
        return {"file": "", "first": 0, "lines": []}
    file, first, lines = found[0] if gated else found[-1]
    return {"file": file, "first": first, "lines": lines}


@cache
def _taps() -> dict[str, list[tuple[str, int, list[str]]]]:
    """Leaf of a tap -> file, line number and lines, of each."""
    found: dict[str, list[tuple[str, int, list[str]]]] = {}
    for file in ("decoder.py", "attention.py", "parts.py", "rope.py"):
        text = (files("pellucid.models") / file).read_text("utf-8")
        for match in _TAP.finditer(text):
            first = text.count("\n", 0, match.start()) + 1
            line = text.splitlines()[first - 1].strip()
            found.setdefault(match[1], []).append((f"pellucid/models/{file}", first, [line]))
    return found
