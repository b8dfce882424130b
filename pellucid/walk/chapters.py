"""The walk in chapters, as the script has them: which part of the model a step belongs to."""

from __future__ import annotations

import re
from typing import Protocol

from pellucid import names
from pellucid.walk.script import SCRIPT

_OF_KEYS_AND_VALUES = re.compile(r"attn\.(w[kv]_head|[kv](_\w+)?)\[")


def _parts() -> dict[tuple[str, bool], list[str]]:
    """Name of a step, and whether it is about a slice -> the chapters that the script has it in."""
    found: dict[tuple[str, bool], list[str]] = {}
    for line in SCRIPT.lines:
        chapters = found.setdefault((line.name, line.index is not None), [])
        if line.chapter not in chapters:
            chapters.append(line.chapter)
    return found


_PARTS = _parts()
_OF_A_LAYER = {line.chapter for line in SCRIPT.lines if line.name.startswith("layers.N.")}


class Told(Protocol):
    """The fields of a step that tell its chapter."""

    @property
    def address(self) -> str: ...
    @property
    def source(self) -> str: ...


class Chapters:
    """Goes along with a walk and says when a chapter begins."""

    def __init__(self) -> None:
        self.current = ""
        self._before: set[str] = set()
        self._layer = 0
        self._unrolled = False

    def begins(self, step: Told) -> str | None:
        """Title of the chapter that `step` begins; None: it goes on with the current one."""
        part = self._part(step)
        if part == self.current:
            return None
        title = part
        _, index = names.parse(step.address)
        if part in self._before and index:
            of = "key/value head" if _OF_KEYS_AND_VALUES.search(step.address) else "head"
            title += f", {of} {index[0]}"
        self.current = part
        self._before.add(part)
        return title

    def _part(self, step: Told) -> str:
        name, index = names.parse(step.address)
        layer = names.layer_of(name)
        if layer is not None and not step.source:  # a whole layer in one step
            return "The layers above" if self._unrolled else "The layers below"
        key = name, bool(index)
        if key not in _PARTS:  # else it is the stream as it enters the first layer, not yet in it
            key = names.general(name).replace("second_rope.", "rope."), bool(index)
            assert key in _PARTS, f"{step.address} belongs to no chapter"
            if layer is not None:
                self._layer, self._unrolled = layer, True
        titles = [self._titled(part) for part in _PARTS[key]]
        return self.current if self.current in titles else titles[0]

    def _titled(self, part: str) -> str:
        """What all layers share, such as the mask, belongs to the layer that first needs it."""
        return f"Layer {self._layer} · {part}" if part in _OF_A_LAYER else part
