"""Weight-only quantisation: matrices as whole numbers of 8, 6 or 4 bits with a scale per group.

    weight[row, column]  ≈  level[row, column] × scale[row, column // group]

Levels run from −127 to 127, from −32 to 31, or from −8 to 7; a scale is a bfloat16 number.
With offsets, each group has one besides its scale, and both are codes of 8 bits, times a bfloat16
number of the row: scale = code × row's, offset = (code − 128) × row's other one.
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
from pellucid.models.levels import (
    OFFSET,
    Products,
    best_scales,
    best_steps,
    compensated_levels,
    near_enough,
    to_levels,
)

TILE = 16
GROUP = 64  # with a scale only
GROUP_WITH_OFFSET = 32
PARTS = ("packed", "scales", "row_scales")  # buffers of a matrix, the last with offsets only
_SLICE = 16  # tiles at a time: float32 copies of them are made
Steps = tuple[Tensor, Tensor | None]  # scales and offsets of groups, float32


class QuantisedMatrix(nn.Module):
    """A matrix (rows, columns) in 8, 6 or 4 bits per weight plus 16 per group.

    packed      levels
    scales      (tiles, groups, 16) bfloat16; with offsets (tiles, groups, 2, 16) bytes, codes of
                scales and of offsets
    row_scales  with offsets: (tiles, 2, 16) bfloat16, what a step of either code is worth

    These are buffers; `weight` computes the matrix that they stand for.

    fitted  whether levels keep products with some inputs, rather than being the nearest ones
    """

    packed: Tensor
    scales: Tensor
    row_scales: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        bits: int,
        group: int = GROUP,
        offsets: bool = False,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of the matrix that `weight` gives. ValueError for other bits or groups."""
        super().__init__()
        if bits not in OFFSET:
            raise ValueError(f"weights of {bits} bits: expected 8, 6 or 4")
        if group < 16 or group % 16 or group > 256:
            raise ValueError(f"groups of {group} weights: expected a multiple of 16, at most 256")
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        self.offsets, self.fitted = offsets, False
        self.dtype = dtype  # what `weight` gives; levels and scales know nothing of it
        tiles, groups = -(-rows // TILE), -(-columns // group)
        steps = group * bits // 32
        self.register_buffer(
            "packed", torch.zeros(tiles, groups, steps, TILE, 4, dtype=torch.uint8)
        )
        shape, kind = (tiles, groups, TILE), torch.bfloat16
        if offsets:
            self.register_buffer("row_scales", torch.zeros(tiles, 2, TILE, dtype=torch.bfloat16))
            shape, kind = (tiles, groups, 2, TILE), torch.uint8
        self.register_buffer("scales", torch.zeros(shape, dtype=kind))

    def extra_repr(self) -> str:
        """Shape and format, for the printed module."""
        offsets = ", offsets=True" if self.offsets else ""
        return f"{self.rows}, {self.columns}, bits={self.bits}, group={self.group}{offsets}"

    def steps(self, tiles: slice | Tensor = slice(None)) -> Steps:
        """Scales and offsets of some tiles, each (tiles, 16, groups)."""
        if not self.offsets:
            return self.scales[tiles].transpose(1, 2).float(), None
        codes = self.scales[tiles].permute(2, 0, 3, 1).float()  # (2, tiles, 16, groups)
        scale, offset = self.row_scales[tiles].transpose(0, 1).float()[..., None]
        return codes[0] * scale, (codes[1] - 128) * offset

    def _values(self, tiles: slice | Tensor) -> Tensor:
        """What some tiles stand for, (tiles, 16, groups, group) float32."""
        scales, offsets = self.steps(tiles)
        whole = unpacked(self.packed[tiles], self.bits).mul_(scales[..., None])
        return whole if offsets is None else whole.add_(offsets[..., None])

    @property
    def weight(self) -> Tensor:
        """The matrix (rows, columns), computed anew at each access; no gradient reaches it."""
        whole = self._values(slice(None))
        return whole.flatten(2).flatten(0, 1)[: self.rows, : self.columns].to(self.dtype)

    def rows_at(self, places: Tensor) -> Tensor:
        """places (…) -> those rows, (…, columns), without computing the others."""
        tiles, inside = places.flatten() // TILE, places.flatten() % TILE
        whole = self._values(tiles)  # (n, 16, groups, group)
        rows = whole[torch.arange(len(whole), device=places.device), inside].flatten(1)
        return rows[:, : self.columns].to(self.dtype).view(*places.shape, self.columns)

    def misfits(self, weight: Tensor) -> Tensor:
        """Whether a group has a level that is not the one nearest to weight (rows, columns).

        Returns (rows, groups) of bool. What rounding to these scales explains has none; a damaged
        level or scale shows. Where levels are `fitted`: whether a group is farther away than making
        up for errors explains.
        """
        groups, found = self.packed.shape[1], []
        for tile in range(0, len(self.packed), 64):  # a slice at a time, as in `quantise_`
            some = weight[tile * TILE : (tile + 64) * TILE].float()
            some = F.pad(some, (0, groups * self.group - self.columns, 0, -len(some) % TILE))
            some = some.view(-1, TILE, groups, self.group)
            scales, offsets = self.steps(slice(tile, tile + 64))
            levels = unpacked(self.packed[tile : tile + 64], self.bits)
            if self.fitted:
                value = self._values(slice(tile, tile + 64))
                there = torch.arange(groups * self.group).view(groups, self.group) < self.columns
                wrong = ~near_enough(torch.where(there, some, value), value, scales)
            else:
                wrong = (levels != to_levels(some, scales, self.bits, offsets)).any(-1)
            found.append(wrong.flatten(0, 1))
        return torch.cat(found)[: self.rows]

    @torch.no_grad()
    def quantise_(
        self, weight: Tensor, name: str = "the matrix", products: Products | None = None
    ) -> None:
        """Fill in levels and scales for a weight (rows, columns); ValueError for NaN, infinity.

        products: of the inputs it will be multiplied with, whose products levels then keep.
        """
        tiles, groups = self.packed.shape[:2]
        self.fitted = products is not None
        padding = groups * self.group - self.columns
        counts = torch.ones(groups, self.group)
        if products is not None:
            counts = F.pad(products.counts, (0, padding), value=1e-6).view(groups, self.group)
        at_once = _SLICE if products is None else 16 * _SLICE  # a column at a time is slow
        for tile in range(0, tiles, at_once):
            here = slice(tile, tile + at_once)
            some = weight[tile * TILE : (tile + at_once) * TILE].float()
            check_finite(name, some)
            some = F.pad(some, (0, padding, 0, -len(some) % TILE))
            some = some.view(-1, TILE, groups, self.group)
            self._fill_steps(here, some, counts)
            steps = self.steps(here)
            if products is None:
                levels = to_levels(some, steps[0], self.bits, steps[1])
            else:
                levels = self._compensated(some, steps, products)
            self.packed[here] = packed(levels, self.bits)

    def _compensated(self, some: Tensor, steps: Steps, products: Products) -> Tensor:
        """Levels of tiles (tiles, 16, groups, group), whose padding is zeros."""

        def flat(each: Tensor) -> Tensor:  # (rows, columns)
            return each.expand_as(some).flatten(2).flatten(0, 1)[:, : self.columns]

        scales, offsets = (None if each is None else each[..., None] for each in steps)
        assert scales is not None, "there are scales"
        shifts = None if offsets is None else flat(offsets)
        levels = compensated_levels(flat(some), flat(scales), shifts, self.bits, products)
        padding = some[0, 0].numel() - self.columns
        return F.pad(levels, (0, padding)).view_as(some)

    def _fill_steps(self, here: slice, some: Tensor, counts: Tensor) -> None:
        """Choose scales, and offsets, of tiles with the weights (tiles, 16, groups, group)."""
        if not self.offsets:
            self.scales[here] = best_scales(some, self.bits).transpose(1, 2)
            return
        steps = torch.stack(best_steps(some, self.bits, counts), 1)  # (tiles, 2, 16, groups)
        most = torch.tensor([255, 127])[:, None]
        self.row_scales[here] = (steps.abs().amax(-1) / most).to(torch.bfloat16)
        worth = self.row_scales[here].float()[..., None]
        codes = torch.where(worth == 0, 0, steps / torch.where(worth == 0, 1, worth)).round()
        codes[:, 0].clamp_(0, 255)
        codes[:, 1].clamp_(-128, 127).add_(128)
        self.scales[here] = codes.permute(0, 3, 1, 2).to(torch.uint8)


class QuantisedLinear(QuantisedMatrix):
    """``nn.Linear`` with a quantised weight (outputs, inputs) and a bias as it was."""

    def __init__(
        self, linear: nn.Linear, *, bits: int, group: int = GROUP, offsets: bool = False
    ) -> None:
        rows, columns = linear.weight.shape
        how = {"bits": bits, "group": group, "offsets": offsets}
        super().__init__(rows, columns, **how, dtype=linear.weight.dtype)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (…, columns) -> (…, rows)."""
        return F.linear(x, self.weight, self.bias)


class QuantisedEmbedding(QuantisedMatrix):
    """``nn.Embedding`` with a quantised table; `weight` also serves a tied head."""

    def __init__(
        self, embedding: nn.Embedding, *, bits: int, group: int = GROUP, offsets: bool = False
    ) -> None:
        rows, columns = embedding.weight.shape
        how = {"bits": bits, "group": group, "offsets": offsets}
        super().__init__(rows, columns, **how, dtype=embedding.weight.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (…) -> (…, columns)."""
        return self.rows_at(tokens)


def packed(levels: Tensor, bits: int) -> Tensor:
    """levels (tiles, 16, groups, group) -> bytes (tiles, groups, group · bits / 32, 16, 4)."""
    stored = (levels + OFFSET[bits]).to(torch.uint8).unflatten(-1, (-1, 4))
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
    return stored.permute(0, 3, 1, 2, 4).flatten(-2).float() - OFFSET[bits]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a model is quantised.

    bits       of the matrices in the blocks: 8, 6 or 4
    group      neighbours in a row that share a scale; 0: 64, or with offsets 32
    head_bits  of embedding and head, where errors show most; 0: 8, or 6 where `bits` is 4
    offsets    whether matrices of 4 bits have an offset in each group, too; None: where `bits` is
               4 and no `group` is given
    fitted     whether levels keep products with the inputs that a text brought
    """

    bits: int = 8
    group: int = 0
    head_bits: int = 0
    offsets: bool | None = None
    fitted: bool = False

    def __post_init__(self) -> None:
        if not self.head_bits:
            object.__setattr__(self, "head_bits", 6 if self.bits == 4 else 8)
        for bits in (self.bits, self.head_bits):
            if bits not in tuple(OFFSET):
                raise ValueError(f"weights of {str(bits)[:60]} bits: expected 8, 6 or 4")
        if self.offsets is None:
            object.__setattr__(self, "offsets", self.bits == 4 and not self.group)
        if self.offsets not in (True, False) or (self.offsets and self.bits != 4):
            raise ValueError(
                f"offsets {str(self.offsets)[:60]} with {self.bits} bits: groups have offsets with "
                "4 bits only"
            )
        if self.fitted not in (True, False):
            raise ValueError(f"fitted is {str(self.fitted)[:60]}: expected true or false")
        if not self.group:
            object.__setattr__(self, "group", GROUP_WITH_OFFSET if self.offsets else GROUP)
        if self.group not in (32, 64, 128):
            raise ValueError(f"groups of {str(self.group)[:60]} weights: expected 32, 64 or 128")

    def __str__(self) -> str:
        head = "" if self.head_bits == self.bits else f", head int{self.head_bits}"
        offsets = " with offsets" if self.offsets else ""
        return f"int{self.bits} in groups of {self.group}{offsets}{head}"

    def made(self, path: str, module: nn.Module) -> QuantisedLinear | QuantisedEmbedding | None:
        """What takes a module's place, without values; None where it stays as it is."""
        bits = self.bits if path.startswith("layers.") else self.head_bits
        how = {"bits": bits, "group": self.group, "offsets": bool(self.offsets) and bits == 4}
        if isinstance(module, nn.Linear):
            made = QuantisedLinear(module, **how)
            made.fitted = self.fitted and path.startswith("layers.")
            return made
        if isinstance(module, nn.Embedding) and path == "embed":
            return QuantisedEmbedding(module, **how)
        return None


def quantise(model: Model, how: Format, *, rest: bool = False) -> Model:
    """The same model with quantised matrices in place of its own; the others are let go.

    Norms, biases and position embeddings stay. rest: some may be quantised already. Otherwise
    ValueError for a model that is.
    """
    for module in _replaced(model, how, fill=True):
        if isinstance(module, QuantisedMatrix) and not rest:
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
        if isinstance(module, QuantisedMatrix):
            yield module
            continue
        made = how.made(path, module)
        if made is None:
            continue
        yield module
        parent, _, leaf = path.rpartition(".")
        if fill:
            weight = module.weight
            assert isinstance(weight, Tensor), "a linear layer or an embedding"
            made.quantise_(weight.detach(), f"{path}.weight")
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
            f"{name.removesuffix('weight')}{part}" for name in self._quantised for part in PARTS
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
