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

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.checkpoints.formats.meta import half_split
from pellucid.diff.sides.foreign_layouts import laid_out, pairs_turned, split_joined, splits_of
from pellucid.diff.sides.foreign_reading import (
    APART,
    FLAT,
    Call,
    Reading,
    local_names,
    same_values,
)
from pellucid.diff.sides.layouts import Layout, lay_out
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


class _Names(Reading):
    def read(self) -> None:
        """Find what each tensor is; what was found first stays."""
        self._returned_by_modules()
        layers = range(self.config.n_layers)
        attended = {layer: self._attention(layer) for layer in layers}
        self._splits(attended)
        self._pairs(attended)
        for layer in layers:
            self._operands(layer, attended[layer])
            self._activation(layer)
        self._inputs()
        self._ends()

    def _returned_by_modules(self) -> None:
        for modules, call in self.products.items():
            if len(modules) == 1:
                for target in self._targets(modules[0])[:1]:
                    self._take(target, call["output"], FLAT)
            else:
                self._joined(modules, call)

    def _joined(self, modules: tuple[str, ...], call: Call) -> None:
        """A product of several matrices at once, cut along its last axis."""
        x = self.seen[call["output"]]
        order = self._order(modules)
        targets = [target for module in order for target in self._targets(module)[:1]]
        widths = [graph.elements(name, self.sizes | {"B": 1, "T": 1}) for name in targets]
        if len(targets) == len(modules) and x.shape[-1] == sum(widths) and x.ndim in (2, 3):
            parts = x.split(widths, dim=-1)
            held = [laid_out(p, t, self.sizes, FLAT) for p, t in zip(parts, targets, strict=True)]
            if all(layout is not None for layout in held):
                pairs = zip(targets, held, strict=True)
                self.joined[call["output"]] = [(t, layout) for t, layout in pairs if layout]

    # Attention

    def _within(self, layer: int) -> list[Call]:
        """Calls of functions inside a block that read no weight."""
        return [
            call
            for call in self.calls
            if call["op"] != "module" and not call["reads"] and self._layer(call["name"]) == layer
        ]

    def _attention(self, layer: int) -> dict[str, str]:
        """Role in attention -> foreign name: query, key, value, mask, masked, pattern, z."""
        calls = self._within(layer)
        for call in calls:
            if call["op"] == "sdpa":
                roles = {name.rpartition(".")[2]: name for name in call["inputs"]}
                return {**roles, "z": call["output"]}
        place = next((n for n, call in enumerate(calls) if call["op"] == "softmax"), None)
        if place is None:
            return {}
        products = ("matmul", "einsum")
        before = [c for c in calls[:place] if c["op"] in products and len(c["inputs"]) == 2]
        after = [c for c in calls[place + 1 :] if c["op"] in products and len(c["inputs"]) == 2]
        softmax = calls[place]
        found = {"masked": softmax["inputs"][0], "pattern": softmax["output"]}
        if before:
            found |= dict(zip(("query", "key"), before[-1]["inputs"], strict=True))
            self.products_of_q_and_k.add(before[-1]["output"])
        if after:
            found |= dict(zip(("pattern", "value"), after[0]["inputs"], strict=True))
            found["z"] = after[0]["output"]
        return found

    def _names_of_operands(self, layer: int) -> dict[str, str]:
        block = f"layers.{layer}.attn"
        q, k = graph.inputs(self.config, f"{block}.scores")
        v = graph.inputs(self.config, f"{block}.z")[1]
        masked, pattern, z = (f"{block}.{leaf}" for leaf in ("masked_scores", "pattern", "z"))
        return {"query": q, "key": k, "value": v, "masked": masked, "pattern": pattern, "z": z}

    def _operands(self, layer: int, roles: Mapping[str, str]) -> None:
        for role, ours in self._names_of_operands(layer).items():
            if role not in roles:
                continue
            before = self._value(ours)
            kept = self.found.pop(ours, None)
            if not self._take(ours, roles[role], APART):
                if kept is not None:
                    self.found[ours] = kept
                continue
            now = self._value(ours)
            if before is not None and now is not None and same_values(before, now):
                del self.found[ours]  # as its projection gave it: that name says more
                if kept is not None:
                    self.found[ours] = kept
        if "mask" in roles:
            windowed = self.config.layer(layer).window
            self._take("window_mask" if windowed else "mask", roles["mask"], APART)

    def _splits(self, attended: Mapping[int, Mapping[str, str]]) -> None:
        """How B's code takes joined products apart, by the values that its attention reads."""
        for modules, call in self.products.items():
            layer = names.layer_of(modules[0] + ".")
            if len(modules) < 2 or layer is None or "value" not in attended[layer]:
                continue
            ours = f"layers.{layer}.attn.v"
            layout = laid_out(self.seen[attended[layer]["value"]], ours, self.sizes, APART)
            if layout is None or call["output"] not in self.joined:
                continue
            value = lay_out(
                self.seen[attended[layer]["value"]], layout, graph.dims(ours), self.sizes
            )
            flat = value.transpose(1, 2).flatten(2)
            for split in splits_of(modules, self.config):
                x = self.seen[call["output"]]
                part = split_joined(x, split, modules, self.config, dim=-1)[-1]
                if same_values(part, flat) and split != "concat":
                    if local_names(modules) not in self.splits:
                        said = " and ".join(local_names(modules))
                        self.notes.append(f"{said} are joined by {split} in B")
                    self.splits[local_names(modules)] = split
                    del self.joined[call["output"]]
                    break

    # Pairs of RoPE

    def _pairs(self, attended: Mapping[int, Mapping[str, str]]) -> None:
        """Whether q and k stand in neighbouring pairs: their weights do, and such pairs turn."""
        if self.config.rope is None or self.config.rope.share != 1:
            return
        for letter, role in (("q", "query"), ("k", "key")):
            stored = [self._stored_as(letter, layer) for layer in attended]
            turned = [
                self._turned_as(letter, layer, attended[layer].get(role)) for layer in attended
            ]
            weights, code = _most(stored), _most(turned)
            self.neighbours[letter] = (weights == "neighbours" and code != "halves") or (
                weights is None and code == "neighbours"
            )
        if any(self.neighbours.values()):
            letters = " and ".join(letter for letter, is_so in self.neighbours.items() if is_so)
            said = "stand in neighbouring pairs in B's weights, and its RoPE turns such pairs"
            self.notes.append(f"{letters} {said}")

    def _stored_as(self, letter: str, layer: int) -> str | None:
        """The order of a projection's rows in B: neighbours, halves, None for neither."""
        ours = f"layers.{layer}.attn.{letter}_proj.weight"
        theirs, mine = self._plain_weights().get(ours), self.mine.get(ours)
        if theirs is None or mine is None or theirs.shape != mine.shape:
            return None
        heads = mine.shape[0] // self.config.head_dim
        if same_values(theirs, mine):
            return "halves"
        return "neighbours" if same_values(half_split(theirs, heads), mine) else None

    def _turned_as(self, letter: str, layer: int, operand: str | None) -> str | None:
        ours = self._names_of_operands(layer)["query" if letter == "q" else "key"]
        source = graph.inputs(self.config, ours)[0] if ours.endswith("_rotated") else ""
        before = self._value(source) if source else None
        if operand is None or before is None:
            return None
        held = self.found.pop(ours, None)
        taken = self._take(ours, operand, APART)
        after = self._value(ours) if taken else None
        self.found.pop(ours, None)
        if held is not None:
            self.found[ours] = held
        return None if after is None else pairs_turned(before, after)

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
        values = {_mark(self.seen[name]) for name in mapped}
        parts = (self._value(ours) for _, held in self._rows() for ours, _ in held)
        values |= {_mark(x) for x in parts if x is not None}
        return [
            name
            for name, x in self.seen.items()
            if not name.startswith((WEIGHTS, "step.")) and name not in mapped
            if x.is_floating_point() and x.numel() > 1 and _mark(x) not in values
        ]


def _mark(x: Tensor) -> tuple[int, int]:
    """The same for the same values in any order."""
    return x.numel(), int(x.float().contiguous().view(torch.int32).sum(dtype=torch.int64))


def _most(said: list[str | None]) -> str | None:
    known = [word for word in said if word is not None]
    return max(sorted(set(known)), key=known.count) if known else None
