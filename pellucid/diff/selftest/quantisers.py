"""The formats in which weights are published, each as a function to the values it stands for.

x (rows, columns) in float32 -> the dequantised matrix in float32. These are the controls of the
weight stage: each must read as explained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pellucid.diff.levels import FP4, NF4
from pellucid.models.quantised import QuantisedMatrix

Quantiser = Callable[[Tensor], Tensor]


def ours(bits: int) -> Quantiser:
    """This package's own int8, int6 or int4 in groups of 64."""

    def through(x: Tensor) -> Tensor:
        matrix = QuantisedMatrix(*x.shape, bits=bits, dtype=torch.float32)
        matrix.quantise_(x)
        return matrix.weight

    return through


def by_rows(x: Tensor, bits: int = 8) -> Tensor:
    """Symmetric, a scale for each row."""
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def with_offset(bits: int, group: int) -> Quantiser:
    """From the smallest to the largest value of a group, both exact."""

    def through(x: Tensor) -> Tensor:
        groups = x.unflatten(1, (-1, group))
        low = groups.amin(-1, keepdim=True)
        step = (groups.amax(-1, keepdim=True) - low).clamp(min=1e-30) / (2**bits - 1)
        return (((groups - low) / step).round() * step + low).flatten(1)

    return through


def ggml_signed(bits: int) -> Quantiser:
    """Q4_0, Q5_0, Q8_0: blocks of 32, levels by the exact scale, the scale kept in float16."""

    def through(x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (-1, 32))
        at = blocks.abs().argmax(-1, keepdim=True)
        largest = blocks.gather(-1, at)
        half = 2 ** (bits - 1)
        scale = largest.abs() / 127 if bits == 8 else largest / -half
        inverse = torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
        levels = (blocks * inverse).round().clamp(-127 if bits == 8 else -half, half - 1)
        return (levels * scale.half().float()).flatten(1)

    return through


def ggml_offset(bits: int) -> Quantiser:
    """Q4_1, Q5_1: blocks of 32, scale and minimum kept in float16."""

    def through(x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (-1, 32))
        low = blocks.amin(-1, keepdim=True)
        scale = (blocks.amax(-1, keepdim=True) - low).clamp(min=1e-30) / (2**bits - 1)
        levels = ((blocks - low) / scale).round()
        return (levels * scale.half().float() + low.half().float()).flatten(1)

    return through


def k_offset(bits: int, block: int, width: int = 6) -> Quantiser:
    """Q2_K, Q4_K, Q5_K: scales and minima of `width` bits per block, under two float16 numbers."""

    def through(x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (-1, min(256, x.shape[1]))).unflatten(-1, (-1, block))
        low = blocks.amin(-1, keepdim=True).clamp(max=0)
        scale = (blocks.amax(-1, keepdim=True) - low) / (2**bits - 1)
        most = 2**width - 1
        d, m = (
            (y.amax(-2, keepdim=True) / most).half().float().clamp(min=1e-7) for y in (scale, -low)
        )
        scale = d * (scale / d).round().clamp(max=most)
        low = -m * (-low / m).round().clamp(max=most)
        safe = torch.where(scale == 0, 1.0, scale)
        levels = ((blocks - low) / safe).round().clamp(0, 2**bits - 1)
        return (scale * levels + low).flatten(1)

    return through


def k_signed(bits: int, width: int) -> Quantiser:
    """Q3_K, Q6_K: blocks of 16, signed scales of `width` bits under one float16 number."""

    def through(x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (-1, min(256, x.shape[1]))).unflatten(-1, (-1, 16))
        at = blocks.abs().argmax(-1, keepdim=True)
        scale = blocks.gather(-1, at) / -(2 ** (bits - 1))
        most = 2 ** (width - 1)
        d = (scale.abs().amax(-2, keepdim=True) / (most - 1)).half().float().clamp(min=1e-7)
        scale = d * (scale / d).round().clamp(-most, most - 1)
        safe = torch.where(scale == 0, 1.0, scale)
        levels = (blocks / safe).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (scale * levels).flatten(1)

    return through


def coded(codes: tuple[float, ...], group: int, rounded: bool = False) -> Quantiser:
    """A table of codes times the largest value of a group; `rounded`: that in eight bits."""

    def through(x: Tensor) -> Tensor:
        groups = x.reshape(-1, group)
        scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-30) / max(codes)
        table = torch.tensor(codes)
        levels = table[((groups / scale)[..., None] - table).abs().argmin(-1)]
        if rounded:
            middle = scale.mean()
            step = (scale - middle).abs().amax() / 127
            scale = ((scale - middle) / step).round() * step + middle
        return (levels * scale).reshape(x.shape)

    return through


def float8(dtype: torch.dtype, scaled: str) -> Quantiser:
    """A float8 type: as it is, or under one scale of the tensor or of each row."""

    def through(x: Tensor) -> Tensor:
        largest = x.abs().amax(1, keepdim=True) if scaled == "rows" else x.abs().amax()
        scale = largest / torch.finfo(dtype).max if scaled else torch.ones(())
        return (x / scale).to(dtype).float() * scale

    return through


def gptq(x: Tensor, bits: int = 4, group: int = 32) -> Tensor:
    """Column after column, the error of each passed on to those after it (Frantar et al., 2022).

    The inputs are drawn, correlated as activations are.
    """
    columns = x.shape[1]
    random = torch.Generator().manual_seed(7)
    mixing = torch.eye(columns, dtype=torch.float64) + torch.randn(
        columns, columns, generator=random, dtype=torch.float64
    ) / (columns**0.5)
    inputs = torch.randn(4 * columns, columns, generator=random, dtype=torch.float64) @ mixing
    hessian = inputs.T @ inputs / len(inputs)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, made = x.double().clone(), torch.zeros_like(x, dtype=torch.float64)
    low = step = zero = torch.zeros(len(x), dtype=torch.float64)
    for column in range(columns):
        if column % group == 0:
            low = left[:, column : column + group].amin(1)
            high = left[:, column : column + group].amax(1)
            step = (high - low).clamp(min=1e-30) / (2**bits - 1)
            zero = (-low / step).round()
        level = ((left[:, column] / step).round() + zero).clamp(0, 2**bits - 1)
        made[:, column] = (level - zero) * step
        error = (left[:, column] - made[:, column]) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
    return made.float()


FORMATS: dict[str, Quantiser] = {
    "int8, ours": ours(8),
    "int6, ours": ours(6),
    "int4, ours": ours(4),
    "int8 by rows": by_rows,
    "int8 by rows with an offset": lambda x: with_offset(8, x.shape[1])(x),
    "int4 in groups of 32 with an offset": with_offset(4, 32),
    "Q8_0": ggml_signed(8),
    "Q5_0": ggml_signed(5),
    "Q4_0": ggml_signed(4),
    "Q5_1": ggml_offset(5),
    "Q4_1": ggml_offset(4),
    "Q6_K": k_signed(6, 8),
    "Q5_K": k_offset(5, 32),
    "Q4_K": k_offset(4, 32),
    "Q3_K": k_signed(3, 6),
    "Q2_K": k_offset(2, 16, 4),
    "NF4": coded(NF4.codes, 64),
    "NF4, scales in eight bits": coded(NF4.codes, 64, rounded=True),
    "float4 (e2m1)": coded(FP4.codes, 32),
    "float8 e4m3": float8(torch.float8_e4m3fn, ""),
    "float8 e4m3, one scale": float8(torch.float8_e4m3fn, "tensor"),
    "float8 e4m3, by rows": float8(torch.float8_e4m3fn, "rows"),
    "float8 e5m2, one scale": float8(torch.float8_e5m2, "tensor"),
    "GPTQ, 4 bits": gptq,
    "GPTQ, 3 bits": lambda x: gptq(x, 3),
    "bfloat16": lambda x: x.bfloat16().float(),
    "float16": lambda x: x.half().float(),
}
