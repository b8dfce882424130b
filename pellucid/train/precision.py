"""Where a model computes, and in what precision."""

from __future__ import annotations

import ctypes
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from pellucid.generate.native.build import NotBuilt, cache_folder
from pellucid.models import Model
from pellucid.ownership import own_folder
from pellucid.train.lean_products import LeanProducts


def device_of(model: Model) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def precision(device: torch.device, bfloat16: bool) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 (autocast), or everything as the weights are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


@contextmanager
def training_precision(model: Model, bfloat16: bool) -> Iterator[None]:
    """As `precision`, for a pass whose gradients are wanted; no copy of a weight is kept.

    Compiled blocks decide themselves what they keep.
    """
    compiled = any(_is_compiled(block) for block in model.layers)
    lean = LeanProducts() if bfloat16 and not compiled else nullcontext()
    type_ = device_of(model).type
    with torch.autocast(type_, torch.bfloat16, enabled=bfloat16, cache_enabled=False), lean:
        yield


def _is_compiled(block: nn.Module) -> bool:
    """Whether a block was compiled, as a whole or in its forward alone (as where it is sharded)."""
    whole = block._compiled_call_impl is not None
    return whole or hasattr(block.forward, "_torchdynamo_orig_callable")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies matrices in bfloat16 by instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    able = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def eager() -> AbstractContextManager[object]:
    """Compiled blocks run as they are written: other shapes would be compiled anew."""
    return torch.compiler.set_stance("force_eager")


def own_compiler_cache() -> None:
    """Let torch.compile load only libraries that this user has written.

    Its own cache is a folder in /tmp whose name anybody knows, and may have made before. One that
    the user states (TORCHINDUCTOR_CACHE_DIR) is left alone.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return
    try:
        folder = own_folder(cache_folder() / "inductor")
    except (OSError, NotBuilt) as error:
        folder = tempfile.mkdtemp(prefix="pellucid-inductor-")
        warnings.warn(
            f"what torch.compile makes is not kept for the next run: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for the next step to take again.

    A step of training frees gigabytes in large pieces, which the C library hands back to the
    system at once and fetches anew, page by page and zeroed: a fifth of the step's time. Nothing
    is kept that was not in use before, so the peak stays. For glibc; elsewhere nothing is done.
    """
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):
        return
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
