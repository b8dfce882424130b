"""Models larger than memory: each block's weights are read from the disk while the one before runs.

                    time ->
    reads ahead     block 1   block 2   block 3   …   head, part 1   head, part 2   block 0
    computes        block 0   block 1   block 2   …   block L-1      head, part 1   head, part 2

In memory are two blocks, or two parts of the head, and what is small: norms, biases and GPT-2's
position embedding. Of the embedding only the rows that are looked up are read, and the head is
multiplied part by part. One pass reads the file once, and takes as long as that or as the
arithmetic, whichever is longer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.checkpoints.formats.quantised import QuantisedWeights
from pellucid.checkpoints.load import Checkpoint, placed
from pellucid.checkpoints.weights import Weights
from pellucid.models import Model, empty_model

PART_BYTES = 1 << 28  # of the head, at most, in one part
_TILE = 256  # rows
Span = tuple[str, slice | None]  # a parameter, or some rows of it


class ReadAhead:
    """Takes turns through pieces of a checkpoint: the next is read while one is used.

    pieces  what is needed together, in the order in which it is needed
    circle  after the last piece comes the first again
    busy    held while a piece is used, so that only one is, whichever threads run the model
    """

    def __init__(
        self, weights: Weights, pieces: Sequence[Sequence[Span]], *, circle: bool = True
    ) -> None:
        self.weights, self.pieces, self.circle = weights, pieces, circle
        self.busy = threading.RLock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pellucid-read-ahead")
        self._ahead: tuple[int, Future[None]] | None = None

    def enter(self, number: int) -> None:
        """Return when a piece is in memory; from now on the one after it is being read."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].result()
            if ahead[0] != number:  # another pass has begun before the last one ended
                self.leave(ahead[0])
        self._read(number)  # costs nothing where the pages are there
        following = (number + 1) % len(self.pieces)
        if following > number or (self.circle and following != number):
            self._ahead = following, self._reader.submit(self._read, following)

    def leave(self, number: int) -> None:
        """Give the memory of a piece back."""
        for name, rows in self.pieces[number]:
            self.weights.forget(name, rows)

    def _read(self, number: int) -> None:
        for name, rows in self.pieces[number]:
            self.weights.read_pages(name, rows)


def stream_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dialect: str | None = None,
    *,
    keep: int = 0,
) -> Model:
    """The model of a checkpoint, in eval mode, whose weights come from the disk as they are needed.

    dtype    None: the dtype most of the checkpoint is stored in
    device   where to compute; the weights of one block at a time are copied there
    dialect  whose rounding to reproduce; None: that of the checkpoint's layout
    keep     how many blocks, from the first on, to load as `load_model` does

    Its results are those of `load_model`, bit for bit (in float64, up to the rounding of the head's
    product). It generates and can be traced and edited; it cannot be trained or copied. Its
    ``state_dict`` has no values for what is streamed: they are in ``checkpoint.weights``.
    ValueError where `keep` is not a number of blocks, and for quantised weights.
    """
    config, weights = checkpoint.config, checkpoint.weights.reopened()
    if isinstance(weights, QuantisedWeights):
        raise ValueError(
            f"{checkpoint.source}: quantised weights are not streamed: stream the model they were "
            "made from, or load these"
        )
    if not 0 <= keep <= config.n_layers:
        raise ValueError(f"keep {keep}: expected 0 to {config.n_layers}, the number of blocks")
    dtype, device = dtype or checkpoint.dtype, torch.device(device)
    weights.check_redundant()
    model = empty_model(config, dialect or checkpoint.dialect)
    head = "embed.weight" if config.tied else "unembed.weight"
    parts = list(_parts(weights, head))
    blocks = {number: _matrices(model, number) for number in range(keep, config.n_layers)}
    pieces = [[(name, None) for name in names] for names in blocks.values()]
    ahead = ReadAhead(weights, [*pieces, *([(head, rows)] for rows in parts)])
    streamed = {"embed.weight", head}.union(*blocks.values())
    loaded = {name: placed(weights[name], dtype, device) for name in weights.keys() - streamed}
    model.load_state_dict(loaded, strict=False, assign=True)
    ends = {
        "embed": StreamedEmbedding(weights, dtype, device),
        "unembed": StreamedHead(ahead, head, parts, dtype, device),
    }
    for name, end in ends.items():
        setattr(model, name, end)  # under the names that the model calls them by
    lender = _Lender(ahead, dtype, device)
    for piece, number in enumerate(blocks):
        lender.serve(model.layers[number], f"layers.{number}.", piece)
    return model.requires_grad_(False).eval()


def is_streamed(model: nn.Module) -> bool:
    """Whether `stream_model` made this model: it has no values for some of its weights."""
    return any(isinstance(module, StreamedHead) for module in model.children())


def _matrices(model: Model, number: int) -> list[str]:
    """The parameters of a block that are worth streaming: its norms and biases are small."""
    inside = model.layers[number].named_parameters()
    return [f"layers.{number}.{leaf}" for leaf, parameter in inside if parameter.ndim > 1]


def _parts(weights: Weights, head: str) -> Iterator[slice]:
    """Rows of the head, cut into parts of `PART_BYTES` or, where that is more, 256 rows.

    Matrix products work in tiles of rows: cut between tiles, they add up in the same order.
    """
    rows, width = weights.shape(head)
    step = max(PART_BYTES // (width * weights.dtype(head).itemsize) // _TILE, 1) * _TILE
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


class _Lender:
    """Lends each block its matrices while it runs.

    A matrix that is neither converted nor joined is the mapped file itself. The others are written
    into the same memory for every block: fresh memory would cost as much time as the conversion.
    """

    def __init__(self, ahead: ReadAhead, dtype: torch.dtype, device: torch.device) -> None:
        self.ahead, self.dtype, self.device = ahead, dtype, device
        # name inside the block -> what was lent last; where it is the file, it is never written to
        self.joined: dict[str, Tensor] = {}
        self.converted: dict[str, Tensor] = {}

    def serve(self, block: nn.Module, prefix: str, piece: int) -> None:
        """Lend to `block`, whose parameters' names begin with `prefix`, a piece of `ahead`."""
        leaves = [name.removeprefix(prefix) for name, _ in self.ahead.pieces[piece]]
        owners = {leaf: block.get_submodule(leaf.removesuffix(".weight")) for leaf in leaves}
        nothing = {leaf: owner._parameters["weight"] for leaf, owner in owners.items()}

        def lend(_block: nn.Module, _inputs: Any) -> None:
            self.ahead.busy.acquire()
            self.ahead.enter(piece)
            for leaf, owner in owners.items():
                matrix = self._placed(leaf, prefix + leaf)
                owner._parameters["weight"] = nn.Parameter(matrix, requires_grad=False)

        def take_back(_block: nn.Module, _inputs: Any, _output: Any) -> None:
            for leaf, owner in owners.items():
                owner._parameters["weight"] = nothing[leaf]
            self.ahead.leave(piece)
            self.ahead.busy.release()

        block.register_forward_pre_hook(lend)
        block.register_forward_hook(take_back, always_call=True)

    def _placed(self, leaf: str, name: str) -> Tensor:
        weights = self.ahead.weights
        if (weights.dtype(name), self.device.type) == (self.dtype, "cpu"):
            room = self.joined.get(leaf)
            self.joined[leaf] = weights[name] if room is None else weights.read_into(name, room)
            return self.joined[leaf]
        room = self.converted.get(leaf)
        if room is None:
            room = self.converted[leaf] = weights[name].to(self.device, self.dtype)
        else:
            room.copy_(weights[name])
        return room


class StreamedEmbedding(nn.Module):
    """The embedding table, of which only the rows that are looked up are read."""

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weights, self.dtype, self.device = weights, dtype, device

    @property
    def weight(self) -> Tensor:
        """The whole table (V, C), read now."""
        return self.weights["embed.weight"].to(self.device, self.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, C)."""
        return self.weights.look_up("embed.weight", tokens.cpu()).to(self.device, self.dtype)


class StreamedHead(nn.Module):
    """The last product, one part of the vocabulary at a time."""

    def __init__(
        self,
        ahead: ReadAhead,
        name: str,
        parts: Sequence[slice],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.ahead, self.name, self.parts = ahead, name, parts
        self.dtype, self.device = dtype, device

    @property
    def weight(self) -> Tensor:
        """The whole head (V, C), read now."""
        return self.ahead.weights[self.name].to(self.device, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V)."""
        logits = x.new_empty(*x.shape[:-1], self.parts[-1].stop)
        first = len(self.ahead.pieces) - len(self.parts)
        for piece, rows in enumerate(self.parts, start=first):
            with self.ahead.busy:
                self.ahead.enter(piece)
                matrix = self.ahead.weights.rows(self.name, rows).to(self.device, self.dtype)
                logits[..., rows] = F.linear(x, matrix)
                self.ahead.leave(piece)
        return logits


class WeightsInOrder(Mapping[str, Tensor]):
    """A checkpoint's weights read layer by layer, as the walk does.

    Reading the first weight of a layer waits until the whole layer is in memory; meanwhile
    the next is being read, and the one before is given back. `dtype` and `shape` read nothing.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.dtype, self.shape = weights, weights.dtype, weights.shape
        layers: dict[str, list[Span]] = {}
        for name in weights:
            if name.startswith("layers."):
                layers.setdefault(name.split(".")[1], []).append((name, None))
        head = "unembed.weight" if "unembed.weight" in weights else "embed.weight"
        self._ahead = ReadAhead(weights, [*layers.values(), [(head, None)]], circle=False)
        self._pieces = {
            name: number for number, piece in enumerate(self._ahead.pieces) for name, _ in piece
        }
        self._entered: int | None = None

    def __getitem__(self, name: str) -> Tensor:
        piece = self._pieces.get(name)
        looks_up = name == "embed.weight" and self._entered is None  # of a tied head: a few rows
        if piece is not None and piece != self._entered and not looks_up:
            if self._entered is not None:
                self._ahead.leave(self._entered)
            self._ahead.enter(piece)
            self._entered = piece
        return self.weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
