"""How a side of a diff is to be run or read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pellucid.models import Config


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a side is to be run or read; None leaves it as it is.

    dtype, dialect  of one of our own models; dtype also of ``hf:PATH``
    fused           attention in one kernel: scaled_dot_product_attention
    copies          of our own model: every row so many times in one batch
    fast            of our own model: decoding steps in C
    name_map        of a recording: a shipped map's name, or a YAML file
    config, weights of the model that a recording is of, where the other side knows them
    """

    dtype: str | torch.dtype | None = None
    dialect: str | None = None
    fused: bool = False
    copies: int = 1
    fast: bool = False
    name_map: str | Path | None = None
    config: Config | None = None
    weights: Mapping[str, Tensor] | None = None
