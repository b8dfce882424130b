"""Any module as a side of a diff: recorded on the other side's tokens, then under our names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pellucid import graph
from pellucid.diff.sides.foreign import understand
from pellucid.diff.sides.maps import NameMap
from pellucid.diff.sides.record import WEIGHTS, record, takes
from pellucid.diff.sides.wrappers import unwrapped
from pellucid.language_model import LanguageModel
from pellucid.models import Decoder
from pellucid.trace import Trace

_MOST_NAMED = 6  # unmapped tensors that a note lists


def is_foreign(source: Any) -> bool:
    """Whether a side is a module that neither we nor transformers know."""
    if not isinstance(source, nn.Module):
        return False
    inner = unwrapped(source)
    known = hasattr(getattr(inner, "config", None), "model_type")
    return not isinstance(inner, Decoder) and not known


def recorded_modules(
    a: Any, b: Any, rows: str | list[list[int]] | None, steps: int
) -> tuple[Any, Any]:
    """Both sides, with a recording in the place of a foreign module.

    ValueError where both are foreign, or where the module cannot be called with token ids alone.
    """
    foreign = [is_foreign(side) for side in (a, b)]
    if not any(foreign):
        return a, b
    if all(foreign):
        raise ValueError("both sides are modules of no known make: give a loaded model as one")
    module, other = (a, b) if foreign[0] else (b, a)
    if steps:
        raise ValueError(
            f"steps are for models whose cache is known: record {type(module).__name__} with "
            "pellucid.record while it decodes, and give the recording"
        )
    seen = _recorded(module, _tokens(rows, other))
    return (seen, b) if foreign[0] else (a, seen)


def _tokens(rows: str | list[list[int]] | None, other: Any) -> Tensor:
    if isinstance(rows, str):
        if not isinstance(other, LanguageModel | str | Path):
            raise ValueError("neither side has a tokenizer: give token ids as the prompt")
        if not isinstance(other, LanguageModel):
            from pellucid.language_model import load

            other = load(str(other).removeprefix("hf:"))
        rows = [other.encode(rows)]
    assert rows is not None, "a prompt is there when a module is to be recorded"
    if len({len(row) for row in rows}) > 1:
        raise ValueError("rows of different length need padding that a module may not know")
    return torch.tensor(rows)


def _recorded(module: nn.Module, tokens: Tensor) -> Trace:
    held = next(iter(module.parameters()), None)
    device = "cpu" if held is None else held.device
    inner = unwrapped(module)
    more = {"start_pos": 0} if takes(inner, "start_pos") else {}
    try:
        return record(module, tokens.to(device), **more)
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{type(inner).__name__} could not be called with token ids {tuple(tokens.shape)}: "
            f"{line}; call it yourself in pellucid.record(module, …) and give the recording"
        ) from error


def home(
    seen: Trace, label: str, chosen: NameMap | None, config: Any, mine: Mapping[str, Tensor]
) -> tuple[Trace, dict[str, Tensor]]:
    """A recording of a foreign module under our names, and its parameters under ours.

    chosen  a map to use instead of the one that is found out
    """
    found = understand(seen, config, mine, "found out")
    name_map = chosen or found.name_map
    inside = without_weights(seen)
    named = name_map.apply(inside, config)
    if not any(graph.known(name) and name != "tokens" for name in named):
        raise ValueError(
            f"{label}: none of its {len(inside)} tensors has the place and shape of one of the "
            "other side's: give a name_map, or the model that it is a port of"
        )
    meta = {"unmapped": found.unmapped, "findings": found.notes, "map": name_map.to_yaml()}
    order = [name for name in inside if not name.startswith("step.")]
    return Trace(named, named.meta | meta | {"order_of_names": order}), found.weights


def without_weights(seen: Trace) -> Trace:
    """A recording less the parameters that it brings."""
    if not any(name.startswith(WEIGHTS) for name in seen):
        return seen
    return Trace({n: x for n, x in seen.items() if not n.startswith(WEIGHTS)}, seen.meta)


def notes_of(seen: Trace, first: str, label: str) -> Iterator[str]:
    """Layouts that are not plain, and what B computed before FIRST that has no name of ours."""
    yield from seen.meta.get("findings", [])
    if "note" in seen.meta:
        yield f"{label}: {seen.meta['note']}"
    order = seen.meta.get("order_of_names", [])
    foreign = seen.meta["named_from"].get(first)
    if foreign in order:
        before = set(order[: order.index(foreign)])
        left = [name for name in seen.meta.get("unmapped", []) if name in before]
        if left:
            more = f" and {len(left) - _MOST_NAMED} more" if len(left) > _MOST_NAMED else ""
            listed = ", ".join(left[:_MOST_NAMED])
            yield f"before {first} (in B {foreign}) these have no name of ours: {listed}{more}"


def write_map(path: str | Path, recorded: Sequence[Trace]) -> None:
    """Write the name map that was found out for a recording; ValueError where none was."""
    maps = [seen.meta["map"] for seen in recorded if seen.meta.get("map")]
    if not maps:
        raise ValueError("map_out: no name map was found out, the names were known")
    Path(path).write_text(maps[0], encoding="utf-8")
