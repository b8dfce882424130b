"""Tensors as bytes, and values as JSON, as they leave for a page or a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.explore.reduce import reduce_tiles
from pellucid.explore.runs import ExploredRun


def without_batch(run: ExploredRun, address: str) -> Tensor:
    """What a run has at an address, the batch axis left out."""
    name, index = names.parse(address)
    found = run[address]
    return found[0] if not index and graph.has_batch(name) else found


def packed(
    tensor: Tensor, how: str | None = None, to: tuple[int, int] = (512, 512)
) -> tuple[bytes, dict[str, str]]:
    """A tensor, or its tiles by `how`, as little-endian bytes, and headers that say what they are.

    Without `how` they are the tensor's own bits, a bool a byte.
    """
    dtype, shape, more = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), {}
    if how is None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        data = reduce_tiles(tensor, how, *to)
        tall, wide = (1, *shape)[-2:]
        more["X-Reduced"] = f"{tall / data.shape[-2]:g}x{wide / data.shape[-1]:g} per cell"
        dtype, shape = "float32", data.shape if len(shape) > 1 else data.shape[-1:]
    headers = {"X-Dtype": dtype, "X-Shape": ",".join(map(str, shape)), **more}
    return _little(data), headers


def _little(data: np.ndarray) -> bytes:
    return data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes()


def plain(value: Any) -> Any:
    """`value` with text in place of numbers that JSON does not know: "NaN", "Infinity"."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value
