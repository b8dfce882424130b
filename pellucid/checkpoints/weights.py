"""The parameters of a checkpoint under Pellucid's names, each read when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pellucid.checkpoints.files import Shape, TensorFile, forget_pages
from pellucid.models import Config, empty_model

_NAMED = 6  # tensors an error message lists before it only counts


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one parameter is made of one tensor per file.

    stored  name of the tensor in the files
    shape   of the parameter
    shapes  of the stored tensor, file by file
    make    from the tensors, file by file, to the parameter; a view of them where that is possible
    """

    stored: str
    shape: Shape
    shapes: tuple[Shape, ...]
    make: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Redundant:
    """A stored tensor that says nothing new, as long as `agrees` holds for it.

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
        return recipe.make([file.read(recipe.stored) for file in self._files])

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
        return tuple(dict.fromkeys(recipe.stored for recipe in self._recipes.values()))

    def forget(self, name: str) -> None:
        """Hand back the memory that reading a parameter took; nothing may have written into it."""
        for file in self._files:
            forget_pages(file.read(self._recipe(name).stored))

    def reopened(self) -> Weights:
        """The same parameters through file mappings of their own."""
        files = [file.reopened() for file in self._files]
        return Weights(files, self._recipes, self._redundant, self._where)

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
    wanted = {recipe.stored: recipe.shapes for recipe in recipes.values()}
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
