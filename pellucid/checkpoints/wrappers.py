"""Names that a wrapper put words into: torch.compile, DDP, FSDP, activation checkpoints, PEFT.

_orig_mod.model.norm.weight                 ->  model.norm.weight
module.model.layers.0._orig_mod.mlp…        ->  model.layers.0.mlp…
base_model.model.lm_head.weight             ->  lm_head.weight
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from pellucid.checkpoints.files import TensorFile

# Children under which a wrapper keeps the module: torch.compile, FSDP, activation checkpointing
KEPT_UNDER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Words that only wrappers write, wherever in a stored name they stand
_WORDS = frozenset({*KEPT_UNDER, "module", "_forward_module"})


class RenamedFile:
    """A file whose tensors have other names: new name -> name in the file."""

    def __init__(self, file: TensorFile, names: Mapping[str, str]) -> None:
        self._file, self._names = file, dict(names)
        self.entries = {new: file.entries[old] for new, old in names.items()}
        self.paths: tuple[Path, ...] = file.paths

    def read(self, name: str) -> Tensor:
        """The tensor, mapped; nothing else is read."""
        return self._file.read(self._names[name])

    def reopened(self) -> RenamedFile:
        """The same file through a mapping of its own."""
        return RenamedFile(self._file.reopened(), self._names)


def unwrapped_names(
    stored: Collection[str], expected: Callable[[Collection[str]], Collection[str]]
) -> dict[str, str]:
    """Names without what wrappers put into them -> names in the file.

    expected  names of a file -> those that the model has, as that file spells them

    Three spellings are tried: the names as they are, without the words of wrappers, and without a
    common prefix too. The one with most expected names is taken, the first of equals. A spelling
    that would give two tensors one name is not taken.
    """
    best, fitting = {name: name for name in stored}, -1
    bare = {name: _without_words(name) for name in stored}
    shortest = min(bare.values(), key=len, default="")
    beginnings = accumulate(f"{word}." for word in shortest.split(".")[:-1])
    for tried in (
        best,
        bare,
        *({o: n.removeprefix(p) for o, n in bare.items()} for p in beginnings),
    ):
        names = {new: old for old, new in tried.items()}
        found = len(names.keys() & set(expected(names)))
        if len(names) == len(tried) and found > fitting:
            best, fitting = names, found
    return best


def _without_words(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in _WORDS)


def without_wrappers(
    file: TensorFile, expected: Callable[[Collection[str]], Collection[str]]
) -> TensorFile:
    """The file under the model's own names; a warning says what was cut off them."""
    names = unwrapped_names(file.entries, expected)
    changed = [(old, new) for new, old in names.items() if new != old]
    if not changed:
        return file
    old, new = changed[0]
    warnings.warn(
        f"{file.paths[0]}: {len(changed)} of {len(names)} names carry a wrapper's prefix; "
        f"{old} is read as {new}",
        stacklevel=2,
    )
    return RenamedFile(file, names)
