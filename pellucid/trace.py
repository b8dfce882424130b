"""Name tensors while a model runs: `tap` in the models, `trace` around a run, `Trace` afterwards.

A model says ``q = tap(self, "q", q)`` with a constant leaf. No trace open: `tap` returns its tensor
and costs one look-up. While a trace is open the tensor is recorded (or replaced by an edit) under
the module's path plus the leaf, for example ``layers.3.attn.q``.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pellucid import graph, names
from pellucid.edits import Edit, Edits
from pellucid.files import file_beside, parse_json

Globs = str | Iterable[str]
Item = TypeVar("Item")

# Set outside the forward only: setting it inside would break a compiled graph in two.
_open: ContextVar[Recorder | None] = ContextVar("pellucid.trace", default=None)


def tap(module: nn.Module, leaf: str, tensor: Tensor) -> Tensor:
    """`tensor`, or what an open trace's edit makes of it; recorded as module path + `leaf`."""
    if torch.compiler.is_compiling():
        return tensor  # a compiled graph has no taps: `trace` runs compiled code eagerly
    recorder = _open.get()
    return tensor if recorder is None else recorder.record(module, leaf, tensor)


class Recorder:
    """The open trace of one model: which names to keep, what to do to them, what was seen."""

    def __init__(
        self,
        model: nn.Module,
        only: Globs,
        edit: Mapping[str, Edit],
        gradients: bool,
        fused: bool = False,
    ) -> None:
        self.paths = {id(module): _plain(path) for path, module in model.named_modules()}
        only = (only,) if isinstance(only, str) else tuple(only)
        self.only = tuple(glob for given in only for glob in names.spellings(given))
        self.edits = Edits(edit)
        self.gradients = gradients
        self.fused = fused
        self.seen = Trace()
        self.step = 0  # decoding step; steps after the first prefix their names
        self._names: dict[tuple[int, str], str | None] = {}
        self._wanted: dict[str, bool] = {}

    def name(self, module: nn.Module, leaf: str) -> str | None:
        """Name of a leaf without its step, None for a module that is no part of the traced model.

        Decoding asks for the same names in every step: they are put together once.
        """
        key = (id(module), leaf)
        if key not in self._names:
            path = self.paths.get(id(module))
            self._names[key] = f"{path}.{leaf}" if path else (leaf if path == "" else None)
        return self._names[key]

    def keeps(self, name: str, plain: str) -> bool:
        """Whether a glob of `only` matches `name`, or `plain`, which is `name` without its step."""
        if plain not in self._wanted:
            self._wanted[plain] = self._matches(plain)
        return self._wanted[plain] or (name != plain and self._matches(name))

    def _matches(self, name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in self.only)

    def record(self, module: nn.Module, leaf: str, tensor: Tensor) -> Tensor:
        """Edit and keep `tensor`; called by `tap`."""
        plain = self.name(module, leaf)
        if plain is None:
            return tensor
        name = f"step.{self.step}.{plain}" if self.step else plain
        if self.edits:
            tensor = self.edits.apply(name, plain, tensor)
        if self.keeps(name, plain):
            if name in self.seen:
                raise RuntimeError(
                    f"{name} was seen twice in one pass: a trace needs exactly one forward pass, "
                    "without activation checkpointing; open a new trace for the next pass"
                )
            if self.gradients and tensor.requires_grad:
                tensor.retain_grad()
            self.seen[name] = tensor if self.gradients else tensor.detach()
        return tensor

    def close(self) -> None:
        """KeyError for an edit whose name never came by."""
        self.edits.check_used(name for name in self._names.values() if name is not None)


def _plain(path: str) -> str:
    """A module path without the wrapper that ``torch.compile(module)`` puts around a module."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


@contextlib.contextmanager
def trace(
    model: nn.Module,
    only: Globs = "*",
    *,
    edit: Mapping[str, Edit] | None = None,
    gradients: bool = False,
    fused: bool = False,
) -> Iterator[Trace]:
    """Record the named tensors of one pass of `model` (or of one generation, see `set_step`).

    only       glob, or several, of the names to keep: ``"layers.*.attn.pattern"``
    edit       name, glob or address -> number, tensor or function of a tensor; the result feeds the
               rest of the run (`edits`)
    gradients  keep the graph, so that after ``loss.backward()`` ``seen.grad(name)`` answers
    fused      watch the fused attention kernel instead of the named steps: of scores,
               masked_scores, pattern and z there is only z then

    Without `gradients` the pass runs under ``torch.no_grad``. Opening a trace inside another is
    an error: one tensor has one name.
    """
    recorder = Recorder(model, only, edit or {}, gradients, fused)
    with _opened(recorder):
        yield recorder.seen
    recorder.close()


def edited(model: nn.Module, passes: Iterator[Item], edit: Mapping[str, Edit]) -> Iterator[Item]:
    """What `passes` of the model give, with edits in each; nothing holds between two of them.

    KeyError at the end for an edit that met no tensor.
    """
    recorder = Recorder(model, (), edit, gradients=False)
    while True:
        with _opened(recorder):
            try:
                item = next(passes)
            except StopIteration:
                break
        yield item
    recorder.close()


@contextlib.contextmanager
def _opened(recorder: Recorder) -> Iterator[None]:
    if _open.get() is not None:
        raise RuntimeError("a trace is already open here; close it before opening another")
    token = _open.set(recorder)
    try:
        with contextlib.ExitStack() as stack:
            if not recorder.gradients:
                stack.enter_context(torch.no_grad())
            if "torch._dynamo" in sys.modules:
                stack.enter_context(_AsWritten())
            yield
    finally:
        _open.reset(token)


class _AsWritten:
    """While any trace is open, compiled modules run as written, with their taps.

    The compiler has one stance per process while traces are one per thread: the first to open
    changes it and the last to close restores it, in whatever order they end.
    """

    lock: ClassVar = threading.Lock()
    traces: ClassVar[int] = 0
    stance: ClassVar[Any] = None

    def __enter__(self) -> None:
        with self.lock:
            if not _AsWritten.traces:
                _AsWritten.stance = torch.compiler.set_stance("force_eager")
            _AsWritten.traces += 1

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            _AsWritten.traces -= 1
            if not _AsWritten.traces:
                _AsWritten.stance.__exit__(None, None, None)


def set_step(step: int) -> None:
    """Say which decoding step comes next; a no-op while no trace is open."""
    recorder = _open.get()
    if recorder is not None:
        recorder.step = step


def is_open() -> bool:
    """Whether a trace is open in this context."""
    return not torch.compiler.is_compiling() and _open.get() is not None


def names_steps() -> bool:
    """Whether attention is to take the named steps: a trace is open that does not ask for fused."""
    recorder = None if torch.compiler.is_compiling() else _open.get()
    return recorder is not None and not recorder.fused


def backward(value: Tensor, seen: Trace) -> None:
    """Gradients of one number at every tensor of an open trace; the parameters' stay untouched.

    ValueError for what is not one number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"gradients gave {given}: expected one number of the logits (B, T, V), as in "
            "lambda logits: logits[0, -1].max()"
        )
    kept = [tensor for tensor in seen.values() if tensor.requires_grad]
    torch.autograd.backward(value, inputs=kept)


class Trace(MutableMapping[str, Tensor]):
    """The named tensors of a run, in order; an ordered mapping from address to tensor.

    ``seen["layers.0.attn.pattern"]`` is the tensor as recorded; with an index,
    ``seen["layers.0.attn.pattern[3]"]``, the batch axis is left out when B is 1.
    Values have the dtype of the run; NumPy has no bfloat16, so ``seen[name].float().numpy()``.
    `meta` says where it comes from: model, dtype, dialect, tokens, token_strings, versions.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor] | None = None, meta: dict | None = None
    ) -> None:
        self._tensors: dict[str, Tensor] = dict(tensors or {})
        self.meta: dict[str, Any] = dict(meta or {})

    def __getitem__(self, address: str) -> Tensor:
        name, index = names.parse(address)
        name = self._own(name)
        tensor = self._tensors[name]
        if not index:
            return tensor
        if graph.has_batch(name) and tensor.shape[0] == 1:
            tensor = tensor[0]
        if len(index) > tensor.ndim:
            raise IndexError(
                f"{address}: {len(index)} indices for a tensor of shape {tuple(tensor.shape)}"
            )
        try:
            return tensor[index]
        except (IndexError, ValueError):  # ValueError: a slice with a step below 1
            raise IndexError(
                f"{address}: no such part of a tensor of shape {tuple(tensor.shape)}"
            ) from None

    def __contains__(self, address: object) -> bool:
        if address in self._tensors:
            return True
        return isinstance(address, str) and any(
            each in self._tensors for each in names.spellings(names.parse(address)[0])
        )

    def _own(self, name: str) -> str:
        """The name under which a tensor is held; KeyError where there is none."""
        for each in names.spellings(name):
            if each in self._tensors:
                return each
        from difflib import get_close_matches

        near = get_close_matches(name, self._tensors, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise KeyError(f"no tensor {name!r} among the {len(self._tensors)} of this trace{hint}")

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Trace({len(self)} tensors, {self.nbytes / 1e6:,.1f} MB)"

    def _repr_html_(self) -> str:
        """A table for notebooks: every name with its shape and its numbers in short."""
        from pellucid.notebook import summary, table

        head = ("name", "shape", "dtype", "min", "max", "mean")
        return f"<p>{self!r}</p>" + table(head, [(n, *summary(t)) for n, t in self.items()])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def grad(self, address: str) -> Tensor:
        """Gradient at a named tensor, after ``backward()`` on a run traced with `gradients`."""
        name, bracket, index = address.partition("[")
        name = self._own(name)
        gradient = self._tensors[name].grad
        if gradient is None:
            raise ValueError(
                f"{name} has no gradient: give lm.trace a function of the logits as gradients; "
                "trace(model, gradients=True) needs a backward() on what depends on it"
            )
        return Trace({name: gradient})[f"{name}{bracket}{index}"]

    def dims(self, name: str) -> tuple[str, ...]:
        """Letters of a tensor's axes: from the trace file where it says so, else from names.py."""
        stated = self.meta.get("dims", {}).get(name)
        return tuple(stated) if stated else graph.dims(name)

    def save(self, path: str | Path) -> None:
        """Write a trace file: safetensors, with `meta` and each known name's dims as metadata.

        Metadata is text: strings stand as they are, everything else as JSON. The file is complete
        or absent: it is written beside its place and moved there. OSError where it cannot be.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        dims = {name: list(self.dims(name)) for name in self if graph.known(name)}
        meta = {**self.meta, "dims": {**dims, **self.meta.get("dims", {})}, "order": list(self)}
        stated = {key: _encoded(value) for key, value in meta.items()}
        path = Path(path)
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.items()
        }
        try:
            with file_beside(path) as beside:
                save_file(tensors, beside, metadata=stated)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot write the trace file ({error})") from None

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace file, memory-mapped; ValueError where the file is not one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                stated = file.metadata() or {}
                order = parse_json(stated.pop("order", "null"), str(path)) or sorted(file.keys())
                tensors = {name: file.get_tensor(name) for name in order}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable trace file ({error})") from None
        return cls(tensors, {key: _decoded(value) for key, value in stated.items()})


def _encoded(value: Any) -> str:
    """`value` as text that `_decoded` turns back: a string stays plain unless it reads as JSON."""
    return value if isinstance(value, str) and _decoded(value) == value else json.dumps(value)


def _decoded(value: str) -> Any:
    try:
        return parse_json(value, "")
    except ValueError:
        return value
