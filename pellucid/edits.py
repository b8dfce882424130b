"""Edits of named tensors: whose, which part, and what stands there afterwards.

    {"layers.0.mlp_out": 0}                        a number, for all of it
    {"layers.*.attn.z[:,2]": 0}                    a glob; the third token of each head
    {"layers.1.resid_pre": clean["layers.1.resid_pre"]}      a tensor, of the part's shape or
                                                   one that broadcasts to it
    {"layers.*.attn.pattern": lambda p: p.flip(-1)}          what a function makes of it
    {"layers.*.mlp_out": lambda x, name: …}        … of it and its name

An index leaves out the batch axis where there is one row, as addresses do everywhere. While a model
generates, a name means every step, ``step.2.NAME`` the second step after the prompt alone, and an
index counts from the beginning of what a step computes: a step that has no such part is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor

from pellucid import graph, names
from pellucid.spelling import suggestion

Edit: TypeAlias = float | Tensor | Callable[..., Tensor]  # a function of the part, or part and name


@dataclass(frozen=True)
class _Rule:
    """One entry of the mapping: the key as given, the globs it stands for, the index, the value."""

    key: str
    globs: tuple[str, ...]
    index: names.Index
    edit: Edit
    named: bool  # whether its function takes the name too

    @property
    def of_step(self) -> bool:
        """Whether it names a decoding step."""
        return self.key.startswith("step.")

    def matches(self, name: str) -> bool:
        """Whether it means a name."""
        return name in self.globs or any(fnmatchcase(name, glob) for glob in self.globs)


class Edits:
    """The edits of a run; each has to meet a tensor."""

    def __init__(self, edits: Mapping[str, Edit]) -> None:
        """ValueError for an index that is none."""
        self._rules = [_rule(key, edit) for key, edit in edits.items()]
        self._unused = {rule.key for rule in self._rules}

    def __bool__(self) -> bool:
        return bool(self._rules)

    def apply(self, name: str, plain: str, tensor: Tensor) -> Tensor:
        """`tensor`, changed by each edit that means it, in the order given.

        plain  the name without its step; edits that name the step stand in for those that do not
        """
        of_step = [rule for rule in self._rules if rule.of_step and rule.matches(name)]
        for rule in of_step or [rule for rule in self._rules if rule.matches(plain)]:
            self._unused.discard(rule.key)
            tensor = _changed(rule, name, tensor)
        return tensor

    def check_known(self, known: Collection[str]) -> None:
        """KeyError, before anything runs, for an edit that means none of these names."""
        for rule in self._rules:
            plain = tuple(names.without_step(glob) for glob in rule.globs)
            if not any(replace(rule, globs=plain).matches(name) for name in known):
                raise _no_such_tensor([rule.key], known)

    def check_used(self, known: Iterable[str]) -> None:
        """KeyError for an edit that met no tensor: a silent no-op would be a wrong result.

        known: the names that the run has
        """
        if self._unused:
            raise _no_such_tensor(sorted(self._unused), known)


def _no_such_tensor(keys: list[str], known: Iterable[str]) -> KeyError:
    near = suggestion(_split(keys[0])[0], known)
    return KeyError(
        f"edit of {', '.join(keys)}: this run has no such tensor{near}; `pellucid trace` or "
        "pellucid.names lists what there is"
    )


def _rule(key: str, edit: Edit) -> _Rule:
    glob, index = _split(key)
    return _Rule(key, names.spellings(glob), index, edit, callable(edit) and _takes_name(edit))


def _split(key: str) -> tuple[str, names.Index]:
    """Glob and index of a key; a bracket inside a glob is a set of characters."""
    glob, bracket, inside = key.rpartition("[")
    if not bracket or not key.endswith("]"):
        return key, ()
    return glob, names.parse(f"x[{inside}")[1]


def _takes_name(function: Callable[..., Tensor]) -> bool:
    """Whether a function asks for two arguments; one of unknown signature is given one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    wanted = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(wanted) > 1


def _changed(rule: _Rule, name: str, tensor: Tensor) -> Tensor:
    """A copy with the part exchanged: an edit in place must not reach back into what came before.

    IndexError where the first pass has no such part.
    """
    index = rule.index
    if index and graph.has_batch(name) and tensor.shape[0] == 1:
        index = (0, *index)  # of several rows, the index itself says which
    try:
        part = tensor[index]
        if 0 in part.shape:
            raise IndexError
    except IndexError:
        if names.step_of(name):
            return tensor
        raise IndexError(
            f"edit of {rule.key}: no such part of {name}, of shape {tuple(tensor.shape)}"
        ) from None
    value = _value(rule, name, part.clone() if callable(rule.edit) else part)
    if not index:
        return value
    changed = tensor.clone()
    changed[index] = value
    return changed


def _value(rule: _Rule, name: str, part: Tensor) -> Tensor:
    """What stands where `part` stood, of its shape and dtype."""
    edit, at = rule.edit, f"edit of {name}"
    if callable(edit):
        result = edit(part, name) if rule.named else edit(part)
        if not isinstance(result, Tensor):
            raise TypeError(f"{at} returned {type(result).__name__}, expected a tensor")
        if result.shape != part.shape:
            raise ValueError(
                f"{at} returned shape {tuple(result.shape)}, expected {tuple(part.shape)}"
            )
        return result.to(device=part.device, dtype=part.dtype)
    if isinstance(edit, Tensor):
        try:
            return edit.to(device=part.device, dtype=part.dtype).expand(part.shape).clone()
        except RuntimeError:
            raise ValueError(
                f"{at}: a tensor of shape {tuple(edit.shape)} does not fit {tuple(part.shape)}"
            ) from None
    if isinstance(edit, bool | int | float):
        return part.new_full(part.shape, edit)
    raise TypeError(
        f"{at} is a {type(edit).__name__}: expected a number, a tensor, or a function of a tensor"
    )
