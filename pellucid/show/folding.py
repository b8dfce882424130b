"""Many names in few words: ``layers.1…4.attn.{q,k}`` instead of eight lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pellucid import names

Places = tuple[int | None, ...]


def fold(some: Iterable[str], everything: Iterable[str] = ()) -> list[str]:
    """Names and parameter names, shortened; `*` where all layers or steps of `everything` are in.

    A step in brackets, ``[step.*.]``, means the prompt's own pass too.
    """
    some = list(some)
    layers = {place for name in (*some, *everything) if (place := names.layer_of(name)) is not None}
    steps = {names.step_of(name) for name in (*some, *everything)}
    by_leaf: dict[tuple[int, str], list[int | None]] = {}
    for name in some:
        by_leaf.setdefault((names.step_of(name), _leaf(name)), []).append(names.layer_of(name))
    by_layers: dict[tuple[Places, str], list[int]] = {}
    for (step, leaf), found in by_leaf.items():
        by_layers.setdefault((tuple(found), leaf), []).append(step)
    by_place: dict[tuple[Places, Places], list[str]] = {}
    for (found, leaf), at in by_layers.items():
        by_place.setdefault((tuple(at), found), []).append(leaf)
    return [
        f"{_steps(at, steps)}{_layers(found, layers)}{joined}"
        for (at, found), leaves in by_place.items()
        for joined in _in_braces(leaves)
    ]


def _leaf(name: str) -> str:
    plain = names.without_step(name)
    return plain if names.layer_of(name) is None else plain.split(".", 2)[2]


def _steps(at: Sequence[int | None], every: set[int]) -> str:
    if set(at) == {0}:
        return ""
    if 0 in at:
        return f"[step.{_range(at, every)}.]"
    return f"step.{_range(at, every - {0})}."


def _layers(found: Sequence[int | None], every: set[int]) -> str:
    return "" if found[0] is None else f"layers.{_range(found, every)}."


def _range(places: Sequence[int | None], every: set[int]) -> str:
    """``*`` for all of several, ``1…4`` for neighbours, ``1,3`` for others."""
    numbers = sorted({place for place in places if place is not None})
    if len(numbers) > 1 and set(numbers) == every:
        return "*"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(
        f"{run[0]}…{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs
    )


def _in_braces(leaves: Sequence[str]) -> list[str]:
    """Leaves of one part of the block in braces: ``attn.{q,k}``."""
    parts: dict[str, list[str]] = {}
    for leaf in leaves:
        head, dot, tail = leaf.partition(".")
        parts.setdefault(f"{head}." if dot else "", []).append(tail if dot else leaf)
    joined = []
    for head, tails in parts.items():
        if head and len(tails) > 1:
            end = _common_end(tails)
            inner = ",".join(tail.removesuffix(end) for tail in tails)
            joined.append(f"{head}{{{inner}}}{end}")
        else:
            joined += [head + tail for tail in tails]
    return joined


def _common_end(words: Sequence[str]) -> str:
    """What all end in, from a dot or an underscore on: ``_proj.weight``."""
    ends = [words[0][place:] for place, sign in enumerate(words[0]) if sign in "._"]
    return next((end for end in ends if all(word.endswith(end) for word in words)), "")
