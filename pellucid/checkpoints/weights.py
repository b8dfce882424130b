"""The parameters of a checkpoint under Pellucid's names, each read when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from pellucid.checkpoints.files import Shape, TensorFile, forget_pages, read_pages, single_rows
from pellucid.models import Config, empty_model

_NAMED = 6  # tensors an error message lists before it only counts


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one parameter is made of one tensor per file.

    stored  name of the tensor in the files
    more    further tensors of its shape that follow it in the parameter
    shape   of the parameter
    shapes  of the stored tensor, file by file
    make    from the tensors, file by file, and `more` after `stored`, to the parameter; a view of
            them where that is possible
    dim     along which several files' tensors are joined, where that is all that `make` does
    """

    stored: str
    shape: Shape
    shapes: tuple[Shape, ...]
    make: Callable[[Sequence[Tensor]], Tensor]
    dim: int | None = None
    more: tuple[str, ...] = ()

    def read(self, files: Sequence[TensorFile]) -> list[Tensor]:
        """The stored tensors, mapped."""
        return [file.read(name) for file in files for name in (self.stored, *self.more)]


@dataclass(frozen=True, kw_only=True)
class Redundant:
    """A stored tensor that follows from others, such as a tied head, if `agrees` holds for it.

    agrees    looks at the tensors and the weights and says whether they agree; None: always
    otherwise what to say where they do not
    """

    shape: Shape | None = None
    agrees: Callable[[Tensor, Weights], bool] | None = None
    otherwise: str = ""


class Weights(Mapping[str, Tensor]):
    """Parameter name -> tensor, read from memory-mapped files at the moment of access.

    Iteration follows the model's ``state_dict``. `shape` and `dtype` answer from the headers. A
    tensor that was read is a private mapping of the file, or a copy: writing into it never
    reaches the disk.
    """

    def __init__(
        self,
        files: Sequence[TensorFile],
        recipes: Mapping[str, Recipe],
        redundant: Mapping[str, Redundant],
        where: str,
    ) -> None:
        self._files, self._recipes = list(files), dict(recipes)
        self._redundant, self._where = dict(redundant), where

    def __getitem__(self, name: str) -> Tensor:
        recipe = self._recipe(name)
        return recipe.make(recipe.read(self._files))

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def __repr__(self) -> str:
        return f"Weights({len(self)} parameters of {self._where})"

    @property
    def paths(self) -> tuple[Path, ...]:
        """The weight files."""
        return tuple(path for file in self._files for path in file.paths)

    def shape(self, name: str) -> Shape:
        """Shape of a parameter, without reading it."""
        return self._recipe(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter as stored, without reading it."""
        return self._files[0].entries[self._recipe(name).stored].dtype

    def stored_name(self, name: str) -> str:
        """What the files call the tensor that a parameter comes from."""
        return self._recipe(name).stored

    def dominant_dtype(self) -> torch.dtype:
        """The dtype that most parameters, counted in elements, are stored in."""
        count: Counter[torch.dtype] = Counter()
        for name, recipe in self._recipes.items():
            count[self.dtype(name)] += torch.Size(recipe.shape).numel()
        return count.most_common(1)[0][0]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stored tensors that are no parameter and say nothing new, such as RoPE frequencies."""
        stored = {name for file in self._files for name in file.entries}
        return tuple(sorted(stored & self._redundant.keys()))

    @property
    def stored(self) -> tuple[str, ...]:
        """Names in the files of the tensors that the parameters come from."""
        recipes = self._recipes.values()
        return tuple(dict.fromkeys(name for r in recipes for name in (r.stored, *r.more)))

    def forget(self, name: str, rows: slice | None = None) -> None:
        """Hand back the memory that reading a parameter took; nothing may have written into it."""
        for part in self._parts(name, rows):
            forget_pages(part)

    def read_pages(self, name: str, rows: slice | None = None) -> None:
        """Have the system read a parameter from the disk now, or some of its rows."""
        for part in self._parts(name, rows):
            read_pages(part)

    def read_into(self, name: str, room: Tensor) -> Tensor:
        """``weights[name]``, written into `room` where tensors of several files are joined.

        Memory that has been used before is written three times as fast as fresh memory.
        """
        recipe = self._recipe(name)
        parts = recipe.read(self._files)
        if len(parts) == 1 or recipe.dim is None:
            return recipe.make(parts)
        return torch.cat(parts, dim=recipe.dim, out=room)

    def rows(self, name: str, rows: slice) -> Tensor:
        """``weights[name][rows]``, and no other row is read: a view of the file where it can be."""
        parts = self._parts(name, rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self._recipe(name).dim or 0)

    def look_up(self, name: str, index: Tensor) -> Tensor:
        """``weights[name][index]`` for whole numbers of any shape, and no other row is read."""
        recipe, flat = self._recipe(name), index.flatten()
        parts = self._parts(name, slice(None))
        found = parts[0].new_empty(len(flat), *recipe.shape[1:])
        row = column = 0  # where a part begins in the parameter
        for part in parts:
            here = (row <= flat) & (flat < row + len(part))
            with single_rows(part):
                found[here, column : column + part.shape[1]] = part[flat[here] - row]
            forget_pages(part)
            if recipe.dim == 1:
                column += part.shape[1]
            else:
                row += len(part)
        return found.view(*index.shape, *recipe.shape[1:])

    def _parts(self, name: str, rows: slice | None) -> list[Tensor]:
        """What the files hold of a parameter, mapped; of `rows`, what `make` would join."""
        recipe = self._recipe(name)
        stored = recipe.read(self._files)
        if rows is None:
            return stored
        if len(stored) == 1:
            return [recipe.make(stored)[rows]]
        assert recipe.dim is not None, f"{name} is more than its files' tensors joined"
        if recipe.dim == 1:
            return [part[rows] for part in stored]
        begin, end, _ = rows.indices(recipe.shape[0])
        firsts = accumulate((len(part) for part in stored), initial=0)
        cut = [
            part[max(begin - first, 0) : max(end - first, 0)]
            for part, first in zip(stored, firsts, strict=False)
        ]
        return [part for part in cut if len(part)]

    def reopened(self, dtype: torch.dtype | None = None) -> Weights:
        """The same parameters through file mappings of their own.

        `dtype` is what quantised values are made of; tensors that are numbers stay as stored.
        """
        files = [file.reopened() for file in self._files]
        return Weights(files, self._recipes, self._redundant, self._where)

    def without(self, name: str) -> Weights:
        """The same but for one parameter, whose stored tensor says nothing new."""
        kept = {each: recipe for each, recipe in self._recipes.items() if each != name}
        left = {**self._redundant, self._recipe(name).stored: Redundant()}
        return Weights(self._files, kept, left, self._where)

    def check_redundant(self) -> None:
        """Read the stored tensors that repeat others; ValueError where one says otherwise."""
        for stored, redundant in self._redundant.items():
            for file in self._files:
                if redundant.agrees is None or stored not in file.entries:
                    continue
                if not redundant.agrees(file.read(stored), self):
                    raise ValueError(f"{self._where}: {stored} {redundant.otherwise}")

    def _recipe(self, name: str) -> Recipe:
        if name not in self._recipes:
            raise KeyError(f"no parameter {name!r} in {self._where}")
        return self._recipes[name]


def parameter_shapes(config: Config) -> dict[str, Shape]:
    """Shape of every parameter of a model with `config`, in the order of its ``state_dict``."""
    return {name: tuple(each.shape) for name, each in empty_model(config).state_dict().items()}


def expected_shapes(config: Config, files: Sequence[TensorFile], where: str) -> dict[str, Shape]:
    """`parameter_shapes`; ValueError for a config too large for these files or for any machine."""
    stored = sum(len(file.entries) for file in files)
    if config.n_layers > stored:
        raise ValueError(f"{where}: {config.n_layers} layers, but the files hold {stored} tensors")
    try:
        return parameter_shapes(config)
    except (RuntimeError, TypeError, OverflowError):  # torch's words for too many elements
        raise ValueError(
            f"{where}: no tensor can be this large: width {config.width}, hidden width "
            f"{config.hidden_width}, vocabulary {config.vocab_size}"
        ) from None


def accounted(
    files: Sequence[TensorFile],
    recipes: Mapping[str, Recipe],
    redundant: Mapping[str, Redundant],
    where: str,
    config_file: str,
) -> Weights:
    """`Weights` of `files`, after every stored tensor has been accounted for.

    ValueError, in one line, where a tensor is missing, has another shape than the config asks for,
    has no floating-point dtype, or is there although nothing asks for it.
    """
    missing, wrong, extra = [], [], []
    wanted = {n: r.shapes for r in recipes.values() for n in (r.stored, *r.more)}
    for number, file in enumerate(files):
        place = f" (shard {number})" if len(files) > 1 else ""
        for name, shapes in wanted.items():
            if name not in file.entries:
                missing.append(f"{name} {shapes[number]}{place}")
                continue
            found = file.entries[name]
            if found.shape != shapes[number]:
                wrong.append(f"{name} is {found.shape}, expected {shapes[number]}{place}")
            elif not found.dtype.is_floating_point or found.dtype.itemsize < 2:
                wrong.append(f"{name} is {found.dtype}, expected float16, bfloat16 or wider{place}")
        for name in file.entries.keys() - wanted.keys():
            found, known = file.entries[name], redundant.get(name)
            if known is None:
                extra.append(f"{name} {found.shape}{place}")
            elif known.shape is not None and known.shape != found.shape:
                wrong.append(f"{name} is {found.shape}, expected {known.shape}{place}")
    problems = [
        f"{len(names)} {kind}: {_some(names)}"
        for kind, names in (
            ("missing", missing),
            ("not as expected", wrong),
            ("unknown", sorted(extra)),
        )
        if names
    ]
    if problems:
        tensors = f"tensors of {len(files)} shards" if len(files) > 1 else "tensors"
        raise ValueError(f"{where}: the {tensors} do not fit {config_file}: {'; '.join(problems)}")
    return Weights(files, recipes, redundant, where)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
