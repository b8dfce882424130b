"""Whether a weight of a GGUF file is the other side's, quantised as its declared type says.

The type says how many values share a scale and which levels there are, so nothing has to be found:
A's rows are quantised by the same rule, and the blocks that come out as B has them are proven. For
types whose scales a quantiser may choose (K-quants, an importance matrix) nothing is said here: the
search by values decides (`quantisation`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pellucid.checkpoints.formats.gguf import dequantised

_RULES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # one way to choose the scale of a block
_BLOCK = 32
_FAULTY = 0.25  # share of blocks up to which others are damage
Explanation = tuple[str, str, Literal["fault", "explained"]]


def declared_type(a: Tensor, b: Tensor, kind: str, head_dim: int = 0) -> Explanation | None:
    """(cause, finding, kind) where B is A in blocks of the type `kind`, or but for a few blocks.

    head_dim  of a weight whose rows RoPE turns: then also with pairs side by side and half apart

    None where it is not: then nothing is said and nothing excused.
    """
    if kind not in _RULES or a.shape != b.shape or a.ndim != 2 or a.shape[1] % _BLOCK:
        return None
    if not bool(a.isfinite().all()):
        return None
    right = _blocks_alike(a, b, kind)
    blocks, wrong = right.numel(), int((~right).sum())
    if not wrong:
        finding = f"B's values are A's in {kind}: all {blocks:,} blocks come out bit for bit"
        return "quantised weights", finding, "explained"
    if wrong > _FAULTY * blocks:
        for there, here, how in ((2, head_dim // 2, "interleaved"), (head_dim // 2, 2, "split")):
            if not head_dim or head_dim % 2 or len(a) % head_dim:
                continue
            moved = a.view(-1, there, here, a.shape[1]).transpose(1, 2).reshape(a.shape)
            if bool(_blocks_alike(moved, b, kind).all()):
                finding = f"B's rows are {how} for RoPE, and then A's in {kind}"
                return "q/k not permuted", finding, "fault"
        return None
    row, place = (~right).nonzero()[0].tolist()
    where = f"[{row}, {place * _BLOCK}:{(place + 1) * _BLOCK}]"
    finding = f"{kind}, but {wrong:,} of {blocks:,} blocks are not A's rounded, {where} first"
    return "quantised group with wrong values", finding, "fault"


def _blocks_alike(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """(rows, blocks) whether A's block, quantised by the rule of the type, is B's."""
    from gguf import GGMLQuantizationType, quantize

    found = []
    for x, y in zip(a.float().split(1024), b.split(1024), strict=True):
        raw = torch.from_numpy(quantize(x.contiguous().numpy(), GGMLQuantizationType[kind]))
        again = dequantised(raw.view(len(x), -1), kind, torch.float32).to(y.dtype)
        found.append((again == y).unflatten(1, (-1, _BLOCK)).all(2))
    return torch.cat(found)
