"""Record any module: what its submodules are given and return, and its attention from inside.

Names are the module's own. ``P`` is what the submodule at path P returned, ``P.input`` what it was
given, ``P(2)`` its second call in one pass. Functions called inside P are there too, with what they
were given: ``P.softmax()``, ``P.softmax().input``; of scaled_dot_product_attention ``.query``,
``.key``, ``.value`` and ``.mask`` (True may look). ``tokens`` is what the whole module was given,
``returned`` what it gave back, and ``weights.NAME`` its parameters. Where it was called again, the
names of the later passes begin with ``step.1.``, ``step.2.``, …
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pellucid.diff.replay.statistics import MASKED
from pellucid.diff.sides.wrappers import gathered_weights, plain_modules, unwrapped
from pellucid.trace import Trace

WEIGHTS = "weights."  # before the name of a parameter in a recording
CALLS = "calls"  # where a recording's metadata lists the calls
_TOKENS, _RETURNED = "tokens", "returned"
# What is watched inside a module: function -> its word.
_WATCHED: dict[Any, str] = {
    F.scaled_dot_product_attention: "sdpa",
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "softmax"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), "matmul"),
    **dict.fromkeys((torch.bmm, Tensor.bmm), "matmul"),
    torch.einsum: "einsum",
    F.linear: "linear",
    torch.addmm: "addmm",
    **dict.fromkeys((F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm), "norm"),
    **dict.fromkeys((F.silu, F.gelu, F.relu, torch.relu, Tensor.relu), "act"),
}
_ROLES = {
    "sdpa": ("query", "key", "value", "mask"),
    "softmax": ("input",),
    "act": ("input",),
    "norm": ("input",),
    "matmul": ("left", "right"),
}


def record(module: Any, *inputs: Any, **keywords: Any) -> Trace:
    """Call ``module(*inputs, **keywords)`` and record what it computes on the way.

    module  any torch module, also inside torch.compile, DDP, FSDP or PEFT; or one of its methods
            (``model.generate``) that calls it several times

    The module is left as it is: its mode, its dropout, its dtype. Gradients are not kept. The
    result can be saved, and given to `pellucid.diff` beside the model that is trusted. TypeError
    for what is no module.
    """
    root = module if isinstance(module, nn.Module) else getattr(module, "__self__", None)
    if not isinstance(root, nn.Module):
        raise TypeError(
            f"record was given a {type(module).__name__}: expected a torch module, or a method of "
            "one that calls it"
        )
    watch = _Watch(unwrapped(root), gathered_weights(root))
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        for handle in watch.hooks():
            stack.callback(handle.remove)
        stack.enter_context(watch)
        module(*inputs, **keywords)
    return watch.trace()


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


class _Watch(TorchFunctionMode):
    """What one run of a module shows, in the order in which it happens."""

    def __init__(self, root: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.root = root
        self.weights = weights
        self.step = -1
        self.open: list[dict[str, Any]] = []  # calls of modules that have not returned
        self.kept: dict[str, Tensor] = {}
        self.calls: list[dict[str, Any]] = []
        self._copies: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._counts: dict[tuple[int, str], int] = {}
        self._stored = {_place(x): name for name, x in reversed(self.weights.items())}

    def hooks(self) -> Iterator[Any]:
        """Watch every module of the root."""
        held: dict[str, list[str]] = {}  # of a module; FSDP may show them as one flat parameter
        for name in self.weights:
            held.setdefault(name.rpartition(".")[0], []).append(name)
        for path, module in plain_modules(self.root):
            buffers = {name for name, _ in module.named_buffers(recurse=False)}
            own = [name for name in held.get(path, []) if _leaf(name) not in buffers]
            if any(name == "base_layer" for name, _ in module.named_children()):
                own = [name for name in self.weights if name.startswith(f"{path}.")]
            yield module.register_forward_pre_hook(self._before(path, own), with_kwargs=True)
            yield module.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, path: str, own: list[str]) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not path:
                self.step += 1
            for name in own:  # FSDP gathers them anew
                x = getattr(module, _leaf(name), None)
                if isinstance(x, Tensor):
                    self._stored.setdefault(_place(x), name)
            call = {"name": self._numbered(path, ""), "op": "module", "reads": own}
            call["stores"] = "in,out" if type(module).__name__ == "Conv1D" else "out,in"
            self.open.append(call)
            tensors = [x for x in (*given, *named.values()) if isinstance(x, Tensor)]
            call["inputs"] = [
                self._keep(_input_name(call["name"], place, x), x)
                for place, x in enumerate(tensors)
            ]

        return hook

    def _after(self, module: nn.Module, given: Any, named: Any, returned: Any) -> None:
        call = self.open.pop()
        result = first_tensor(returned)
        if result is not None:
            name = call["name"] or _RETURNED
            self._called(call, self._keep(name, result))

    def _called(self, call: dict[str, Any], output: str) -> None:
        self.calls.append({**call, "output": output, "step": max(self.step, 0)})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and record it where it is one that is watched."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        op = _WATCHED.get(func)
        seen = op is not None and bool(self.open) and isinstance(result, Tensor)
        whole = op in ("linear", "norm") and self._is_all_of_its_module((*args, *kwargs.values()))
        if op is not None and seen and not whole:
            self._operation(op, args, kwargs, result)
        return result

    def _is_all_of_its_module(self, args: tuple[Any, ...]) -> bool:
        """The product or norm that a module consists of is recorded as the module."""
        own = self.open[-1]["reads"] if self.open else []
        used = {self._stored.get(_place(x), "") for x in args if isinstance(x, Tensor)}
        return any(name in used for name in own) and all(
            name in used or name.endswith("bias") for name in own
        )

    def _operation(self, op: str, args: tuple[Any, ...], named: Any, result: Tensor) -> None:
        path = self.open[-1]["name"]
        call: dict[str, Any] = {"name": self._numbered(f"{path}.{op}".lstrip("."), "()"), "op": op}
        tensors = [x for x in _flat((*args, *named.values())) if isinstance(x, Tensor)]
        if op == "sdpa":
            tensors = _attended(args, named)
        reads = [self._stored.get(_place(x), "") for x in tensors]
        call["reads"] = [name for name in reads if name]
        call["stores"] = "in,out" if op in ("addmm", "matmul") else "out,in"
        if op == "matmul" and call["reads"]:
            right = tensors[-1]  # W.T of a stored (out, in) stands in another order in memory
            stored = self.weights[call["reads"][0]]
            call["stores"] = "in,out" if right.stride() == stored.stride() else "out,in"
        roles = _ROLES.get(op) or tuple(str(n) for n in range(len(tensors)))
        call["inputs"] = [
            self._keep(f"{call['name']}.{role}", x)
            for role, x, read in zip(roles, tensors, reads, strict=False)
            if not read
        ]
        self._called(call, self._keep(call["name"], result))

    def _numbered(self, base: str, mark: str) -> str:
        """The name of a call: ``P``, then ``P(2)``; of a function ``f()``, then ``f(2)``."""
        key = (self.step, base + mark)
        self._counts[key] = self._counts.get(key, 0) + 1
        return base + mark if self._counts[key] == 1 else f"{base}({self._counts[key]})"

    def _keep(self, name: str, tensor: Tensor) -> str:
        """A copy of the tensor as it is now, one for all names of it; its full name."""
        name = f"step.{self.step}.{name}" if self.step > 0 else name
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        version = None if tensor.is_inference() else tensor._version
        key = (id(tensor), version)
        held = None if version is None else self._copies.get(key)
        copy = tensor.detach().clone() if held is None else held[1]
        self._copies[key] = tensor, copy  # the tensor is held, so that no other gets its id
        self.kept.setdefault(name, copy)
        return name

    def trace(self) -> Trace:
        """The recording; passes that begin from the first token again are left out."""
        last = self._last_step()
        kept = {
            name: x
            for name, x in self.kept.items()
            if not name.startswith("step.") or int(name.split(".")[1]) <= last
        }
        calls = [call for call in self.calls if call["step"] <= last]
        meta: dict[str, Any] = {"recorded_by": "pellucid.record", CALLS: calls}
        if last < self.step:
            meta["note"] = f"called {self.step + 1} times without a cache: the first pass is kept"
        weights = {WEIGHTS + name: tensor for name, tensor in self.weights.items()}
        return Trace(kept | weights, meta)

    def _last_step(self) -> int:
        first, second = self.kept.get(_TOKENS), self.kept.get(f"step.1.{_TOKENS}")
        if first is None or second is None:
            return 0
        return 0 if second.shape[-1] >= first.shape[-1] > 1 else self.step


def first_tensor(returned: Any) -> Tensor | None:
    """What a module gives back, where that is one tensor, or holds one: logits, or the first."""
    logits = getattr(returned, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(returned, Mapping):
        returned = list(returned.values())
    if isinstance(returned, tuple | list):
        return next((x for x in returned if isinstance(x, Tensor)), None)
    return returned if isinstance(returned, Tensor) else None


def _input_name(call: str, place: int, x: Tensor) -> str:
    if not call:
        return _TOKENS if not place and not x.is_floating_point() else f"given.{place}"
    return f"{call}.input" if not place else f"{call}.input.{place}"


def _place(x: Any) -> tuple[int, int]:
    if not isinstance(x, Tensor):
        return 0, 0
    return x.untyped_storage().data_ptr(), int(x.storage_offset())


def _flat(given: tuple[Any, ...]) -> Iterator[Any]:
    for item in given:
        if isinstance(item, tuple | list):
            yield from item
        else:
            yield item


def _attended(args: tuple[Any, ...], named: Mapping[str, Any]) -> list[Tensor]:
    """query, key, value and, where nothing else is hidden, which key a query may look at."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **named}
    query, key = given["query"], given["key"]
    allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        allowed = allowed.tril()
    elif isinstance(mask, Tensor):
        allowed = mask if mask.dtype == torch.bool else mask > MASKED
        allowed = allowed.expand(*allowed.shape[:-2], query.shape[-2], key.shape[-2])
        while allowed.ndim > 2 and bool((allowed == allowed[:1]).all()):
            allowed = allowed[0]
    return [query, key, given["value"], allowed]


def calls_of(seen: Trace) -> list[dict[str, Any]]:
    """The calls that `record` listed, in the order in which they returned."""
    listed = seen.meta.get(CALLS)
    return listed if isinstance(listed, list) else []


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward has an argument of this name."""
    return argument in inspect.signature(module.forward).parameters
