"""Name maps: what others call our tensors, and how they lay them out.

A map is a YAML file; ``{N}`` stands for the layer, and a layout (see `layouts`) follows in
parentheses where the axes are not ours:

    blocks.{N}.attn.hook_q: layers.{N}.attn.q (B T H D)
    transformer.h.{N}.attn.c_attn: layers.{N}.attn.q (B T H*D) | layers.{N}.attn.k (B T H*D) | …

A joined tensor names its parts in order, along the last axis. Entries stand at the top level, or
under ``tensors``, ``gpt2`` and ``llama`` where their module names differ; ``sizes`` states numbers
that no shape tells, such as ``H``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.diff.sides.layouts import FIXED, Layout, lay_out, learn_sizes, parse_layout
from pellucid.diff.sides.transformers import place_in_pass
from pellucid.files import parse_yaml, read_text
from pellucid.trace import Trace

_TARGET = re.compile(r"\s*([^\s()]+)\s*(?:\(([^()]*)\))?\s*")
# What a section of a map is about: whose module names, and where these norm what is added.
_SECTIONS = ("gpt2", "llama", "llama, norms both", "llama, norms after")


class UnknownNames(ValueError):
    """A recording most of whose names are unknown.

    recorded  the recording
    proposal  a name map for it, as YAML, where one could be made; then `str` shows it too
    """

    def __init__(self, message: str, recorded: Trace, proposal: str = "") -> None:
        super().__init__(message + (f":\n{proposal}" if proposal else ""))
        self.recorded, self.proposal = recorded, proposal


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of our names, with ``{N}`` for the layer, and the layout of the foreign tensor."""

    name: str
    layout: Layout

    def __str__(self) -> str:
        return f"{self.name} ({self.layout})"


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """Patterns of foreign names, each with what its tensor holds."""

    label: str
    entries: Mapping[str, tuple[Target, ...]]
    sizes: Mapping[str, int] = field(default_factory=dict)

    def found(self, recorded: Iterable[str]) -> list[tuple[str, str, tuple[Target, ...]]]:
        """(foreign name, its step prefix, targets with the layer filled in) of known ones."""
        compiled = [(_pattern(pattern), targets) for pattern, targets in self.entries.items()]
        rows = []
        for name in recorded:
            plain = names.without_step(name)
            for pattern, targets in compiled:
                match = pattern.fullmatch(plain)
                if match:
                    layer = match.groupdict().get("N", "")
                    filled = tuple(
                        replace(target, name=target.name.replace("{N}", layer))
                        for target in targets
                    )
                    rows.append((name, name[: len(name) - len(plain)], filled))
                    break
        return rows

    def knows(self, recorded: Iterable[str]) -> int:
        """How many names of a recording it knows, besides the tokens and their positions."""
        return sum(to[0].name not in ("tokens", "positions") for _, _, to in self.found(recorded))

    def apply(self, recorded: Trace, config: Any = None) -> Trace:
        """The recording under our names, in our axes. Names that are ours stay.

        config  of the model it is of, where one is known: it says how many heads there are

        ValueError where a tensor does not have the layout that the map states.
        """
        rows = self.found(recorded)
        sizes = dict(self.sizes)
        if config is not None:
            known = graph.sizes(config, batch=1, tokens=1, seen=1)
            sizes = {letter: known[letter] for letter in FIXED} | sizes
        whole = [(to[0].layout, recorded[name]) for name, _, to in rows if len(to) == 1]
        learn_sizes(sizes, whole)
        seen: dict[str, Tensor] = {}
        named_from: dict[str, str] = {}
        for name, prefix, targets in sorted(rows, key=lambda row: len(row[2]) > 1):
            try:  # a tensor of its own says more than a part of a joined one
                parts = _parts(recorded[name], targets, sizes)
                for target, part in zip(targets, parts, strict=True):
                    x = lay_out(part, target.layout, graph.dims(target.name), sizes)
                    x = _of_this_pass(target.name, x, prefix, recorded)
                    if prefix + target.name not in seen:
                        named_from[prefix + target.name] = name
                    seen.setdefault(prefix + target.name, _typed(target.name, x))
            except ValueError as error:
                raise ValueError(f"name map {self.label}: {name}: {error}") from None
        for name in recorded:
            if graph.known(name):
                seen.setdefault(name, recorded[name])
        ordered = {name: seen[name] for name in sorted(seen, key=place_in_pass)}
        left = [name for name in recorded if name not in {row[0] for row in rows}]
        unmapped = [name for name in left if not graph.known(name)]
        meta = {"name_map": self.label, "unmapped": unmapped, "named_from": named_from}
        return Trace(ordered, {**recorded.meta, **meta})

    def to_yaml(self) -> str:
        """The map as the text that `read_map` reads."""
        lines = []
        for pattern, targets in self.entries.items():
            said = " | ".join(
                target.name
                if str(target.layout) == " ".join(graph.dims(target.name.replace("{N}", "0")))
                else str(target)
                for target in targets
            )
            lines.append(f"{pattern}: {said}\n")
        return "".join(lines)


def section_of(config: Any) -> str | None:
    """Which section of a map a model's names are in: GPT-2's where positions are learned.

    A name such as post_attention_layernorm means another tensor where norms stand behind attention
    and MLP: what follows a comma holds beside what stands before it. None without a config.
    """
    if config is None:
        return None
    behind = "" if config.norm_places == "before" else f", norms {config.norm_places}"
    return "gpt2" if graph.has(config, "pos_embed") else f"llama{behind}"


def load_map(source: str | Path, section: str | None = None) -> NameMap:
    """A shipped map by its name, or a YAML file; entries of another `section` are left out.

    ValueError where there is none, or where the file is no name map.
    """
    path = Path(source)
    shipped = _shipped()
    if str(source) in shipped:
        text = shipped[str(source)]
    elif path.is_file():
        text = read_text(path)
    else:
        raise ValueError(
            f"no name map {str(source)!r}: expected {', '.join(sorted(shipped))}, or a YAML file"
        )
    return read_map(text, str(source), section)


def read_map(text: str, label: str, section: str | None = None) -> NameMap:
    """A name map from YAML text."""
    stated = parse_yaml(text, f"name map {label}")
    if not isinstance(stated, dict) or not stated:
        raise ValueError(
            f"name map {label}: expected lines such as 'foreign.{{N}}.q: layers.{{N}}.attn.q'"
        )
    sizes = stated.pop("sizes", None) or {}
    if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
        raise ValueError(f"name map {label}: expected sizes such as {{H: 32}}, not {sizes}")
    stated.pop("about", None)
    sections = {key: stated.pop(key, None) or {} for key in ("tensors", *_SECTIONS)}
    entries: dict[str, tuple[Target, ...]] = {}
    for key, entered in {**sections, "": stated}.items():
        if key in _SECTIONS and not f"{section or key.split(',')[0]},".startswith(f"{key},"):
            continue
        if not isinstance(entered, dict) or not all(isinstance(t, str) for t in entered.values()):
            raise ValueError(f"name map {label}: expected a line of text for each name")
        for pattern, targets in entered.items():
            entries[str(pattern)] = tuple(_targets(str(pattern), targets, label))
    return NameMap(label=label, entries=entries, sizes=sizes)


def _targets(pattern: str, text: str, label: str) -> Iterator[Target]:
    for part in text.split("|"):
        match = _TARGET.fullmatch(part)
        name = match[1] if match else part.strip()
        plain = name.replace("{N}", "0")
        if match is None or not graph.known(plain):
            near = get_close_matches(name, [row.name.replace(".N.", ".{N}.") for row in graph.ROWS])
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"name map {label}: {pattern}: no tensor is called {name!r}{hint}")
        if ("{N}" in name) != ("{N}" in pattern):
            raise ValueError(f"name map {label}: {pattern}: {{N}} must stand on both sides or none")
        dims = graph.dims(plain)
        layout = parse_layout(match[2]) if match[2] else Layout(axes=tuple((d,) for d in dims))
        if set(layout.letters) - {"B"} != set(dims) - {"B"}:
            raise ValueError(
                f"name map {label}: {pattern}: axes '{layout}', but {name} has {' '.join(dims)}"
            )
        yield Target(name=name, layout=layout)


def guess_map(recorded: Collection[str], section: str | None = None) -> NameMap | None:
    """The shipped map that knows most of a recording's names, or None where none knows any."""
    about = [section] if section else ["llama", "gpt2"]
    candidates = [load_map(name, each) for name in sorted(_shipped()) for each in about]
    best = max(candidates, key=lambda candidate: candidate.knows(recorded))
    return best if best.knows(recorded) else None


def _shipped() -> dict[str, str]:
    """Name -> text of the maps that ship with the package."""
    folder = files("pellucid.diff.sides").joinpath("name_maps")
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }


def _pattern(pattern: str) -> re.Pattern[str]:
    first, *rest = re.escape(pattern).split(re.escape("{N}"))
    if not rest:
        return re.compile(first)
    return re.compile(first + r"(?P<N>\d+)" + r"(?P=N)".join(rest))


def _parts(x: Tensor, targets: tuple[Target, ...], sizes: Mapping[str, int]) -> list[Tensor]:
    """A joined tensor in pieces along its last axis, as wide as each target's layout says."""
    if len(targets) == 1:
        return [x]
    widths = []
    for target in targets:
        factors = [int(f) if f.isdigit() else sizes.get(f) for f in target.layout.axes[-1]]
        if None in factors:
            raise ValueError(
                f"nothing says how wide {target} is; put sizes into the map, sizes: {{H: 32}}"
            )
        widths.append(prod(factor for factor in factors if factor))
    if sum(widths) != x.shape[-1]:
        raise ValueError(f"its last axis has {x.shape[-1]}, its parts have {sum(widths)}")
    return list(x.split(widths, dim=-1))


def _of_this_pass(name: str, x: Tensor, prefix: str, recorded: Trace) -> Tensor:
    """Keys and values of this pass, which stand behind those of the cache where B joins them."""
    tokens = recorded.get(f"{prefix}tokens")
    dims = graph.dims(name)
    if not prefix or tokens is None or "Hkv" not in dims or x.ndim != len(dims):
        return x
    axis = dims.index("T")
    return x.narrow(axis, x.shape[axis] - tokens.shape[-1], tokens.shape[-1])


def _typed(name: str, x: Tensor) -> Tensor:
    if names.without_step(name) in ("tokens", "positions"):
        return x.to(torch.int64)
    return x.to(torch.bool) if names.without_step(name) == "mask" else x
