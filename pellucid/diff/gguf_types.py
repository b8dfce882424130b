"""Whether a weight of a GGUF file is the other side's, quantised as its declared type says.

The type says how many values share a scale and which levels there are, so nothing has to be found.
Where there is one way to choose a scale, A's rows are quantised by the same rule. Where a quantiser
may choose (K-quants), the blocks in the file say which levels it chose, and each of A's values must
have gone to the nearest; an importance matrix fits the scales of the other types to their codes
afterwards, and then one scale must have rounded A's values to these codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pellucid.checkpoints.formats.gguf import dequantised
from pellucid.gguf_file import TYPES

_RULES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # one usual way to choose the scale of a block
_ZERO = {"Q4_0": 8, "Q5_0": 16}  # code of 0 where blocks have no offset
_ADJUSTED = 1.25  # times by which a scale may be moved after its codes were chosen
_OFFSET = 1.5  # steps by which its offset may be
_MEDIAN = 0.03  # by which the scales of a whole tensor may be off, in the middle
_FAULTY = 0.25  # share of groups up to which others are damage
_CLIPPED = 1.5  # steps by which a value beyond the last level may be farther off than half a step
_CLIPPED_SHARE = 0.25  # of a group's values that may be farther off
_HALF = 2.0**-11  # A may have been float16 when it was quantised
_PIECE = 1 << 20  # values held against their levels at a time
Explanation = tuple[str, str, Literal["fault", "explained"]]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Where the blocks of a type keep their codes (ggml-common.h).

    codes   bytes of a block that hold nothing else: first, end
    ends    what these bytes are where all codes are the lowest, and the highest
    levels  how many codes there are
    group   values that share a scale
    scales  largest number by which a group's scale is stored, of the block's; 0: stored as it is
    """

    codes: tuple[int, int]
    ends: tuple[int, int] = (0, 255)
    levels: int
    group: int = 32
    scales: int = 0


_BLOCKS = {
    "Q8_0": Blocks(codes=(2, 34), ends=(128, 127), levels=256),
    "Q4_0": Blocks(codes=(2, 18), levels=16),
    "Q4_1": Blocks(codes=(4, 20), levels=16),
    "Q5_0": Blocks(codes=(2, 22), levels=32),
    "Q5_1": Blocks(codes=(4, 24), levels=32),
    "Q2_K": Blocks(codes=(16, 80), levels=4, group=16, scales=15),
    "Q3_K": Blocks(codes=(0, 96), levels=8, group=16, scales=31),
    "Q4_K": Blocks(codes=(16, 144), levels=16, scales=63),
    "Q5_K": Blocks(codes=(16, 176), levels=32, scales=63),
    "Q6_K": Blocks(codes=(0, 192), levels=64, group=16, scales=127),
}
_SIZES = {name: (values, nbytes) for name, values, nbytes in TYPES.values()}


def declared_type(
    a: Tensor, b: Tensor, kind: str, head_dim: int = 0, raw: Tensor | None = None
) -> Explanation | None:
    """(cause, finding, kind) where B is A in blocks of the type `kind`, or but for a few groups.

    head_dim  of a weight whose rows RoPE turns: then also with pairs side by side and half apart
    raw       B's blocks as the file has them, (rows, bytes)

    None where it is not: then nothing is said and nothing excused.
    """
    if kind not in _BLOCKS or a.shape != b.shape or a.ndim != 2 or a.shape[1] % _SIZES[kind][0]:
        return None
    if not bool(a.isfinite().all()):
        return None
    if kind in _RULES and (found := _explained(a, b, kind, head_dim, _by_rule, "bit for bit")):
        return found
    if raw is None or not _is_its_blocks(b, kind, raw):
        return None

    def nearest(x: Tensor, y: Tensor, kind: str) -> Tensor:
        return _nearest(x, kind, raw)

    def rounded(x: Tensor, y: Tensor, kind: str) -> Tensor:
        return _rounded(x, kind, raw)

    if kind not in _RULES:
        return _explained(a, b, kind, head_dim, nearest, "on the nearest of their own levels")
    if kind == "Q8_0":
        return None  # it has no other way to choose a scale
    return _explained(a, b, kind, head_dim, rounded, "with codes that one scale rounds them to")


def _explained(
    a: Tensor,
    b: Tensor,
    kind: str,
    head_dim: int,
    alike: Callable[[Tensor, Tensor, str], Tensor],
    how: str,
) -> Explanation | None:
    """What `alike`, which says of each group (rows, groups) whether B's is A's, comes to."""
    right, size = alike(a, b, kind), _BLOCKS[kind].group
    groups, wrong = right.numel(), int((~right).sum())
    if not wrong:
        finding = f"B's values are A's in {kind}: all {groups:,} groups of {size} come out {how}"
        return "quantised weights", finding, "explained"
    if wrong > _FAULTY * groups:
        for there, here, order in ((2, head_dim // 2, "interleaved"), (head_dim // 2, 2, "split")):
            if not head_dim or head_dim % 2 or len(a) % head_dim:
                continue
            moved = a.view(-1, there, here, a.shape[1]).transpose(1, 2).reshape(a.shape)
            if bool(alike(moved, b, kind).all()):
                finding = f"B's rows are {order} for RoPE, and then A's in {kind}"
                return "q/k not permuted", finding, "fault"
        return None
    row, place = (~right).nonzero()[0].tolist()
    where = f"[{row}, {place * size}:{(place + 1) * size}]"
    finding = f"{kind}, but {wrong:,} of {groups:,} groups are not A's rounded, {where} first"
    return "quantised group with wrong values", finding, "fault"


def _by_rule(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """(rows, groups) whether A's block, quantised by the rule of the type, is B's."""
    from gguf import GGMLQuantizationType, quantize

    found = []
    for x, y in zip(a.float().split(1024), b.split(1024), strict=True):
        raw = torch.from_numpy(quantize(x.contiguous().numpy(), GGMLQuantizationType[kind]))
        again = dequantised(raw.view(len(x), -1), kind, torch.float32).to(y.dtype)
        found.append((again == y).unflatten(1, (-1, _BLOCKS[kind].group)).all(2))
    return torch.cat(found)


def _is_its_blocks(b: Tensor, kind: str, raw: Tensor) -> bool:
    """Whether B's values are those of the blocks."""
    rows = max(1, _PIECE // b.shape[1])
    return len(raw) == len(b) and all(
        torch.equal(dequantised(blocks, kind, torch.float32).to(y.dtype), y)
        for blocks, y in zip(raw.split(rows), b.split(rows), strict=True)
    )


def _nearest(a: Tensor, kind: str, raw: Tensor) -> Tensor:
    """(rows, groups) whether each of A's values went to the nearest level that its group has.

    Beyond the last level it may be off by what rounding the group's scale and offset costs, and a
    few may be farther.
    """
    how, found, rows = _BLOCKS[kind], [], max(1, _PIECE // a.shape[1])
    for x, blocks in zip(a.float().split(rows), raw.split(rows), strict=True):
        x = x.unflatten(1, (-1, how.group))  # (rows, groups, values)
        value = dequantised(blocks, kind, torch.float32).view(x.shape)
        low, high = (_ends(blocks, kind, end).view(x.shape)[..., :1] for end in how.ends)
        step = (high - low).abs() / (how.levels - 1)
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        near = step * (0.5 + 1e-4) + _HALF * x.abs()
        beyond = near + _CLIPPED * step
        if how.scales:
            unit = _largest(step, kind) * how.levels + _largest(low, kind)
            beyond = beyond + unit / (2 * how.scales)
        off = x - value
        at_end = ((value <= low + step / 4) & (off < 0)) | ((value >= high - step / 4) & (off > 0))
        right = off.abs() <= torch.where(at_end, beyond, near)
        clipped = at_end & ~right  # by a quantiser to which these values matter little
        few = clipped.sum(2) <= _CLIPPED_SHARE * how.group
        found.append((right | clipped).all(2) & few)
    return torch.cat(found)


def _rounded(a: Tensor, kind: str, raw: Tensor) -> Tensor:
    """(rows, groups) whether some scale, and offset, rounds A's values to the codes of B's block.

    With an importance matrix the codes are chosen by one scale, and then the scale is fitted to
    them: the stored one may round values to other codes, but is near the one that chose them. The
    price: one group with a scale a little wrong, or an offset by one level, can pass.
    """
    how, found, ratios, offsets = _BLOCKS[kind], [], [], []
    rows = max(1, _PIECE // 16 // a.shape[1])
    for x, blocks in zip(a.float().split(rows), raw.split(rows), strict=True):
        x = x.unflatten(1, (-1, how.group))  # (rows, groups, values)
        value = dequantised(blocks, kind, torch.float32).view(x.shape)
        low, high = (_ends(blocks, kind, end).view(x.shape)[..., :1] for end in how.ends)
        step = (high - low) / (how.levels - 1)
        empty = (step == 0).squeeze(2)
        step = torch.where(step == 0, 1.0, step)
        code, here = ((value - low) / step).round(), (x - low) / step  # in steps from the lowest
        zero = _ZERO.get(kind)
        middle = code.mean(2, keepdim=True) if zero is None else zero
        off = code - middle
        ratios.append(((here - middle) * off).sum(2) / off.square().sum(2).clamp(min=1e-9))
        offsets.append((here - code).mean(2))
        least = torch.where(code > 0, code - 0.501, float("-inf"))
        most = torch.where(code < how.levels - 1, code + 0.501, float("inf"))
        fits = _one_factor(here, least, most) if zero is None else _factor(here, least, most, zero)
        found.append(torch.where(empty, (x == value).all(2), fits))
    scale, offset = (torch.cat(each).flatten().median() for each in (ratios, offsets))
    return torch.cat(found) & bool((scale - 1).abs() <= _MEDIAN and offset.abs() <= 0.25)


def _factor(here: Tensor, least: Tensor, most: Tensor, zero: int) -> Tensor:
    """Whether some factor about `zero` puts every place between its bounds."""
    x = here - zero
    one, other = (least - zero) / x, (most - zero) / x
    first = torch.where(x > 0, one, other).amax(2).clamp(min=1 / _ADJUSTED)
    last = torch.where(x > 0, other, one).amin(2).clamp(max=_ADJUSTED)
    return first <= last


def _one_factor(here: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Whether some factor with some offset does.

    An offset fits a factor where no two places ask for more: least i − most j ≤ factor · (i − j).
    """
    apart = here.unsqueeze(3) - here.unsqueeze(2)  # (rows, groups, i, j)
    bound = (least.unsqueeze(3) - most.unsqueeze(2)) / apart
    none = torch.full_like(bound, float("inf"))
    first = torch.where(apart > 0, bound, -none).amax((2, 3)).clamp(min=1 / _ADJUSTED)
    last = torch.where(apart < 0, bound, none).amin((2, 3)).clamp(max=_ADJUSTED)
    factor = torch.maximum(first, torch.minimum(last, torch.ones_like(last))).unsqueeze(2)
    lowest, highest = (least - factor * here).amax(2), (most - factor * here).amin(2)
    return (first <= last) & (lowest <= _OFFSET) & (highest >= -_OFFSET)


def _ends(raw: Tensor, kind: str, code: int) -> Tensor:
    """The values of the blocks with all codes the lowest or the highest, (rows, columns)."""
    first, end = _BLOCKS[kind].codes
    blocks = raw.unflatten(1, (-1, _SIZES[kind][1])).clone()
    blocks[..., first:end] = code
    return dequantised(blocks.flatten(1), kind, torch.float32)


def _largest(x: Tensor, kind: str) -> Tensor:
    """Of groups (rows, groups, 1) the largest size in each block, for all its groups."""
    each = _SIZES[kind][0] // _BLOCKS[kind].group
    size = x.abs().unflatten(1, (-1, each))
    return size.amax(2, keepdim=True).expand_as(size).flatten(1, 2)
