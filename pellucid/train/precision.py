"""Where a model computes, and in what precision."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from pellucid.models import Model


def device_of(model: Model) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def precision(device: torch.device, bfloat16: bool) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 (autocast), or everything as the weights are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies matrices in bfloat16 by instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    able = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def eager() -> AbstractContextManager[object]:
    """Compiled blocks run as they are written: other shapes would be compiled anew."""
    return torch.compiler.set_stance("force_eager")
