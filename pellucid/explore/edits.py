"""Changes to a run: set to zero, scale, take from another run, add a direction.

Each is a value that can be written down, done, and told as Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from pellucid import graph, names
from pellucid.edits import Edit as Function
from pellucid.models import Config
from pellucid.trace import Trace

Do = Literal["zero", "scale", "patch", "steer"]
LookUp = Callable[[str | None, str], Tensor]  # (a run's id, or None for the clean run; address)
_WHOLE = ("tokens", "positions", "mask", "window_mask")  # no floating-point numbers


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change, at an address such as ``layers.3.attn.z[5]``.

    do         zero: 0; scale: times `value`; patch: what the run `source` has at that address;
               steer: plus `value` times `direction`
    source     a run's id; for steer the run that `direction` is read from (None: the clean run)
    direction  address of a tensor that can be added there, such as ``layers.3.resid_pre[7]``
    """

    at: str
    do: Do
    value: float = 0.0
    source: str | None = None
    direction: str | None = None

    def __post_init__(self) -> None:
        names.parse(self.at)
        if self.do not in get_args(Do):
            known = ", ".join(get_args(Do))
            raise ValueError(f"edit of {self.at}: do is {self.do!r}: expected one of {known}")
        if self.do == "patch" and self.source is None:
            raise ValueError(f"edit of {self.at}: patch needs the run to take from (from)")
        if self.do == "steer" and self.direction is None:
            raise ValueError(f"edit of {self.at}: steer needs the address of a direction")

    @property
    def name(self) -> str:
        """The tensor it changes."""
        return names.parse(self.at)[0]

    def check(self, config: Config) -> None:
        """ValueError where a model has no such tensor, or one of whole numbers."""
        if self.name not in graph.expand(config):
            raise ValueError(f"edit of {self.at}: this model has no tensor {self.name}")
        if graph.leaf(self.name) in _WHOLE:
            raise ValueError(f"edit of {self.at}: {self.name} holds no real numbers to change")

    def apply(self, tensor: Tensor, look_up: LookUp) -> Tensor:
        """Change `tensor`, the whole one with its batch axis, in place."""
        part = Trace({self.name: tensor})[self.at]  # a view
        if not self.at.endswith("]"):
            part = part[...]
        if self.do == "zero":
            part.zero_()
        elif self.do == "scale":
            part.mul_(self.value)
        elif self.do == "patch":
            part.copy_(self._fitting(part, look_up(self.source, self.at)))
        else:
            assert self.direction is not None, "checked when it was made"
            added = look_up(self.source, self.direction).to(part.dtype)
            part.add_(self.value * self._fitting(part, added))
        return tensor

    def _fitting(self, part: Tensor, other: Tensor) -> Tensor:
        """`other` where it can take the place of `part` or be spread over it."""
        try:
            return other.expand(part.shape) if self.do == "steer" else other.reshape(part.shape)
        except RuntimeError:
            raise ValueError(
                f"edit of {self.at}: its shape is {list(part.shape)}, that of what would come "
                f"there {list(other.shape)}; name a part that both have, such as one token"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """As the server's clients write it."""
        stated = {"at": self.at, "do": self.do}
        optional = {"value": self.value, "from": self.source, "direction": self.direction}
        wanted = {"scale": ("value",), "patch": ("from",), "steer": tuple(optional), "zero": ()}
        return stated | {key: optional[key] for key in wanted[self.do] if optional[key] is not None}

    def python(self, tensors: str) -> str:
        """The line that changes ``x``; `tensors` is the variable of the trace it reads from."""
        index = self.at.removeprefix(self.name).strip("[]")
        first = ["0"] if graph.has_batch(self.name) else []
        place = ", ".join([*first, *([index.replace(",", ", ")] if index else [])]) or "..."
        if self.do == "zero":
            return f"x[{place}] = 0"
        if self.do == "scale":
            return f"x[{place}] *= {self.value!r}"
        if self.do == "patch":
            return f"x[{place}] = {read(self.at, tensors)}"
        assert self.direction is not None, "checked when it was made"
        return f"x[{place}] += {self.value!r} * {read(self.direction, tensors)}.to(x.dtype)"


def read(address: str, tensors: str) -> str:
    """Python that reads an address from a trace, without its batch axis."""
    name, bracket, _ = address.partition("[")
    whole = not bracket and graph.has_batch(name)
    return f'{tensors}["{address}"]' + ("[0]" if whole else "")


def as_functions(edits: Sequence[Edit], look_up: LookUp) -> dict[str, Function]:
    """Tensor -> function that makes all changes to it, in order; as `pellucid.trace` takes them."""
    by_name: dict[str, list[Edit]] = {}
    for edit in edits:
        by_name.setdefault(edit.name, []).append(edit)

    def changing(own: Sequence[Edit]) -> Function:
        def change(tensor: Tensor) -> Tensor:
            for edit in own:
                tensor = edit.apply(tensor, look_up)
            return tensor

        return change

    return {name: changing(own) for name, own in by_name.items()}


def parse_edit(stated: Mapping[str, Any]) -> Edit:
    """An edit as a client writes it; ValueError, in one line, for what is none."""
    keys = {"at": str, "do": str, "value": int | float, "from": str, "direction": str}
    if not isinstance(stated, Mapping):
        raise ValueError(f"an edit is {stated!r}: expected an object with at and do")
    for key, value in stated.items():
        if key not in keys:
            raise ValueError(f"an edit has {key!r}: expected {', '.join(keys)}")
        if not isinstance(value, keys[key]) or isinstance(value, bool):
            raise ValueError(f"an edit's {key} is {value!r}")
    if not {"at", "do"} <= set(stated):
        raise ValueError("an edit needs at (an address) and do (zero, scale, patch or steer)")
    if stated["do"] in ("scale", "steer") and "value" not in stated:
        raise ValueError(f"edit of {stated['at']}: {stated['do']} needs a value")
    return Edit(
        at=stated["at"],
        do=stated["do"],
        value=float(stated.get("value", 0.0)),
        source=stated.get("from"),
        direction=stated.get("direction"),
    )
