"""Weight-only quantisation: matrices as whole numbers of 8, 6 or 4 bits with a scale per group.

    weight[row, column]  ≈  level[row, column] × scale[row, column // group]

Levels run from −127 to 127, from −32 to 31, or from −8 to 7; a scale is a bfloat16 number.
Activations stay as they are. Levels are stored in the order in which the decoder of
`generate/native` reads them: tiles of 16 rows, group by group, so that one 64-byte load holds four
columns of sixteen rows:

    8 bits   (tiles, groups, group / 4, 16 rows, 4 columns) bytes, level + 128
    4 bits   (tiles, groups, group / 8, 16 rows, 4 columns) bytes; the low half of a byte is a level
             of the group's first half, the high half one of its second half, each + 8
    6 bits   (tiles, groups, group · 3 / 16, 16 rows, 4 columns) bytes, level + 32: its low 4 bits
             as with 4 bits, then bytes with the high 2 bits of four levels, one of each quarter

Rows are padded to whole tiles and columns to whole groups, with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.models import Config, Model, empty_model
from pellucid.models.finite import check_finite

TILE = 16
GROUP = 64
_OFFSET = {8: 128, 6: 32, 4: 8}
_PARTS = ("packed", "scales")


class QuantisedMatrix(nn.Module):
    """A matrix (rows, columns) in 8, 6 or 4 bits per weight plus 16 per group.

    `packed` and `scales` are buffers; `weight` computes the matrix that they stand for.
    """

    packed: Tensor
    scales: Tensor

    def __init__(
        self, rows: int, columns: int, *, bits: int, group: int = GROUP, dtype: torch.dtype
    ) -> None:
        """dtype: of the matrix that `weight` gives. ValueError for other bits or groups."""
        super().__init__()
        if bits not in _OFFSET:
            raise ValueError(f"weights of {bits} bits: expected 8, 6 or 4")
        if group < 16 or group % 16 or group > 256:
            raise ValueError(f"groups of {group} weights: expected a multiple of 16, at most 256")
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        self.dtype = dtype  # what `weight` gives; levels and scales know nothing of it
        tiles, groups = -(-rows // TILE), -(-columns // group)
        steps = group * bits // 32
        self.register_buffer(
            "packed", torch.zeros(tiles, groups, steps, TILE, 4, dtype=torch.uint8)
        )
        self.register_buffer("scales", torch.zeros(tiles, groups, TILE, dtype=torch.bfloat16))

    def extra_repr(self) -> str:
        """Shape and format, for the printed module."""
        return f"{self.rows}, {self.columns}, bits={self.bits}, group={self.group}"

    @property
    def weight(self) -> Tensor:
        """The matrix (rows, columns), computed anew at each access; no gradient reaches it."""
        levels, scales = unpacked(self.packed, self.bits), self.scales.transpose(1, 2)
        whole = levels * scales[..., None]  # (tiles, 16, groups, group) float32
        return whole.flatten(2).flatten(0, 1)[: self.rows, : self.columns].to(self.dtype)

    def rows_at(self, places: Tensor) -> Tensor:
        """places (…) -> those rows, (…, columns), without computing the others."""
        tiles, inside = places // TILE, places % TILE
        levels = unpacked(self.packed[tiles.flatten()], self.bits)  # (n, 16, groups, group)
        chosen = torch.arange(len(levels), device=places.device), inside.flatten()
        scales = self.scales[tiles.flatten()].transpose(1, 2)  # (n, 16, groups)
        rows = (levels[chosen] * scales[chosen][..., None]).flatten(1)[:, : self.columns]
        return rows.to(self.dtype).view(*places.shape, self.columns)

    def misfits(self, weight: Tensor) -> Tensor:
        """Whether a group has a level that is not the one nearest to weight (rows, columns).

        Returns (rows, groups) of bool. What rounding to these scales explains has none; a damaged
        level or scale shows.
        """
        groups, found = self.scales.shape[1], []
        for tile in range(0, len(self.packed), 64):  # a slice at a time, as in `quantise_`
            some = weight[tile * TILE : (tile + 64) * TILE].float()
            some = F.pad(some, (0, groups * self.group - self.columns))
            scales = self.scales[tile : tile + 64].transpose(1, 2).flatten(0, 1)[: len(some)]
            levels = unpacked(self.packed[tile : tile + 64], self.bits).flatten(0, 1)[: len(some)]
            wanted = to_levels(some.unflatten(1, (groups, self.group)), scales, self.bits)
            found.append((levels != wanted).any(-1))
        return torch.cat(found)

    @torch.no_grad()
    def quantise_(self, weight: Tensor, name: str = "the matrix") -> None:
        """Fill in levels and scales for a weight (rows, columns); ValueError for NaN, infinity."""
        tiles, groups = self.packed.shape[:2]
        for tile in range(0, tiles, 16):  # a slice at a time: float32 copies of it are made
            some = weight[tile * TILE : (tile + 16) * TILE].float()
            check_finite(name, some)
            padding = (0, groups * self.group - self.columns, 0, -len(some) % TILE)
            some = F.pad(some, padding).view(-1, TILE, groups, self.group)
            scales = best_scales(some, self.bits)
            self.scales[tile : tile + 16] = scales.transpose(1, 2)
            self.packed[tile : tile + 16] = packed(to_levels(some, scales, self.bits), self.bits)


class QuantisedLinear(QuantisedMatrix):
    """``nn.Linear`` with a quantised weight (outputs, inputs) and a bias as it was."""

    def __init__(self, linear: nn.Linear, *, bits: int, group: int = GROUP) -> None:
        rows, columns = linear.weight.shape
        super().__init__(rows, columns, bits=bits, group=group, dtype=linear.weight.dtype)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (…, columns) -> (…, rows)."""
        return F.linear(x, self.weight, self.bias)


class QuantisedEmbedding(QuantisedMatrix):
    """``nn.Embedding`` with a quantised table; `weight` also serves a tied head."""

    def __init__(self, embedding: nn.Embedding, *, bits: int, group: int = GROUP) -> None:
        rows, columns = embedding.weight.shape
        super().__init__(rows, columns, bits=bits, group=group, dtype=embedding.weight.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (…) -> (…, columns)."""
        return self.rows_at(tokens)


def best_scales(weight: Tensor, bits: int) -> Tensor:
    """Scales (…) of groups (…, group): of a few candidates the one with the least squared error.

    With 8 bits the largest weight becomes the largest level. With 6 or 4 bits it becomes −32 or
    −8, which are levels while 32 and 8 are none (so the scale is negative where that weight is
    positive); with 4 bits also a little more or less, since cutting it off may pay.
    """
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))[..., 0]
    if bits == 8:
        return (largest.abs() / 127).to(torch.bfloat16)
    if bits == 6:
        return (largest / -32).to(torch.bfloat16)
    best = error = None
    for level in (-8.0, -8.6, -7.4):
        scales = (largest / level).to(torch.bfloat16)
        off = (to_levels(weight, scales, bits) * scales[..., None] - weight).square().sum(-1)
        if best is None or error is None:
            best, error = scales, off
        else:
            best, error = torch.where(off < error, scales, best), torch.minimum(off, error)
    assert best is not None, "there are candidates"
    return best


def to_levels(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """weight (…, group), scales (…) -> levels (…, group) as float32; a scale of 0 gives zeros."""
    wide = scales.float()[..., None]
    levels = torch.where(wide == 0, 0, weight / torch.where(wide == 0, 1, wide)).round()
    return levels.clamp(max(-_OFFSET[bits], -127), _OFFSET[bits] - 1)


def packed(levels: Tensor, bits: int) -> Tensor:
    """levels (tiles, 16, groups, group) -> bytes (tiles, groups, group · bits / 32, 16, 4)."""
    stored = (levels + _OFFSET[bits]).to(torch.uint8).unflatten(-1, (-1, 4))
    stored = stored.permute(0, 2, 3, 1, 4)  # (tiles, groups, group / 4, 16, 4)
    if bits == 8:
        return stored.contiguous()
    first, second = (stored & 15).chunk(2, dim=2)
    low = first | second << 4
    if bits == 4:
        return low
    one, two, three, four = (stored >> 4).chunk(4, dim=2)
    return torch.cat((low, one | two << 2 | three << 4 | four << 6), dim=2)


def unpacked(stored: Tensor, bits: int) -> Tensor:
    """What `packed` made -> levels (tiles, 16, groups, group) as float32."""
    if bits < 8:
        loads = stored.shape[2] * 4 // bits  # of low halves: two thirds of 6 bits, all of 4
        low, high = stored[:, :, :loads], stored[:, :, loads:]
        stored = torch.cat((low & 15, low >> 4), dim=2)
        if bits == 6:
            stored = stored | torch.cat([(high >> 2 * q & 3) << 4 for q in range(4)], dim=2)
    return stored.permute(0, 3, 1, 2, 4).flatten(-2).float() - _OFFSET[bits]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a model is quantised.

    bits       of the matrices in the blocks: 8, 6 or 4
    group      neighbours in a row that share a scale
    head_bits  of embedding and head, where errors show most; 0: 8, or 6 where `bits` is 4
    """

    bits: int = 8
    group: int = GROUP
    head_bits: int = 0

    def __post_init__(self) -> None:
        if not self.head_bits:
            object.__setattr__(self, "head_bits", 6 if self.bits == 4 else 8)
        for bits in (self.bits, self.head_bits):
            if bits not in tuple(_OFFSET):
                raise ValueError(f"weights of {str(bits)[:60]} bits: expected 8, 6 or 4")
        if self.group not in (32, 64, 128):
            raise ValueError(f"groups of {str(self.group)[:60]} weights: expected 32, 64 or 128")

    def __str__(self) -> str:
        head = "" if self.head_bits == self.bits else f", head int{self.head_bits}"
        return f"int{self.bits} in groups of {self.group}{head}"


def quantise(model: Model, how: Format) -> Model:
    """The same model with quantised matrices in place of its own; the others are let go.

    Norms, biases and position embeddings stay. ValueError for a model that is quantised already.
    """
    for module in _replaced(model, how, fill=True):
        if isinstance(module, QuantisedMatrix):
            raise ValueError("the model is quantised already: quantise the original")
    return model


def quantised_empty(config: Config, how: Format, dialect: str = "hf") -> Model:
    """A quantised model without values, to load saved levels and scales into."""
    model = empty_model(config, dialect)
    with torch.device("meta"):
        for _ in _replaced(model, how, fill=False):
            pass
    return model


def _replaced(model: Model, how: Format, fill: bool) -> Iterator[nn.Module]:
    """Put a quantised matrix in the place of each linear layer and the embedding, one at a time.

    Each module is yielded before it is replaced.
    """
    for path, module in list(model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, QuantisedMatrix):
            yield module
            continue
        bits = how.bits if path.startswith("layers.") else how.head_bits
        if isinstance(module, nn.Linear):
            made = QuantisedLinear(module, bits=bits, group=how.group)
        elif isinstance(module, nn.Embedding) and path == "embed":
            made = QuantisedEmbedding(module, bits=bits, group=how.group)
        else:
            continue
        yield module
        if fill:
            made.quantise_(module.weight.detach(), f"{path}.weight")
        setattr(model.get_submodule(parent), leaf, made)


class FullWeights(Mapping[str, Tensor]):
    """Parameter name -> tensor of a model, quantised matrices computed at each access."""

    def __init__(self, model: nn.Module) -> None:
        self._quantised = {
            f"{path}.weight": module
            for path, module in model.named_modules()
            if isinstance(module, QuantisedMatrix)
        }
        state = model.state_dict()
        stored = {
            f"{name.removesuffix('weight')}{part}" for name in self._quantised for part in _PARTS
        }
        self._plain = {name: tensor for name, tensor in state.items() if name not in stored}

    def quantised(self, name: str) -> QuantisedMatrix | None:
        """The matrix behind a parameter, where it is a quantised one."""
        return self._quantised.get(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._quantised[name].weight if name in self._quantised else self._plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._quantised, *self._plain])

    def __len__(self) -> int:
        return len(self._quantised) + len(self._plain)


def is_quantised(model: nn.Module) -> bool:
    """Whether any of its matrices is."""
    return any(isinstance(module, QuantisedMatrix) for module in model.modules())
