"""Attention of a foreign recording: its operands, how joined products are cut, pairs of RoPE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from pellucid import graph, names
from pellucid.checkpoints.formats.meta import half_split
from pellucid.diff.sides.foreign_layouts import (
    SCALED,
    even_factor,
    laid_out,
    pairs_turned,
    same_values,
    split_joined,
    splits_of,
)
from pellucid.diff.sides.foreign_reading import APART, FLAT, Call, Reading, local_names
from pellucid.diff.sides.layouts import lay_out


class AttentionNames(Reading):
    """Which tensors of a foreign module are those of attention."""

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

    def _exchanged(self, attended: Mapping[int, Mapping[str, str]]) -> None:
        """Keys and values by use, where the weights of one stand in the place of the other."""
        said = Counter()
        for layer, roles in attended.items():
            calls = [self.products.get((f"layers.{layer}.attn.{x}_proj",)) for x in "kv"]
            if "value" not in roles or any(call is None for call in calls):
                continue
            ours = f"layers.{layer}.attn.v"
            value = self.seen[roles["value"]]
            layout = laid_out(value, ours, self.sizes, APART)
            if layout is not None:
                flat = lay_out(value, layout, graph.dims(ours), self.sizes)
                flat = flat.transpose(1, 2).flatten(2)
                same = [same_values(self.seen[call["output"]], flat) for call in calls if call]
                said["exchanged" if same == [True, False] else "plain"] += 1
        if said["exchanged"] > said["plain"]:
            letters = {"attn.k_proj": "attn.v_proj", "attn.v_proj": "attn.k_proj"}
            for pattern, parts in self.matched.parts.items():
                stem, _, kind = parts[0].rpartition(".")
                if len(parts) == 1 and stem in letters:
                    self.matched.parts[pattern] = (f"{letters[stem]}.{kind}",)
            self.products = self._products()

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
            if role in ("query", "key") and self._is_scaled(ours, roles, role):
                continue
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

    def _is_scaled(self, ours: str, roles: Mapping[str, str], role: str) -> bool:
        """Whether the code multiplied queries (and not keys) by a number before their product.

        They are then none of our tensors: the scale is judged with the scores.
        """
        grown: dict[str, float | None] = {}
        for this in ("query", "key"):
            name = self._names_of_operands(names.layer_of(ours) or 0)[this]
            source = graph.inputs(self.config, name)[0] if name.endswith("_rotated") else name
            before, x = self._value(source), self.seen[roles[this]]
            layout = laid_out(x, name, self.sizes, APART)
            if before is None or layout is None:
                return False
            after = lay_out(x, layout, graph.dims(name), self.sizes)
            grown[this] = even_factor(before, after)
        mine, other = grown[role], grown["key" if role == "query" else "query"]
        both = mine is not None and other is not None and abs(mine / other - 1) < SCALED
        return mine is not None and abs(mine - 1) > SCALED and not both

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
            x = self.seen[call["output"]]
            if self._order(modules) != modules and same_values(
                split_joined(x, "concat", modules, self.config, dim=-1)[-1], flat
            ):  # the weights stand in another order, and the code does not know it
                self.plain_order.add(local_names(modules))
                self._joined(modules, call)
            for split in splits_of(modules, self.config):
                part = split_joined(x, split, modules, self.config, dim=-1)[-1]
                if same_values(part, flat) and split != "concat":
                    if local_names(modules) not in self.splits:
                        said = " and ".join(local_names(modules))
                        self.notes.append(f"{said} are joined by {split} in B")
                    self.splits[local_names(modules)] = split
                    del self.joined[call["output"]]
                    break

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


def _most(said: list[str | None]) -> str | None:
    known = [word for word in said if word is not None]
    return max(sorted(set(known)), key=known.count) if known else None
