"""Runs the steps of the walk over one model and yields what each of them computed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pellucid import graph
from pellucid.models import Config, Layer
from pellucid.numerics import Dialect
from pellucid.walk.steps import Line, Picture, Scope, Script, Step, Words, renamed


class NamedValue(NamedTuple):
    """A value in the namespace, the step that shows it, and what later steps call their input."""

    value: Any
    step: Step | None = None
    labels: tuple[str, ...] = ()


class LayerSteps(NamedTuple):
    """The steps of a kind of layer: before its heads, of each head, after them.

    expiring   variable of a line -> the values that no later line names
    stands_in  variable of a line that is left out -> the variable whose value takes its place
    """

    opening: Sequence[Line]
    of_a_head: Sequence[Line]
    closing: Sequence[Line]
    expiring: Mapping[str, list[tuple[Scope, str]]]
    stands_in: Mapping[str, str]


class WalkRunner:
    """A namespace per scope (once, RoPE, layer, key/value head, head) and functions to fill it.

    A value lives until the last step that names it, a weight for the one call that asks for it.
    So the memory is one weight, wq, wk and wv of one layer (its heads share them), and the
    activations. `silent`: also yield the steps without a title.
    """

    def __init__(
        self,
        script: Script,
        config: Config,
        weights: Mapping[str, Tensor],
        dialect: Dialect,
        dtype: torch.dtype,
        *,
        silent: bool = False,
        tokens: Tensor,
        **values: Any,
    ) -> None:
        self.config, self.weights, self.dtype, self.silent = config, weights, dtype, silent
        self.weight_names = dict(script.weights)
        if config.tied:
            self.weight_names["unembed"] = self.weight_names["embedding"]

        first, last = _span(script.lines, ("layer", "kv_head", "head"))
        before, block, after = script.lines[:first], script.lines[first:last], script.lines[last:]
        self.outside = stand_ins([*before, *after], config, None)
        self.before, self.after = _needed(before, config, None), _needed(after, config, None)
        self.begins = before[-1].variable  # the stream; left out, what stands in for it
        self.kinds = {kind: self._block(block, kind) for kind in dict.fromkeys(config.kinds)}
        self.block = self.kinds[config.layer(0)]

        fixed = {
            "dialect": dialect,
            "dtype": dtype,
            "tokens": tokens,
            "token_count": len(tokens),
            "device": tokens.device,
            "wide": torch.promote_types(dtype, torch.float32),
            "group": config.n_heads // config.n_kv_heads,
            "original_context": config.rope and config.rope.original_context,
            **values,
        }
        steps = {line.name for line in script.lines}  # tokens: given, and shown as a step
        self.scopes: dict[Scope, dict[str, NamedValue]] = {
            "head": {},
            "kv_head": {},
            "layer": {},
            "rope": {},
            "once": {
                name: NamedValue(value, labels=(name,) if name in steps else ())
                for name, value in fixed.items()
            },
        }
        self.ropes = {kind.rope: _of_rope(config, kind.rope) for kind in config.kinds}
        self.rope = ""  # of the layer at work
        self.told: set[str] = set()  # addresses: what is computed once is shown once

    def _block(self, lines: Sequence[Line], kind: Layer) -> LayerSteps:
        needed = _needed(lines, self.config, kind)
        stands_in = self.outside | stand_ins(lines, self.config, kind)
        first, last = _span(needed, ("kv_head", "head"))
        expiring = _expiring(needed, first, last, stands_in)
        parts = needed[:first], needed[first:last], needed[last:]
        return LayerSteps(*parts, expiring, stands_in)

    def walk(self, layers: Collection[int], heads: Sequence[int]) -> Iterator[Step]:
        """Every step, in order: `heads` of `layers` in full, every other layer as one step."""
        yield from self._run(self.before)
        begins = self.outside.get(self.begins, self.begins)
        self.scopes["once"]["stream"] = self.scopes["once"][begins]
        for layer in range(self.config.n_layers):
            yield from self._layer(layer, heads if layer in layers else ())
        yield from self._run(self.after)

    def part(self, layer: int, head: int, stream: Tensor) -> Iterator[Step]:
        """The steps before all layers, then those of one that takes in `stream`, or of the end."""
        yield from self._run(self.before)
        self.scopes["once"]["stream"] = NamedValue(stream)
        last = layer == self.config.n_layers
        yield from self._run(self.after) if last else self._layer(layer, [head])

    def _layer(self, layer: int, heads: Sequence[int]) -> Iterator[Step]:
        """One layer; `heads` come first and are shown, no `heads`: the layer is one step."""
        show = len(heads) > 0
        stream = self.scopes["once"]["stream"]
        kind = self.config.layer(layer)
        self.block, self.rope = self.kinds[kind], kind.rope
        self.scopes["rope"] = self.ropes[kind.rope]
        self.scopes["layer"] = {"layer": NamedValue(layer)}
        yield from self._run(self.block.opening, show)
        z: dict[int, NamedValue] = {}
        for head in sorted(range(self.config.n_heads), key=lambda head: head not in heads):
            self._enter_head(head)
            yield from self._run(self.block.of_a_head, show and head in heads)
            z[head] = self.scopes["head"]["z"]
        self.scopes["head"], self.scopes["kv_head"] = {}, {}
        labels = tuple(label for head in sorted(heads) for label in z[head].labels)
        self.scopes["layer"]["z_of_heads"] = NamedValue(
            [z[h].value for h in sorted(z)], None, labels
        )
        yield from self._run(self.block.closing, show)
        leaving = self.scopes["layer"][self.block.closing[-1].variable]
        self.scopes["layer"] = {}
        self.scopes["once"]["stream"] = leaving
        if not show and leaving.step is not None:
            yield _folded(leaving.step, layer, stream)

    def _enter_head(self, head: int) -> None:
        kv_head = head // self.scopes["once"]["group"].value
        current = self.scopes["kv_head"].get("kv_head")
        if current is None or current.value != kv_head:
            self.scopes["kv_head"] = {"kv_head": NamedValue(kv_head)}
        self.scopes["head"] = {"head": NamedValue(head)}

    def _run(self, lines: Sequence[Line], show: bool = True) -> Iterator[Step]:
        """Compute each line that its scope has not yet; yield what is to be shown now."""
        for line in lines:
            if not (show or line.needed):
                continue
            scope = self.scopes[line.per]
            if line.variable not in scope:
                held = self._compute(line)
                if held is None:
                    continue
                scope[line.variable] = held
            step = scope[line.variable].step
            for per, variable in self.block.expiring.get(line.variable, ()):
                self.scopes[per].pop(variable, None)
            told = step is None or step.address in self.told
            if show and step is not None and not told and (line.title or self.silent):
                self.told.add(step.address)
                yield step
            held = step = None  # the caller may take long over a step: hold nothing meanwhile

    @torch.no_grad()
    def _compute(self, line: Line) -> NamedValue | None:
        """Call the function of a line; None where what it asks for was not given to the walk."""
        inputs = {
            argument: self._look_up(self.block.stands_in.get(argument, argument))
            for argument in line.arguments
        }
        if any(held.value is None for held in inputs.values()):
            return None
        value = line.function(**{argument: held.value for argument, held in inputs.items()})
        labels = tuple(dict.fromkeys(label for held in inputs.values() for label in held.labels))
        if not line.name:
            return NamedValue(value, None, labels)
        step = self._step(line, value, inputs, labels)
        return NamedValue(value, step, (step.address,) if line.title else labels)

    def _look_up(self, name: str) -> NamedValue:
        """A step's value, a name of the runner, a weight, a bias or a field of the config."""
        for scope in self.scopes.values():
            if name in scope:
                return scope[name]
        weight = name.removesuffix("_stored").removesuffix("_head")
        if weight not in self.weight_names:
            return NamedValue(getattr(self.config, name))
        full = self._numbered(self.weight_names[weight])
        if full not in self.weights:
            absent = 0 if full.endswith("bias") else 1  # added to nothing, or multiplying nothing
            if absent and (self.config.norm_weight or not full.endswith("norm.weight")):
                raise ValueError(f"the walk needs the weight {full}: the checkpoint has none")
            return NamedValue(absent)
        tensor = self.weights[full].detach()
        if name.endswith("_stored"):
            return NamedValue(tensor, labels=(full,))
        if name.endswith("_head"):
            heads = tensor.unflatten(0, (-1, self.config.head_dim))
            at = "head" if len(heads) == self.config.n_heads else "kv_head"
            tensor = heads[self._look_up(at).value]
        return NamedValue(tensor.to(self.dtype), labels=(full,))

    def _step(
        self, line: Line, value: Any, inputs: Mapping[str, NamedValue], labels: tuple[str, ...]
    ) -> Step:
        at = self._look_up(line.index).value if line.index else None
        name, index = self._numbered(line.name), (at,) if isinstance(at, int) else ()
        dims = line.dims
        if dims is None:  # the walk has no batch axis, and an index takes another
            dims = tuple(letter for letter in graph.dims(name) if letter != "B")[len(index) :]
        numbers = {key: held.value for scope in self.scopes.values() for key, held in scope.items()}
        return Step(
            name=name,
            title=self._worded(line.title).format(**numbers),
            formula=self._formula(line, value, inputs),
            value=value,
            dims=dims,
            source=self._source(line),
            picture=line.picture or picture_of(value, dims),
            inputs=tuple(label for label in labels if label != name),
            index=index,
        )

    def _worded(self, words: Words) -> str:
        layer = self.scopes["layer"].get("layer")
        kind = None if layer is None else self.config.layer(layer.value)
        return words if isinstance(words, str) else words(self.config, kind)

    def _formula(self, line: Line, value: Any, inputs: Mapping[str, NamedValue]) -> str:
        """The line's formula with shapes; a weight or bias that is absent leaves no trace."""

        def with_shape(found: re.Match[str]) -> str:
            sign, argument = found[1] or "", found[2]
            held = inputs[argument].value
            weight = argument.removesuffix("_stored").removesuffix("_head")
            if sign and weight in self.weight_names and not isinstance(held, Tensor):
                return ""
            name = self.block.stands_in.get(argument, argument)
            return sign + _written(_shown(name).removesuffix("_stored"), held)

        text = re.sub(r"( [+×] |, | with )?{(\w+)}", with_shape, self._worded(line.formula))
        return f"{text} → {_written('', value)}".lstrip()

    def _source(self, line: Line) -> str:
        """The line's code, with this layer's number and the names this config's values go by."""
        names = {argument: argument for argument in line.arguments} | dict(self.block.stands_in)
        shown = {name: _shown(value) for name, value in names.items()}
        return "\n\n".join((self._numbered(renamed(line.body, shown)), *line.helpers))

    def _numbered(self, name: str) -> str:
        if name.startswith("rope."):
            return name.replace("rope", self.rope, 1)
        layer = self.scopes["layer"].get("layer")
        return name if layer is None else name.replace("layers.N.", f"layers.{layer.value}.")


def _of_rope(config: Config, name: str) -> dict[str, NamedValue]:
    """What the steps of a RoPE find under their names, at first."""
    rope = getattr(config, name) if name else None
    pairs = config.rotary_width(rope) // 2 if rope else 0
    return {"rope": NamedValue(rope), "pairs": NamedValue(pairs)} if rope else {}


def _needed(lines: Sequence[Line], config: Config, kind: Layer | None) -> list[Line]:
    return [line for line in lines if line.when(config, kind)]


def stand_ins(lines: Sequence[Line], config: Config, kind: Layer | None) -> dict[str, str]:
    """Variable of a line that is left out -> the variable whose value takes its place."""
    there = {line.variable for line in _needed(lines, config, kind)}
    next_one = {line.variable: line.stand_in for line in lines if line.variable not in there}

    def resolved(variable: str) -> str:
        return resolved(next_one[variable]) if variable in next_one else variable

    return {variable: resolved(variable) for variable in next_one}


def _shown(variable: str) -> str:
    """A variable as formulas and sources show it: both q_normed are called by their name."""
    return variable.removesuffix("_last")


def _written(name: str, value: Any) -> str:
    """``name[17,128]`` for a tensor or strings; a single number or word as it is."""
    if isinstance(value, Tensor):
        return name + str(list(value.shape)).replace(" ", "") if value.ndim else f"{value.item()}"
    if isinstance(value, int | float):
        return f"{value:g}"
    return value if isinstance(value, str) else f"{name}[{len(value)}]"


def picture_of(value: Any, dims: tuple[str, ...]) -> Picture | None:
    """How a value of these dims is best drawn: by its tokens; None: there is nothing to see."""
    if not isinstance(value, Tensor):
        return "text"
    if dims == ("T", "S"):
        return "attention"
    return "heatmap" if dims == ("H", "T", "D") or (len(dims) == 2 and dims[0] == "T") else None


def _folded(last: Step, layer: int, stream: NamedValue) -> Step:
    """A layer as one step: what leaves it."""
    return replace(
        last,
        title=f"Layer {layer}, all of it: the same steps with its own weights",
        formula=f"layer {layer} of {_written('stream', stream.value)} → {_written('', last.value)}",
        source="",
        inputs=stream.labels,
    )


def _span(lines: Sequence[Line], scopes: Collection[Scope]) -> tuple[int, int]:
    """First and last (exclusive) place of the lines that are computed per one of `scopes`."""
    places = [place for place, line in enumerate(lines) if line.per in scopes]
    return places[0], places[-1] + 1


def _expiring(
    block: Sequence[Line], first: int, last: int, stands_in: Mapping[str, str]
) -> dict[str, list[tuple[Scope, str]]]:
    """Variable of a line -> the values that no later line of a layer names.

    Lines `first` to `last` run once per head: what all heads share lives until they are done.
    """
    reader = {line.variable: place for place, line in enumerate(block)}
    for place, line in enumerate(block):
        for argument in line.arguments:
            variable = stands_in.get(argument, argument)
            if variable in reader:
                reader[variable] = place
    expiring: dict[str, list[tuple[Scope, str]]] = {}
    for line in block:
        place = reader[line.variable]
        if line.per == "layer" and first <= place < last:
            place = last
        taken_by_the_runner = line.variable in ("z", block[-1].variable)
        if line.per in ("layer", "head") and not taken_by_the_runner:
            expiring.setdefault(block[place].variable, []).append((line.per, line.variable))
    return expiring
