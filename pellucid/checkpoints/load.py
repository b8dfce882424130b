"""From a folder to a running model: detect the layout, build on the meta device, assign."""

from __future__ import annotations

import atexit
import threading
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pellucid.checkpoints.files import forget_pages, read_pages
from pellucid.checkpoints.formats import gguf, hf, meta
from pellucid.checkpoints.formats.quantised import (
    QuantisedWeights,
    open_quantised,
    quantised_format,
)
from pellucid.checkpoints.hub import resolve
from pellucid.checkpoints.weights import Weights
from pellucid.models import Config, Model, empty_model


@dataclass(frozen=True, kw_only=True, repr=False)
class Checkpoint:
    """A checkpoint on disk, its config read and its tensors accounted for, none of them read yet.

    source      as it was given
    folder      where it lies; of a GGUF file the file itself
    layout      whose files: "meta" (params.json, consolidated.*.pth), "hf" (config.json,
                safetensors) or "gguf"
    config      shape of the model
    weights     parameter name -> tensor, read at the moment of access
    file_bytes  size of the weight files
    """

    source: str
    folder: Path
    layout: str
    config: Config
    weights: Weights
    file_bytes: int

    @property
    def dialect(self) -> str:
        """Whose rounding to reproduce unless the caller says otherwise: that of the layout's
        reference; for GGUF that of Hugging Face, llama.cpp's own products round differently."""
        return "hf" if self.layout == "gguf" else self.layout

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most parameters are stored in."""
        return self.weights.dominant_dtype()

    def __repr__(self) -> str:
        size = f"{self.file_bytes / 1e6:,.1f} MB"
        return f"Checkpoint({self.source!r}, {self.config.family}, {self.layout} layout, {size})"


def open_checkpoint(source: str | Path = "demo") -> Checkpoint:
    """Open a model without reading its weights: config, tensor names, shapes and dtypes.

    source: a folder in Meta's or Hugging Face's layout, a GGUF file, ``owner/name`` on the Hub,
    ``demo``, ``demo-gpt2`` or ``smollm2``. A folder that has both layouts is read as Hugging
    Face's.

    Raises ValueError or OSError, in one line with the numbers, for a config key that is unknown
    or does not fit, and for a tensor or file that is missing, superfluous, cut short or of
    another shape than the config asks for.
    """
    folder = resolve(source)
    layout = "gguf" if folder.is_file() else _layout(folder)
    how = None if layout == "gguf" else quantised_format(folder)
    if layout == "gguf":
        config, weights = gguf.open_file(folder)
    elif how is not None:
        config, weights = open_quantised(folder, how)
    else:
        config, weights = (hf if layout == "hf" else meta).open_folder(folder)
    return Checkpoint(
        source=str(source),
        folder=folder,
        layout=layout,
        config=config,
        weights=weights,
        file_bytes=sum(path.stat().st_size for path in weights.paths),
    )


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dialect: str | None = None,
) -> Model:
    """The model of a checkpoint, in eval mode, its parameters trainable.

    dtype    None: the dtype most of the checkpoint is stored in
    dialect  whose rounding to reproduce; None: that of the checkpoint's layout

    The model is built without memory, then each parameter is the mapped tensor itself where dtype
    and device are as stored, and is converted on its own otherwise, so nothing is held twice.
    Mapping takes no time; the bytes are read in the background, in the order of the forward pass.
    Training in place changes the memory of this model only: not the file, not the checkpoint's
    weights, not another model loaded from it.
    """
    dtype, device = dtype or checkpoint.dtype, torch.device(device)
    weights = checkpoint.weights.reopened(dtype)
    if isinstance(weights, QuantisedWeights):
        return weights.load_model(dtype, device, dialect or checkpoint.dialect).eval()
    model = empty_model(checkpoint.config, dialect or checkpoint.dialect)
    weights.check_redundant()
    tensors = {name: placed(weights[name], dtype, device) for name in weights}
    model.load_state_dict(tensors, strict=True, assign=True)
    if device.type == "cpu":
        # the embedding last: the first tokens want a few of its rows, a tied head all of them
        order = sorted(tensors, key=lambda name: name == "embed.weight")
        arguments = (weakref.ref(model), [tensors[name] for name in order])
        thread = threading.Thread(target=_read_ahead, args=arguments, daemon=True)
        _readers().add(thread)
        thread.start()
    return model.eval()


_leaving = threading.Event()  # the process ends


@cache
def _readers() -> weakref.WeakSet[threading.Thread]:
    """Threads that read ahead; none may hold a tensor while the interpreter is taken down."""
    readers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def end() -> None:
        _leaving.set()
        for thread in list(readers):
            thread.join()

    atexit.register(end)
    return readers


def _read_ahead(model: weakref.ref[Model], tensors: list[Tensor]) -> None:
    """Read the mapped weights from the disk, in the order in which the first pass reads them.

    The pass itself would wait for each page as it comes to it. Ends when the model is let
    go, or the process ends.
    """
    while tensors and model() is not None and not _leaving.is_set():
        read_pages(tensors.pop(0))


def placed(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mapped tensor itself where dtype and device fit; else a copy, and the mapped one let go."""
    moved = tensor.to(device=device, dtype=dtype)
    if moved is not tensor:
        forget_pages(tensor)
    return moved


def _layout(folder: Path) -> str:
    """ "hf" or "meta" by the files that are there; ValueError where neither layout is."""
    names = {path.name for path in folder.iterdir()}
    safetensors = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    shards = any(meta.SHARD.fullmatch(name) for name in names)
    if "config.json" in names and (safetensors or "params.json" not in names):
        return "hf"
    if "params.json" in names:
        return "meta"
    missing = (
        "the weights are there, params.json is missing"
        if shards
        else "the weights are there, config.json is missing"
        if safetensors
        else "expected params.json with consolidated.*.pth (Meta's layout), or config.json with "
        "*.safetensors (Hugging Face's)"
    )
    raise FileNotFoundError(f"{folder}: not a model: {missing}")
