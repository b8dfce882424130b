"""A recording of a module without a name map, under our names: weights first.

A parameter whose values are A's fixes what its module computes. From there on names follow from
what reads what: the operands of attention lie between the projections of q, k, v and o, the input
of a norm is the stream, the input of an activation is what came before it. Nothing here asks
whether values are right, so a map of a wrong module goes on past its fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pellucid import graph, names
from pellucid.diff.sides.foreign_attention import AttentionNames
from pellucid.diff.sides.foreign_layouts import mark, same_values
from pellucid.diff.sides.foreign_reading import FLAT
from pellucid.diff.sides.layouts import Layout
from pellucid.diff.sides.maps import NameMap, Target
from pellucid.diff.sides.record import WEIGHTS
from pellucid.trace import Trace


@dataclass(kw_only=True)
class Understood:
    """What a recording of a foreign module holds.

    name_map  its names in ours
    weights   its parameters under our names, in our layout
    notes     layouts other than the plain ones, in words
    unmapped  tensors that are none of ours, in the order of the pass
    """

    name_map: NameMap
    weights: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)


def understand(seen: Trace, config: Any, mine: Mapping[str, Tensor], label: str) -> Understood:
    """Names and weights of a recording made by `record`, for a model with `config`.

    mine  A's parameters, by our names
    """
    reading = _Names(seen, config, mine)
    reading.read()
    unmapped = reading.unmapped()
    return Understood(
        name_map=reading.name_map(label),
        weights=reading.weights(),
        notes=reading.notes,
        unmapped=unmapped,
    )


class _Names(AttentionNames):
    def read(self) -> None:
        """Find what each tensor is; what was found first stays."""
        layers = range(self.config.n_layers)
        attended = {layer: self._attention(layer) for layer in layers}
        self._exchanged(attended)
        self._returned_by_modules()
        self._splits(attended)
        self._pairs(attended)
        for layer in layers:
            self._operands(layer, attended[layer])
            self._activation(layer)
        self._streams()
        self._inputs()
        self._ends()

    def _returned_by_modules(self) -> None:
        for modules, call in self.products.items():
            if len(modules) == 1:
                for target in self._targets(modules[0])[:1]:
                    self._take(target, call["output"], FLAT)
            else:
                self._joined(modules, call)

    # Inside the MLP, and what is only seen as an input

    def _activation(self, layer: int) -> None:
        act = f"layers.{layer}.mlp.act"
        sources = [f"layers.{layer}.mlp.{leaf}" for leaf in ("pre", "gate", "up")]
        values = [x for x in map(self._value, sources) if x is not None]
        for call in self.calls:
            if call["reads"] or len(call["inputs"]) != 1 or self._layer(call["name"]) != layer:
                continue
            given, made = self.seen[call["inputs"][0]], self.seen[call["output"]]
            reads = given.shape == made.shape and any(same_values(given, x) for x in values)
            if reads and not same_values(given, made):
                self._take(act, call["output"], FLAT, instead=call["op"] == "module")

    def _inputs(self) -> None:
        """What a module of ours reads, where nothing else shows it: the stream, z, hidden."""
        for modules, call in self.products.items():
            targets = self._targets(modules[0])[:1]
            if not targets or not call["inputs"] or modules == ("embed",):
                continue
            sources = graph.inputs(self.config, targets[0])
            if len(sources) == 1 and self._value(sources[0]) is None:
                self._take(sources[0], call["inputs"][0], FLAT)

    def _streams(self) -> None:
        """What a block is given is the stream, where that came out of a module before it."""
        made = {mark(self.seen[c["output"]]) for c in self.calls if c["op"] == "module"}
        for call in self.calls:
            place = self.matched.place(call["name"])
            if place.index is None or place.rest or not call["inputs"]:
                continue
            if mark(self.seen[call["inputs"][0]]) in made:
                block = f"layers.{self.matched.layers[place.index]}"
                self._take(f"{block}.resid_pre", call["inputs"][0], FLAT)

    def _ends(self) -> None:
        """Blocks as a whole, positions, and what the module returns."""
        for call in self.calls:
            place = self.matched.place(call["name"])
            if call["op"] == "module" and place.index is not None and place.rest in ("", "(2)"):
                block = f"layers.{self.matched.layers[place.index]}"
                self._take(f"{block}.resid_post", call["output"], FLAT, instead=True)
                if call["inputs"]:
                    self._take(f"{block}.resid_pre", call["inputs"][0], FLAT)
        for layer in range(1, self.config.n_layers):
            before = self.found.get(f"layers.{layer}.resid_pre")
            if before is not None and f"layers.{layer - 1}.resid_post" not in self.found:
                self.found[f"layers.{layer - 1}.resid_post"] = before
        self._scaled_in_the_embedding()
        if "returned" in self.seen and self.seen["returned"].shape[-1] == self.sizes["V"]:
            head = self._value("logits")
            if head is None or not same_values(head, self.seen["returned"]):
                self._take("logits", "returned", FLAT, instead=True)

    def _scaled_in_the_embedding(self) -> None:
        """An embedding that the first block reads as it is has A's factor on it, if A has one."""
        rows, stream = self._value("embed"), self._value("layers.0.resid_pre")
        apart = not graph.has(self.config, "embed_scaled") or "embed_scaled" in self.found
        if not apart and rows is not None and stream is not None and same_values(rows, stream):
            self.found["embed_scaled"] = self.found.pop("embed")

    # What comes of it

    def _layout(self, ours: str, layout: Layout) -> Layout:
        """The layout, with neighbouring pairs where q or k stands so."""
        leaf = graph.leaf(ours)
        turned = any(
            is_so and leaf.startswith(f"attn.{letter}") for letter, is_so in self.neighbours.items()
        )
        return Layout(axes=layout.axes, interleaved=turned)

    def _rows(self) -> Iterator[tuple[str, tuple[tuple[str, Layout], ...]]]:
        rows = {foreign: [(ours, layout)] for ours, (foreign, layout) in self.found.items()}
        for foreign, parts in self.joined.items():
            if any(name not in self.found for name, _ in parts):
                rows[foreign] = parts
        for foreign in self.seen:
            if foreign in rows:
                parts = [(ours, self._layout(ours, layout)) for ours, layout in rows[foreign]]
                yield foreign, tuple(parts)

    def name_map(self, label: str) -> NameMap:
        """What was found as a map: a line for all layers where they agree."""
        entries: dict[str, tuple[Target, ...]] = {}
        single: dict[str, tuple[Target, ...]] = {}
        for foreign, parts in self._rows():
            place = self.matched.place(foreign)
            exact = tuple(Target(name=ours, layout=layout) for ours, layout in parts)
            layers = {names.layer_of(ours) for ours, _ in parts}
            if layers == {place.index} and place.index is not None:
                block = f"layers.{place.index}."
                general = tuple(
                    Target(name=t.name.replace(block, "layers.{N}."), layout=t.layout)
                    for t in exact
                )
                if entries.setdefault(place.pattern, general) == general:
                    continue
            single[foreign] = exact
        return NameMap(label=label, entries={**single, **entries})

    def unmapped(self) -> list[str]:
        """Real tensors of the first pass that are none of ours and no second name of one."""
        mapped = {foreign for foreign, _ in self._rows()} | self.products_of_q_and_k
        values = {mark(self.seen[name]) for name in mapped}
        parts = (self._value(ours) for _, held in self._rows() for ours, _ in held)
        values |= {mark(x) for x in parts if x is not None}
        return [
            name
            for name, x in self.seen.items()
            if not name.startswith((WEIGHTS, "step.")) and name not in mapped
            if x.is_floating_point() and x.numel() > 1 and mark(x) not in values
        ]
