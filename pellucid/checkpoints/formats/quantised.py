"""Quantised models on disk: a folder like Hugging Face's, levels and scales under our own names.

``config.json`` is the original's with a ``quantization_config`` that says ``"quant_method":
"pellucid"``; ``model.safetensors`` holds the quantised model's ``state_dict`` as it is, so a
folder is mapped and runs without any conversion. The layout of levels is described in
``models/quantised.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.checkpoints.files import SafetensorsFile, Shape, Stored
from pellucid.checkpoints.formats.hf_config import read_config
from pellucid.checkpoints.save import model_folder
from pellucid.checkpoints.weights import Weights
from pellucid.checkpoints.writers import SafetensorsWriter
from pellucid.files import read_json
from pellucid.models import Config, Model
from pellucid.models.finite import check_finite
from pellucid.models.quantised import PARTS, Format, FullWeights, QuantisedMatrix, quantised_empty

METHOD = "pellucid"
_STORED = tuple(f".{part}" for part in PARTS)  # ends of names: kept as they are, in any dtype
FILE = "model.safetensors"


def save_quantised(
    folder: str | Path,
    model: Model,
    how: Format,
    tokenizer_from: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a quantised model as a folder that `open_checkpoint` reads; whole or not at all.

    ValueError for a model that is not quantised, OSError where the folder may not be written.
    """
    if not any(isinstance(module, QuantisedMatrix) for module in model.modules()):
        raise ValueError("this model is not quantised: save it as it is, or quantise it first")
    state = model.state_dict()
    entries = {name: Stored(tuple(each.shape), each.dtype) for name, each in state.items()}
    with (
        model_folder(
            folder,
            model.config,
            model.dtype,
            tokenizer_from,
            overwrite=overwrite,
            stated={"quantization_config": _stated(how)},
        ) as beside,
        SafetensorsWriter(beside / FILE, entries) as out,
    ):
        for name, tensor in state.items():
            out.write(name, tensor.detach().cpu().contiguous())


def _stated(how: Format) -> dict[str, Any]:
    return {
        "quant_method": METHOD,
        "bits": how.bits,
        "group_size": how.group,
        "head_bits": how.head_bits,
        **{name: True for name in ("offsets", "fitted") if getattr(how, name)},
    }


def quantised_format(folder: Path) -> Format | None:
    """How the model of a folder is quantised, or None for one that is not quantised by Pellucid."""
    path = folder / "config.json"
    stated = read_json(path).get("quantization_config") if path.is_file() else None
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        return None
    expected = {"quant_method", "bits", "group_size", "head_bits"}
    if stated.keys() - {"offsets", "fitted"} != expected:
        raise ValueError(
            f"{path}: quantization_config has {', '.join(sorted(stated))}; expected "
            f"{', '.join(sorted(expected))}"
        )
    try:
        return Format(
            bits=stated["bits"],
            group=stated["group_size"],
            head_bits=stated["head_bits"],
            offsets=stated.get("offsets", False),
            fitted=stated.get("fitted", False),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def open_quantised(folder: Path, how: Format) -> tuple[Config, QuantisedWeights]:
    """Config and weights of a quantised folder, every key and tensor accounted for."""
    path = folder / "config.json"
    config = read_config(read_json(path), str(path))
    file = SafetensorsFile(folder / FILE)
    weights = QuantisedWeights(file, config, how)
    wanted = {name: tuple(each.shape) for name, each in weights.skeleton.state_dict().items()}
    found = {name: each.shape for name, each in file.entries.items()}
    wrong = sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{folder}: {len(wrong)} tensors do not fit config.json: {first} is "
            f"{found.get(first, 'missing')}, expected {wanted.get(first, 'no such tensor')}"
        )
    return config, weights


class QuantisedWeights(Weights):
    """Parameter name -> tensor of a quantised folder: what its levels stand for, read lazily."""

    def __init__(self, file: SafetensorsFile, config: Config, how: Format) -> None:
        super().__init__([file], {}, {}, str(file.path))
        self._file, self._config, self._how = file, config, how
        self.skeleton = quantised_empty(config, how)
        self._names = list(FullWeights(self.skeleton))

    def __getitem__(self, name: str) -> Tensor:
        module = self._module(name)
        if module is None:
            return self._file.read(self.stored_name(name))
        prefix = name.removesuffix("weight")
        alone = copy(module)
        alone._buffers = {
            part: self._file.read(prefix + part) for part in dict(module.named_buffers())
        }
        alone.dtype = self._dtype
        return alone.weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    @property
    def _dtype(self) -> torch.dtype:
        return self._file.entries["norm.weight"].dtype

    def _module(self, name: str) -> QuantisedMatrix | None:
        if name not in self._names:
            raise KeyError(f"no parameter {name!r} in {self._where}")
        module = self.skeleton.get_submodule(name.rpartition(".")[0])
        return module if isinstance(module, QuantisedMatrix) and name.endswith("weight") else None

    def shape(self, name: str) -> Shape:
        """Shape of a parameter, without reading it."""
        module = self._module(name)
        return (module.rows, module.columns) if module else self._file.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a parameter is given in."""
        return self._dtype if self._module(name) else self._file.entries[name].dtype

    def stored_name(self, name: str) -> str:
        """What the file calls the tensor that holds a parameter's numbers."""
        return name.removesuffix("weight") + "packed" if self._module(name) else name

    def dominant_dtype(self) -> torch.dtype:
        """The dtype of norms and activations."""
        return self._dtype

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the file's tensors."""
        return tuple(self._file.entries)

    def _parts(self, name: str, rows: slice | None) -> list[Tensor]:
        """The mapped tensors that a parameter is computed from."""
        module, prefix = self._module(name), name.removesuffix("weight")
        parts = [prefix + part for part in dict(module.named_buffers())] if module else [name]
        return [self._file.read(each) for each in parts]

    def reopened(self, dtype: torch.dtype | None = None) -> QuantisedWeights:
        """The same parameters through a mapping of their own."""
        return QuantisedWeights(self._file.reopened(), self._config, self._how)

    def check_redundant(self) -> None:
        """A quantised folder holds nothing twice."""

    def load_model(self, dtype: torch.dtype, device: torch.device, dialect: str) -> Model:
        """The quantised model: levels and scales as they are mapped, the rest in `dtype`."""
        for name in self._file.entries:
            if name.endswith(_STORED[1:]):  # levels are whole numbers, and few bytes are scales
                check_finite(name, self._file.read(name))
        model = quantised_empty(self._config, self._how, dialect)
        for module in model.modules():
            if isinstance(module, QuantisedMatrix):
                module.dtype = dtype
        state: Mapping[str, Tensor] = {
            name: self._file.read(name).to(device)
            if name.endswith(_STORED)
            else self._file.read(name).to(device, dtype)
            for name in self._file.entries
        }
        model.load_state_dict(state, strict=True, assign=True)
        return model
