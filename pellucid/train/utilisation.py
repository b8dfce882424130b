"""How fast this machine multiplies matrices, against which the speed of training is shown."""

from __future__ import annotations

import time

import torch


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
