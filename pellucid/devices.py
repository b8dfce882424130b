"""Devices and dtypes by name, and how much memory is free."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import torch


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name; ValueError for a name that is no floating-point dtype."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(
                f"unknown dtype {dtype!r}: expected float32, bfloat16, float16, float64"
            )
        return found
    return dtype


def as_device(device: str | torch.device) -> torch.device:
    """A torch device from its name; ValueError for one that is unknown or not in this machine."""
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {str(device)!r}: expected cpu, cuda, cuda:1 …") from None
    if place.type == "cuda":  # counted, not tried: a context on the first GPU takes its memory
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            found = f"{count} of them" if count else "no GPU that it can use"
            raise ValueError(f"device {place}: PyTorch finds {found} in this machine; try cpu")
    elif place.type != "cpu":
        try:
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ValueError(
                f"device {place}: PyTorch cannot use it on this machine; try cpu"
            ) from None
    return place


def check_room(
    need: int, device: torch.device, what: str, remedy: str, room: int | None = None
) -> None:
    """ValueError where `what` would hold more than `room` bytes.

    room  None: half of the memory that is free on the device
    """
    room = free_memory(device) // 2 if room is None else room
    if need > room:
        raise ValueError(
            f"{what} would hold {Decimal(need) / 10**9:.1f} GB, more than the {room / 1e9:.1f} GB "
            f"it may take: {remedy}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on a device now; for the CPU what the kernel calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return 8 << 30  # not Linux: a guess that fits most machines
