"""Runs of prompts, kept while they are looked at, within a budget of memory.

A run keeps what each block takes in, (1, T, C) per layer, and computes everything else again when
it is asked for: the model's own block on the very same input, under a trace. So a run of 2,048
tokens through 16 layers of width 2,048 holds 143 MB in bfloat16, where its patterns alone would be
4.3 GB. What was computed again is kept as long as the budget has room; the longest unread goes
first, then the longest unread runs.

The run itself goes block by block too, so that it can be cancelled in between and others get turns.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.devices import free_memory
from pellucid.explore.edits import Edit, as_functions, read
from pellucid.explore.loaded import Loaded
from pellucid.generate import context_limit
from pellucid.language_model import LanguageModel, Prompt
from pellucid.models.attention import Mask, positions_and_mask
from pellucid.models.decoder import PlacesOf
from pellucid.prompts import check_tokens
from pellucid.trace import Trace, tap, trace

BUDGET = 1 << 30  # bytes
REMEMBERED = 4096  # dropped runs whose recipe is still known
TAIL = ("final_norm", "raw_logits", "logits")


class Gone(KeyError):
    """No such run, or one that was dropped: in one line how to make it again."""

    def __str__(self) -> str:
        return str(self.args[0])


class Shelf:
    """Tensors under keys, so many bytes of them; the longest unread goes first."""

    def __init__(self) -> None:
        self.bytes = 0
        self._held: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    def get(self, key: tuple[str, str]) -> Tensor | None:
        """The tensor, which now is the last one read."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: tuple[str, str], tensor: Tensor) -> None:
        """Keep a tensor."""
        self.drop(key)
        self._held[key] = tensor
        self.bytes += tensor.untyped_storage().nbytes()

    def drop(self, key: tuple[str, str] | None = None) -> bool:
        """Let one go, or the longest unread; whether there was one."""
        key = next(iter(self._held), None) if key is None else key
        tensor = None if key is None else self._held.pop(key, None)
        self.bytes -= 0 if tensor is None else tensor.untyped_storage().nbytes()
        return tensor is not None

    def forget(self, run: str) -> None:
        """Let all tensors of a run go."""
        for key in [key for key in self._held if key[0] == run]:
            self.drop(key)


class ExploredRun(Mapping[str, Tensor]):
    """One prompt's run; ``run["layers.3.attn.scores[5,7,3]"]`` as a trace of it would answer.

    stream      what each block takes in, and what leaves the last, (1, T, C) each
    reproduced  layer -> largest distance of the stream computed again from the kept one; 0.0: none
    """

    def __init__(
        self, owner: Runs, loaded: Loaded, ids: Sequence[int], prompt: str | None, edits: tuple
    ) -> None:
        self.loaded, self.ids, self.prompt = loaded, list(ids), prompt
        self.edits: tuple[Edit, ...] = edits
        self.stream: list[Tensor] = []
        self.reproduced: dict[int, float] = {}
        self.seconds = 0.0
        self._owner = owner
        self._taken: dict[tuple[str | None, str], Tensor] = {}  # what edits read from other runs
        self._functions = as_functions(edits, lambda *read: self._taken[read])
        told = [loaded.fingerprint, self.ids, [edit.to_json() for edit in edits]]
        self.id = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    @property
    def tokens(self) -> list[str]:
        """The text of each token; of an id that only the embedding's padding has, its number."""
        return [self.loaded.text(id) for id in self.ids]

    @property
    def bytes(self) -> int:
        """What it holds for good; tensors computed again come on top, within the budget."""
        return sum(tensor.nbytes for tensor in (*self.stream, *self._taken.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaded.names)

    def __len__(self) -> int:
        return len(self.loaded.names)

    def __contains__(self, address: object) -> bool:
        return isinstance(address, str) and names.parse(address)[0] in self.loaded.names

    def __getitem__(self, address: str) -> Tensor:
        """The tensor at an address; KeyError or IndexError, in one line, where there is none."""
        name, index = names.parse(address)
        if name not in self.loaded.names:
            near = get_close_matches(name, self, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise KeyError(f"this model has no tensor {name!r}{hint}")
        if index and isinstance(index[0], int) and graph.dims(name)[1:] == ("H", "T", "S"):
            return self._of_head(name, address, index)
        return Trace({name: self._whole(name)})[address]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor without its batch axis, without computing it."""
        config, count = self.loaded.config, len(self.ids)
        sizes = graph.sizes(config, batch=1, tokens=count, seen=count)
        if "rope." in name:
            rope = getattr(config, graph.leaf(name).partition(".")[0])
            sizes["D/2"] = config.rotary_width(rope) // 2
        return tuple(sizes[letter] for letter in graph.dims(name) if letter != "B")

    def take(self) -> Generator[float, None, None]:
        """Read what the edits need of other runs, before this one begins."""
        for edit in self.edits:
            if edit.do not in ("patch", "steer"):
                continue
            address = edit.at if edit.do == "patch" else edit.direction
            assert address is not None, "checked when the edit was made"
            other = self._owner.clean(self) if edit.source is None else self._owner.get(edit.source)
            yield from self._owner.making(other)
            self._taken[edit.source, address] = other[address].clone()

    def _of_head(self, name: str, address: str, index: names.Index) -> Tensor:
        """A part of one head's (T, S), kept alone where all heads together would be too much."""
        assert isinstance(index[0], int), "asked only then"
        held = self._owner.held((self.id, name))
        head = f"{name}[{index[0]}]"
        if held is None and (held := self._owner.held((self.id, head))) is not None:
            return held[index[1:]]
        whole = self._whole(name) if held is None else held
        part = Trace({name: whole})[address]
        if self._owner.held((self.id, name)) is None:
            kept = Trace({name: whole})[head].clone()
            self._owner.keep((self.id, head), kept)
        return part

    def _whole(self, name: str) -> Tensor:
        """A tensor with its batch axis: kept, or computed again."""
        layer = names.layer_of(name)
        kept = self._owner.held((self.id, name))
        if kept is not None:
            return kept
        if layer is not None and name.endswith(".resid_post"):
            return self.stream[layer + 1]
        if layer is not None and name.endswith(".resid_pre") and name not in self._functions:
            return self.stream[layer]
        seen = self.again(name)
        for found in sorted(seen, key=lambda found: found == name):  # the one asked for comes last
            self._owner.keep((self.id, found), seen[found])
        return seen[name]

    @torch.no_grad()
    def again(self, name: str, only: Sequence[str] = ("*",)) -> Trace:
        """Compute the part of the model that has a tensor again: its layer, the beginning, the end.

        Where all of a layer would be more than the budget has room for, `name` alone and what has
        no S axis.
        """
        layer = names.layer_of(name)
        if layer is None:
            return self._end(name) if name in TAIL else self.beginning()[2]
        whole = [n for n in self if names.layer_of(n) == layer]
        if only == ("*",) and self._owner.too_much(sum(map(self._size, whole))):
            only = [n for n in whole if n == name or graph.dims(n)[-1] != "S"]
        places = self.beginning()[1]
        left, seen = self.block(layer, self.stream[layer], places, only)
        kept = self.stream[layer + 1]
        same = torch.equal(left, kept)
        self.reproduced[layer] = 0.0 if same else float((left - kept).abs().double().max())
        return seen

    def block(
        self, layer: int, x: Tensor, places: PlacesOf, only: Sequence[str] = ()
    ) -> tuple[Tensor, Trace]:
        """One block on x (1, T, C), with this run's edits: what leaves it, and the names kept."""
        edits = self._edits(lambda name: names.layer_of(name) == layer)
        model = self.loaded.model
        with trace(model, only, edit=edits) as seen:
            return model.layers[layer](x, places[self.loaded.config.layer(layer)], None), seen

    @torch.no_grad()
    def beginning(self) -> tuple[Tensor, PlacesOf, Trace]:
        """The stream before the first block, what layers need of positions, the names of both."""
        model = self.loaded.model
        tokens = torch.tensor([self.ids], device=model.device)
        positions, allowed = positions_and_mask(tokens, 0, None)
        given = {"tokens": tokens, "positions": positions, "mask": allowed}
        edits = self._edits(lambda name: names.layer_of(name) is None and name not in TAIL)
        with trace(model, edit=edits) as seen:
            x = model.embedded(tokens, positions, tokens.shape[1])
            places = model.places(positions, Mask(allowed, plain=True), x.dtype)
        return x, places, Trace({**given, **seen})

    def _end(self, name: str) -> Trace:
        if name != "final_norm" and not self.fits("logits"):
            size = self._size("logits") / 1e9
            raise ValueError(f"all logits are {size:.1f} GB: ask for a row of them (logits?row=)")
        return self.end(self.stream[-1], logits=name != "final_norm")

    @torch.no_grad()
    def end(self, x: Tensor, *, logits: bool = True, edited: bool = True) -> Trace:
        """The names after the last block, of its output x (1, T, C)."""
        model = self.loaded.model
        edits = self._edits(lambda name: name in TAIL) if edited else {}
        edits = edits if logits else {k: v for k, v in edits.items() if k == "final_norm"}
        with trace(model, edit=edits) as seen:
            x = tap(model, "final_norm", model.norm(x))
            if logits:
                model.logits(x)
        return seen

    @torch.no_grad()
    def logits(self, row: int, name: str = "logits") -> Tensor:
        """Logits (V) of one row: of the whole product where the budget has room for it.

        A row computed alone may differ from the whole in the last bits. name  or "raw_logits"
        """
        row = range(len(self.ids))[row]
        if self.fits("logits"):
            return self[f"{name}[{row}]"]
        if any(edit.name in TAIL[1:] for edit in self.edits):
            raise ValueError("logits are changed by this run and too large to hold: shorten it")
        with trace(self.loaded.model) as seen:
            self.loaded.model.logits(self["final_norm"][:, row : row + 1])
        return seen[name][0, 0]

    def fits(self, name: str) -> bool:
        """Whether the budget has room for all of a tensor."""
        return not self._owner.too_much(self._size(name))

    def _size(self, name: str) -> int:
        count = len(self.ids)
        sizes = graph.sizes(self.loaded.config, batch=1, tokens=count, seen=count)
        return graph.elements(name, sizes) * max(4, self.loaded.lm.dtype.itemsize)

    def _edits(self, inside: Any) -> dict[str, Any]:
        return {name: function for name, function in self._functions.items() if inside(name)}

    def compute(self) -> Generator[float, None, None]:
        """Run the prompt; yields the share that is done after each block."""
        began = time.perf_counter()
        x, places, _ = self.beginning()
        self.stream = [x]
        for layer in range(self.loaded.config.n_layers):
            yield layer / self.loaded.config.n_layers
            with torch.no_grad():
                self.stream.append(self.block(layer, self.stream[-1], places)[0])
        self.seconds = time.perf_counter() - began

    def python(
        self,
        variable: str = "seen",
        known: set[str] | None = None,
        only: Sequence[str] = (),
    ) -> str:
        """Python that repeats this run; its trace, of the names in `only`, is called `variable`.

        known  runs that stand in the text already: they are not repeated
        """
        known = set() if known is None else known
        lines, sources = [], {}
        if not known:
            lines += ["import pellucid", "", self.loaded.python()]
        known.add(self.id)
        for edit in self.edits:
            if edit.do not in ("patch", "steer") or edit.source in sources:
                continue
            source = (self._owner.clean(self) if edit.source is None
                      else self._owner.get(edit.source))  # fmt: skip
            sources[edit.source] = f"source_{len(known)}"
            lines += [source.python(sources[edit.source], known)]
        by_name: dict[str, list[Edit]] = {}
        for edit in self.edits:
            by_name.setdefault(edit.name, []).append(edit)
        edits = []
        for number, (name, own) in enumerate(by_name.items()):
            function = f"change_{variable}_{number}"
            body = [f"    {edit.python(sources.get(edit.source, ''))}" for edit in own]
            lines += ["", f"def {function}(x):", *body, "    return x", ""]
            edits.append(f'"{name}": {function}')
        given = f", edit={{{', '.join(edits)}}}" if edits else ""
        kept = f", only={list(only)}" if only else ""
        lines.append(f"{variable} = lm.trace({self.ids}{kept}{given})")
        return "\n".join(lines)

    def python_of(self, address: str) -> str:
        """Python that reads one address of this run."""
        return f"{self.python()}\nvalue = {read(address, 'seen')}"


class Runs:
    """The runs of some models; `budget` is what they may hold together, in bytes."""

    def __init__(self, models: Mapping[str, LanguageModel], budget: int = BUDGET) -> None:
        self.models = {name: Loaded(name, lm) for name, lm in models.items()}
        self.budget = budget
        self._runs: OrderedDict[str, ExploredRun] = OrderedDict()
        self._recipes: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._shelf = Shelf()
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """What is held now."""
        return self._shelf.bytes + sum(run.bytes for run in self._runs.values())

    def get(self, id: str) -> ExploredRun:
        """A run; `Gone` where there is none."""
        with self._lock:
            if id in self._runs:
                self._runs.move_to_end(id)
                return self._runs[id]
            recipe = self._recipes.get(id)
        if recipe is None:
            raise Gone(f"no run {id!r} on this server: run its prompt again (POST /api/runs)")
        again = json.dumps(recipe, ensure_ascii=False)
        raise Gone(f"run {id} was dropped to make room: run it again with POST /api/runs {again}")

    def run(self, model: str, prompt: Prompt, edits: Sequence[Edit] = ()) -> ExploredRun:
        """The run of a prompt, text or ids, with these edits; kept, or made now."""
        made = self.prepare(model, prompt, edits)
        for _ in self.making(made):
            pass
        return self._runs.get(made.id, made)

    def prepare(self, model: str, prompt: Prompt, edits: Sequence[Edit] = ()) -> ExploredRun:
        """A run that is yet to be made (`making`), or the one that is there.

        Raises ValueError for what cannot be run, `Gone` for an edit from a run that is not here.
        """
        if model not in self.models:
            raise ValueError(f"model {model!r} is not here; there is {', '.join(self.models)}")
        loaded = self.models[model]
        ids = loaded.lm.encode(prompt)
        check_tokens(ids, loaded.config)
        limit = context_limit(loaded.config)
        if len(ids) > limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context of {model} holds {limit}: shorten "
                f"it by {len(ids) - limit}"
            )
        for edit in edits:
            edit.check(loaded.config)
            if edit.source is not None:
                self.get(edit.source)
        text = prompt if isinstance(prompt, str) else None
        made = ExploredRun(self, loaded, ids, text, tuple(edits))
        with self._lock:
            return self._runs.get(made.id, made)

    def making(self, run: ExploredRun) -> Generator[float, None, None]:
        """Compute a run and keep it; yields the share that is done.

        ValueError where it is too large for the budget or the memory.
        """
        if run.stream:
            return
        size, count = run.loaded.lm.dtype.itemsize, len(run.ids)
        config = run.loaded.config
        stays = (config.n_layers + 1) * count * config.width * size
        if stays > self.budget:
            raise ValueError(
                f"this run would hold {stays / 1e9:.2f} GB, the budget is {self.budget / 1e9:.2f} "
                "GB: shorten the prompt"
            )
        passing = 4 * config.n_heads * count**2 * max(size, 4)
        free = free_memory(run.loaded.lm.device)
        if stays + passing > free:
            raise ValueError(
                f"a block of this run needs {passing / 1e9:.1f} GB for a moment, and "
                f"{free / 1e9:.1f} GB are free: shorten the prompt"
            )
        yield from run.take()
        yield from run.compute()
        with self._lock:
            self._runs[run.id] = run
            self._make_room(keep=run.id)

    def clean(self, run: ExploredRun) -> ExploredRun:
        """The run of the same tokens without edits, made (`making`) or not."""
        found = ExploredRun(self, run.loaded, run.ids, run.prompt, ())
        with self._lock:
            return self._runs.get(found.id, found)

    def held(self, key: tuple[str, str]) -> Tensor | None:
        """A tensor that was computed again and is still kept."""
        with self._lock:
            return self._shelf.get(key)

    def keep(self, key: tuple[str, str], tensor: Tensor) -> None:
        """Keep a tensor while there is room; one that would take more than a part of it is not."""
        with self._lock:
            if key[0] in self._runs and not self.too_much(tensor.nbytes):
                self._shelf.put(key, tensor)
                self._make_room(keep=key[0])

    def too_much(self, size: int) -> bool:
        """Whether so many bytes are more than a quarter of the budget."""
        return size > self.budget // 4

    def _make_room(self, keep: str) -> None:
        while self.bytes > self.budget and self._shelf.drop():
            pass
        for id in list(self._runs):
            if self.bytes <= self.budget:
                break
            if id != keep:
                run = self._runs.pop(id)
                edits = [edit.to_json() for edit in run.edits]
                self._recipes[id] = {"model": run.loaded.name, "ids": run.ids, "edits": edits}
                while len(self._recipes) > REMEMBERED:
                    self._recipes.popitem(last=False)
