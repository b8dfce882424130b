"""One change at many places, and what each does to a token's logit: layer × position, layer × head.

Each cell is a run of its own, from the layer that is changed onwards: what lies below is the clean
run's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid import graph
from pellucid.explore.predictions import text_of
from pellucid.explore.runs import ExploredRun
from pellucid.trace import trace

What = Literal["ablate", "patch"]
Over = Literal["layer,position", "layer,head"]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is changed where, and the logit that is read.

    what    ablate: set to zero; patch: take from `source`, a run of as many tokens
    over    one position of all heads, or one head at all positions, of each layer
    of      the tensor of a layer: "attn.z" (or z), "attn_out", "mlp_out", "resid_pre" …
    token, row   the logit of this token at this row
    layers, places   only these (None: all)
    """

    what: What
    over: Over
    of: str
    token: int
    row: int
    source: ExploredRun | None = None
    layers: Sequence[int] | None = None
    places: Sequence[int] | None = None

    @property
    def leaf(self) -> str:
        """The tensor's name within a layer."""
        return "attn.z" if self.of == "z" else self.of

    @property
    def index(self) -> str:
        """Python index of what is changed, without the batch axis."""
        return ":, place" if self.over == "layer,position" and self.heads else "place"

    @property
    def heads(self) -> bool:
        """Whether the tensor has an axis of heads."""
        return graph.dims(f"layers.0.{self.leaf}")[1] in ("H", "Hkv")

    def check(self, run: ExploredRun) -> None:
        """ValueError or IndexError for what the run has not."""
        config = run.loaded.config
        if not graph.known(f"layers.0.{self.leaf}") or f"layers.0.{self.leaf}" not in run:
            raise ValueError(f"of is {self.of!r}: expected a tensor of a layer, such as z, mlp_out")
        if self.over == "layer,head" and not self.heads:
            raise ValueError(f"{self.of} has no heads: sweep over layer,position")
        if "S" in graph.dims(f"layers.0.{self.leaf}"):
            raise ValueError(
                f"{self.of} is not swept: expected z, q, k, v or a tensor of the stream"
            )
        if not 0 <= self.token < config.vocab_size:
            raise ValueError(f"token {self.token}: the vocabulary is 0 to {config.vocab_size - 1}")
        if not 0 <= self.row < len(run.ids):
            raise IndexError(f"row {self.row}: this run has the tokens 0 to {len(run.ids) - 1}")
        if run.edits:
            raise ValueError("a sweep starts from a run without edits")
        if self.what == "patch":
            if self.source is None:
                raise ValueError("patch needs the run to take from (from)")
            if self.source.loaded is not run.loaded or len(self.source.ids) != len(run.ids):
                raise ValueError(
                    f"the run to take from needs the same model and {len(run.ids)} tokens, as this"
                )


def sweep(run: ExploredRun, wanted: Sweep) -> Generator[Any, None, None]:
    """A token's logit at a row with one change each, (layers, positions or heads); yields last."""
    wanted.check(run)
    config = run.loaded.config
    layers = list(range(config.n_layers)) if wanted.layers is None else list(wanted.layers)
    count = run.shape(f"layers.0.{wanted.leaf}")[0] if wanted.over == "layer,head" else len(run.ids)
    places = list(range(count)) if wanted.places is None else list(wanted.places)
    values = []
    for layer in layers:
        values.append([])
        for place in places:
            values[-1].append(float(_changed(run, wanted, layer, place)[wanted.token]))
            yield None
    columns = "head" if wanted.over == "layer,head" else "position"
    names = [str(place) for place in places]
    texts = run.tokens
    yield {
        "rows": [f"layers.{layer}" for layer in layers],
        "columns": [texts[place] for place in places] if columns == "position" else names,
        "over": wanted.over,
        "places": places,
        "values": values,
        "unit": f"logit of {text_of(run.loaded.lm, wanted.token)!r}",
        "clean": float(_logits(run, run.stream[-1], wanted.row)[wanted.token]),
        "python": python_of(run, wanted, layers, places),
    }


@torch.no_grad()
def _changed(run: ExploredRun, wanted: Sweep, layer: int, place: int) -> Tensor:
    """Logits (V) of the row with the change at one place."""
    model, config = run.loaded.model, run.loaded.config
    name = f"layers.{layer}.{wanted.leaf}"
    position = wanted.over == "layer,position"
    axis = 2 if position and wanted.heads else 1
    taken = None
    if wanted.source is not None and wanted.what == "patch":
        taken = wanted.source[name].select(axis, place)

    def change(x: Tensor) -> Tensor:
        part = x.select(axis, place)
        if taken is None:
            part.zero_()
        else:
            part.copy_(taken)
        return x

    _, places, _ = run.beginning()
    x = run.stream[layer]
    with trace(model, (), edit={name: change}):
        x = model.layers[layer](x, places[config.layer(layer)], None)
    with trace(model, ()):  # by the same steps as the clean run
        for above in range(layer + 1, config.n_layers):
            x = model.layers[above](x, places[config.layer(above)], None)
    return _logits(run, x, wanted.row)


@torch.no_grad()
def _logits(run: ExploredRun, x: Tensor, row: int) -> Tensor:
    model = run.loaded.model
    with trace(model, ()):
        return model.logits(model.norm(x)[:, row : row + 1])[0, 0]


def python_of(run: ExploredRun, wanted: Sweep, layers: Sequence[int], places: Sequence[int]) -> str:
    """Python that makes the same table, with the plain trace."""
    index, name = wanted.index, f"layers.{{layer}}.{wanted.leaf}"
    lines = ["import pellucid", "", run.loaded.python(), f"ids = {run.ids}"]
    value = "0"
    if wanted.source is not None and wanted.what == "patch":
        kept = f'only="layers.*.{wanted.leaf}"'
        lines.append(f"source = lm.trace({wanted.source.ids}, {kept})")
        value = f'source[f"{name}"][0, {index}]'
    lines += [
        "values = []",
        f"for layer in {list(layers)}:",
        "    values.append([])",
        f"    for place in {list(places)}:",
        "        def change(x):",
        f"            x[0, {index}] = {value}",
        "            return x",
        "",
        f'        seen = lm.trace(ids, only="logits", edit={{f"{name}": change}})',
        f'        values[-1].append(float(seen["logits"][0, {wanted.row}, {wanted.token}]))',
    ]
    return "\n".join(lines)
