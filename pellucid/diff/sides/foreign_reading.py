"""The state of reading a foreign recording: what was found, and the weights in our layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pellucid import graph
from pellucid.checkpoints.formats.meta import half_split
from pellucid.diff.sides.foreign_layouts import (
    Split,
    laid_out,
    order_of_parts,
    same_values,
    split_joined,
    without_head_axis,
)
from pellucid.diff.sides.foreign_roles import by_use, with_copies_read
from pellucid.diff.sides.foreign_weights import Matched, match_weights
from pellucid.diff.sides.layouts import Layout, lay_out
from pellucid.diff.sides.record import WEIGHTS, calls_of
from pellucid.trace import Trace

Call = Mapping[str, Any]
FLAT, APART = "flat", "apart"  # heads side by side, as products give them; apart, as in attention


class Reading:
    """A recording, its parameters matched with ours, and which of its tensors are which of ours."""

    def __init__(self, seen: Trace, config: Any, mine: Mapping[str, Tensor]) -> None:
        self.seen, self.config, self.mine = seen, config, mine
        self.theirs = {
            name.removeprefix(WEIGHTS): x for name, x in seen.items() if name.startswith(WEIGHTS)
        }
        first_pass = [call for call in calls_of(seen) if not call["step"]]
        self.calls, self.as_read = with_copies_read(first_pass, seen, self.theirs)
        used = [name for call in self.calls for name in call["reads"]]
        self.matched: Matched = match_weights(self.theirs, mine, config.n_layers, used)
        by_use(self.matched, self.calls, seen)
        tokens = torch.atleast_2d(seen["tokens"]) if "tokens" in seen else torch.zeros(1, 1)
        batch, length = tokens.shape
        self.sizes = graph.sizes(config, batch=batch, tokens=length, seen=length)
        self.found: dict[str, tuple[str, Layout]] = {}  # ours -> foreign name, layout
        self.joined: dict[str, list[tuple[str, Layout]]] = {}  # foreign -> ours, layout
        self.splits: dict[tuple[str, ...], Split] = {}  # local names -> how they are joined
        self.neighbours: dict[str, bool] = {}  # "q", "k": its pairs are neighbours
        self.plain_order: set[tuple[str, ...]] = set()  # joined, and cut as A's are by the code
        self.notes: list[str] = []
        self.products_of_q_and_k: set[str] = set()  # before the scale: none of our tensors
        self.products = self._products()

    def _products(self) -> dict[tuple[str, ...], Call]:
        """Our modules (one, or several joined) -> the call that computes with their weights."""
        found: dict[tuple[str, ...], Call] = {}
        for call in self.calls:
            stems = {name.rpartition(".")[0] for name in call["reads"]}
            held = [self.matched.held(name) for name in call["reads"]]
            modules = {tuple(part.rpartition(".")[0] for part in parts) for parts in held if parts}
            if len(stems) != 1 or len(modules) != 1:
                continue
            (module,) = modules
            if module == ("embed",) and self._is_real(call):
                module = ("unembed",)
            before = found.get(module)
            if before is None or (before["op"] != "module" and call["op"] == "module"):
                found[module] = call
        return found

    def _is_real(self, call: Call) -> bool:
        return bool(call["inputs"]) and self.seen[call["inputs"][0]].is_floating_point()

    def _targets(self, module: str) -> list[str]:
        """Our tensors that a module of ours computes."""
        if module == "unembed":
            return ["raw_logits" if graph.has(self.config, "raw_logits") else "logits"]
        every = list(graph.expand(self.config))
        made = [name for name in every if graph.module_of(self.config, name) == module]
        return [name for name in made if name not in ("logits", "raw_logits")]

    def _order(self, modules: tuple[str, ...]) -> tuple[str, ...]:
        """Joined modules in the order in which their values stand in B's matrix.

        Where the code takes them for A's order, that one.
        """
        if local_names(modules) in self.plain_order:
            return modules
        weight = self._joined_weight(modules)
        parts = [self.mine[f"{module}.weight"] for module in modules]
        places = None if weight is None else order_of_parts(weight, parts)
        return modules if places is None else tuple(modules[place] for place in places)

    def _joined_weight(self, modules: tuple[str, ...]) -> Tensor | None:
        wanted = tuple(f"{module}.weight" for module in modules)
        for name, x in self.theirs.items():
            if self.matched.held(name) == wanted:
                return _turned(x, self.mine[wanted[0]].shape[1])
        return None

    def _take(self, ours: str, foreign: str, kind: str, instead: bool = False) -> bool:
        """Note that a tensor is ours, if its shape can be; False where it cannot."""
        if foreign not in self.seen or (ours in self.found and not instead):
            return False
        layout = laid_out(self.seen[foreign], ours, self.sizes, kind)
        if layout is None:
            return False
        self.found[ours] = foreign, layout
        return True

    def _value(self, ours: str) -> Tensor | None:
        """A tensor that was found, in our axes."""
        if ours in self.found:
            foreign, layout = self.found[ours]
            return lay_out(self.seen[foreign], layout, graph.dims(ours), self.sizes)
        for foreign, parts in self.joined.items():
            for place, (name, layout) in enumerate(parts):
                if name == ours:
                    count = {"B": 1, "T": 1}
                    widths = [graph.elements(n, self.sizes | count) for n, _ in parts]
                    part = self.seen[foreign].split(widths, dim=-1)[place]
                    return lay_out(part, layout, graph.dims(ours), self.sizes)
        return None

    def _layer(self, foreign: str) -> int | None:
        place = self.matched.place(foreign)
        return None if place.index is None else self.matched.layers[place.index]

    def _plain_weights(self) -> dict[str, Tensor]:
        """B's parameters under our names, (out, in), the rows of q and k as they are stored."""
        found: dict[str, Tensor] = {}
        for name, x in self.theirs.items():
            whole = self.matched.held(name)
            if not whole:
                continue
            if whole[0] in self.mine and x.ndim > self.mine[whole[0]].ndim == 1:
                x = x.flatten()  # a bias by heads
            elif x.ndim == 3 and whole[0] in self.mine:
                x = self.as_read.get(name, x)
                x = x if x.ndim == 2 else without_head_axis(x, whole[0], self.config)
            elif x.ndim == 2 and whole[0] in self.mine:
                x = self._out_in(name, x, whole)
            if len(whole) == 1:
                key = "unembed.weight" if whole[0] in found and whole[0] == "embed.weight" else ""
                if key and same_values(x, found[whole[0]]):
                    continue
                found[key or whole[0]] = x
                continue
            stems = tuple(part.rpartition(".")[0] for part in whole)
            order = self._order(stems)
            parts = split_joined(
                x, self.splits.get(local_names(stems), "concat"), order, self.config
            )
            kind = whole[0].rpartition(".")[2]
            found |= {f"{stem}.{kind}": part for stem, part in zip(order, parts, strict=True)}
        return found

    def _out_in(self, name: str, x: Tensor, whole: tuple[str, ...]) -> Tensor:
        """A matrix as a product reads it, (out, in)."""
        columns = self.mine[whole[0]].shape[1]
        if "embed" in whole[0]:
            return _turned(x, columns)
        reader = next((c for c in self.calls if name in c["reads"] and "stores" in c), None)
        if reader is not None and x.shape[0] == x.shape[1]:
            return x.T if reader["stores"] == "in,out" else x
        return _turned(x, columns)

    def weights(self) -> dict[str, Tensor]:
        """B's parameters under our names and in our layout."""
        found = self._plain_weights()
        for name, x in found.items():
            for letter, is_so in self.neighbours.items():
                if is_so and f".attn.{letter}_proj." in name:
                    found[name] = half_split(x, x.shape[0] // self.config.head_dim)
        return found


def local_names(stems: tuple[str, ...]) -> tuple[str, ...]:
    """Names of modules within their block."""
    return tuple(stem.split(".", 2)[2] for stem in stems)


def _turned(x: Tensor, columns: int) -> Tensor:
    return x.T if x.ndim == 2 and x.shape[1] != columns and x.shape[0] == columns else x
