"""How much of a machine training uses: its FLOPs against the matrix products it could do."""

from __future__ import annotations

import time

import torch

from pellucid.models import Config, Model
from pellucid.train.objective import head_weight


def flops_per_token(model: Model, context: int) -> int:
    """FLOPs of forward and backward for one token of a row of `context` tokens.

    6 per weight of a matrix product (2 forward, 4 backward; a table that is only looked up does
    none) and 12 · layers · heads · head width · context for attention, counted without the mask as
    is usual (Chowdhery et al., PaLM, 2022, appendix B).
    """
    config: Config = model.config
    tables = {id(model.embed.weight), id(getattr(model, "pos_embed", model.embed).weight)}
    matrices = {
        id(parameter): parameter.numel()
        for parameter in model.parameters()
        if parameter.ndim == 2 and id(parameter) not in tables
    }
    matrices[id(head_weight(model))] = head_weight(model).numel()
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * context
    return 6 * sum(matrices.values()) + attention


def measured_peak(
    device: torch.device, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.3
) -> float:
    """FLOP/s of square matrix products here and now, the fastest of those that fit in `seconds`."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    b, out = a.clone(), a.clone()
    fastest, end = float("inf"), time.perf_counter() + seconds
    torch.mm(a, b, out=out)  # what is set up once is not of interest
    while True:
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        now = time.perf_counter()
        fastest = min(fastest, now - began)
        if now > end:
            return 2 * size**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
