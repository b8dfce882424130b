"""What would be faster with what: from what was found, and from two measurements."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pellucid.doctor.arithmetic import numbers
from pellucid.doctor.check import MachineCheck
from pellucid.system import cores

_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def measure() -> dict[str, float]:
    """Rates of this machine: FLOP/s of products in two types, bytes/s of reading memory."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = numbers(768, 768, seed=1, dtype=dtype)
        rates[f"{dtype}".removeprefix("torch.") + "_flops"] = (
            2 * 768**3 / _fastest(lambda a=a: a @ a)
        )
    read = torch.ones(32 << 20)
    rates["read_bytes"] = read.nbytes / _fastest(read.sum)
    return rates


def advise(
    checks: list[MachineCheck], machine: dict[str, Any], rates: dict[str, float]
) -> list[str]:
    """Sentences, each with the cause and what to do."""
    state = {check.name: check.state for check in checks}
    said = []
    if state.get("C kernels") == "note":
        said.append(
            "decoding in C, often several times as fast: install a C compiler (gcc or clang), or "
            "set CC; what stands in the way is in the table"
        )
    if torch.get_num_threads() > cores():
        said.append(
            f"threads wait for each other: OMP_NUM_THREADS={cores()}, as many as there are cores"
        )
    elif torch.get_num_threads() < cores() and "OMP_NUM_THREADS" in os.environ:
        said.append(
            f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves cores idle: up to {cores()}"
        )
    said += [_training_type(rates), _decoding(rates)]
    if _LARGE_PAGES.is_file() and "[never]" in _LARGE_PAGES.read_text():
        said.append(
            "decoding reads weights through pages of 4 KB; with large ones a tenth more: "
            f"echo madvise > {_LARGE_PAGES} (as root)"
        )
    if state.get("GPU") == "note":
        said.append("the GPU: install the build of PyTorch for its driver (pytorch.org)")
    load = machine.get("load_average")
    if load and load[0] > 1.5 * cores():
        said.append(
            f"{load[0]:.1f} processes want {cores()} cores: measured rates are too low meanwhile"
        )
    return said


def _training_type(rates: dict[str, float]) -> str:
    ratio = rates["bfloat16_flops"] / rates["float32_flops"]
    peak = f"float32 products reach {rates['float32_flops'] / 1e9:.0f} GFLOP/s"
    if ratio > 1.2:
        return f"{peak}, bfloat16 {ratio:.1f} times that: train --precision bfloat16"
    return f"{peak}, bfloat16 {ratio:.2f} times that: train --precision float32 on this machine"


def _decoding(rates: dict[str, float]) -> str:
    read = rates["read_bytes"]
    return (
        f"memory is read at {read / 1e9:.1f} GB/s, which bounds decoding: a model of 1 GB of "
        f"weights writes at most {read / 1e9:.0f} tokens/s; convert --to int8 or int4 reads a half "
        "or a quarter of bfloat16"
    )


def _fastest(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best
