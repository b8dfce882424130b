"""The C decoder on a model: whether it can run it, its steps, and moving its matrices."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator, Sequence
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.generate.native.build import library
from pellucid.generate.native.pages import PART, moving, unwritten_files, worth_moving
from pellucid.generate.native.recording import Recording, RowRequest, StepRequest
from pellucid.generate.native.structures import KINDS, Described, described_matrix
from pellucid.generate.paged import BLOCK, PagedCache
from pellucid.models import Cache, Model
from pellucid.models.quantised import QuantisedLinear, QuantisedMatrix
from pellucid.system import cores

MOST = 64  # tokens of one step


def unsupported(model: Model) -> str | None:
    """Why the C decoder cannot run this model as it is now; None where it can."""
    dtype, dialect = model.dtype, model.dialect
    if dtype not in KINDS:
        return f"weights in {dtype}: expected float32, bfloat16 or float16"
    if dtype != torch.float32 and (not dialect.fusible or dialect.norm == "x"):
        return f"the {dialect.name} dialect rounds in places of its own"
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has forward hooks"
        wrong = _unknown(name, module, dtype)
        if wrong:
            return wrong
    return None


def _unknown(name: str, module: nn.Module, dtype: torch.dtype) -> str | None:
    if name.endswith("_proj") and type(module) not in (nn.Linear, QuantisedLinear):
        return f"{name} is a {type(module).__name__}"
    for what, tensor in (
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ):
        if tensor.is_meta:
            return f"{name}.{what} holds no values"
        if not isinstance(module, QuantisedMatrix) and tensor.dtype != dtype:
            return f"{name}.{what} is {tensor.dtype}, others are {dtype}"
    return None


class NativeDecoder:
    """Decoding steps of one model; holds its tensors, reads them in place, and has threads.

    unsettled  bytes of matrices that `settle` has still to move onto large pages

    Changes of the weights in place are seen, but for biases, norms and position embeddings of a
    model that is not in float32: those were copied.
    """

    def __init__(
        self, made: ctypes.CDLL, model: Model, *, length: int, threads: int | None = None
    ) -> None:
        """`length`: the longest text, in tokens; `unsupported(model)` must be None."""
        assert unsupported(model) is None, "asked for a model that the C decoder cannot run"
        self.model = model
        self._made = made
        self._described = Described(model, length)
        self._moves: Iterator[int] | None = None
        self.unsettled = sum(
            tensor.nbytes for tensor in self._described.held.values() if worth_moving(tensor)
        )
        self._process = os.getpid()
        handle = made.pellucid_open(
            ctypes.byref(self._described.given), threads or min(torch.get_num_threads(), cores())
        )
        self._handle = c_void_p(handle)
        self._close = weakref.finalize(self, _close, made, handle, self._process, self._described)

    def close(self) -> None:
        """End the threads; done at the end of its life otherwise."""
        self._close()

    @torch.no_grad()
    def step(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Cache | Sequence[Cache],
        starts: Sequence[int] | None = None,
        recording: Recording | None = None,
        wanted: bool = True,
        end: int = 0,
    ) -> Tensor:
        """Tokens of each row after what its cache holds -> logits (B, V) of each row's last, in
        float32. A row's are the same bits whatever other rows there are.

        cache: one of B rows, of T tokens each; or B caches of one row each, of any lengths. It
        must have room for them (`Cache.reserve`), and is so many tokens longer afterwards. Rows
        with the same cache are pieces of one text that follow one another.
        At most MOST tokens in all; a recording is of one token per row.
        starts: padding tokens before each row, (B); wanted: False leaves the logits uncomputed;
        end: tokens in the cache after the pass that this step is a part of, 0: no others follow.
        """
        assert self._close.alive and os.getpid() == self._process, "the decoder's threads are gone"
        config, lengths = self.model.config, [len(row) for row in tokens]
        rows, flat = len(tokens), [token for row in tokens for token in row]
        assert min(lengths) > 0 and len(flat) <= MOST, f"{len(flat)} tokens: expected 1 … {MOST}"
        joint = [cache] if isinstance(cache, Cache) else cache
        places, keys, values, blocks = _places(joint, lengths, starts or [0] * rows, end)
        logits = torch.empty(rows, config.vocab_size)
        ids = (c_int64 * len(flat))(*flat)
        row_of = (c_int32 * len(flat))(*(r for r, n in enumerate(lengths) for _ in range(n)))
        step = StepRequest(
            batch=len(flat),
            rows=rows,
            tokens=ctypes.addressof(ids),
            row_of=ctypes.addressof(row_of),
            row=ctypes.addressof(places),
            keys=ctypes.addressof(keys),
            values=ctypes.addressof(values),
            logits=logits.data_ptr() if wanted else None,
        )
        if recording is not None:
            assert len(flat) == rows, "a recording is of one token per row"
            recording.prepare(step, config, rows)
        self._made.pellucid_step(self._handle, ctypes.byref(step))
        del blocks  # were pointed to until here
        for one, length in zip(joint, lengths, strict=False):  # rows of one cache are equally long
            for layer in one.layers:
                layer.length += length
        return logits

    def settle(self) -> int:
        """Move a part of the matrices onto large pages -> bytes left; 0 once all are there."""
        if self._moves is None:
            self._moves = self._all_moves()
        copied = 0
        while copied < PART:
            some = next(self._moves, None)
            if some is None:  # all there, or the system gives no more
                self.unsettled = 0
                return 0
            copied += some
        self.unsettled -= copied
        return self.unsettled

    def _all_moves(self) -> Iterator[int]:
        """Move matrix by matrix; the bytes of each part that was copied."""
        modules = [
            module for module, tensor in self._described.held.items() if worth_moving(tensor)
        ]
        unwritten = unwritten_files() if modules else []
        for module in modules:
            name = "packed" if isinstance(module, QuantisedMatrix) else "weight"
            tensor = getattr(module, name)
            places = [
                place
                for place in self._described.places(module)
                if place.weights == tensor.data_ptr()
            ]
            if not places:
                continue
            left = tensor.nbytes
            for moved in moving(tensor, unwritten):
                if moved is not None:
                    tensor.data = moved
                    self._described.held[module] = moved
                    for place in places:
                        place.weights = moved.data_ptr()
                yield min(PART, left)
                left -= PART


def multiply(made: ctypes.CDLL, module: nn.Module, x: Tensor) -> Tensor:
    """x (B, columns) float32 times a layer's matrix by the C kernels -> (B, rows); B at most 16."""
    described, kept = described_matrix(module)
    x = x.contiguous()
    out = torch.empty(len(x), described.rows)
    made.pellucid_multiply(ctypes.byref(described), x.data_ptr(), len(x), out.data_ptr())
    del kept  # was alive until here
    return out


def _places(
    caches: Sequence[Cache],
    lengths: Sequence[int],
    starts: Sequence[int],
    end: int,
) -> tuple[Any, Any, Any, Any]:
    """Each row's place in its cache; pointers (layers, rows) to its keys and its values, where they
    are not in blocks; and pointers to the blocks of each cache, where they are.
    """
    rows, each = len(lengths), len(lengths) // len(caches)
    places, first = (RowRequest * rows)(), 0
    layers = len(caches[0].layers)
    keys, values = (c_void_p * (layers * rows))(), (c_void_p * (layers * rows))()
    blocks = {id(cache): _block_pointers(cache) for cache in caches}
    lengths_held = {id(cache): cache.length for cache in caches}
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        cache = caches[row // each]
        held, capacity, own = lengths_held[id(cache)], 0, blocks[id(cache)]
        lengths_held[id(cache)] += length if each == 1 else 0
        if own is not None:
            capacity = len(own) * BLOCK
            assert capacity >= held + length, "the cache has no room"
            place = ctypes.addressof(own)
            places[row] = RowRequest(
                first, length, start, held, capacity, end or held + length, place
            )
            first += length
            continue
        for place, layer in enumerate(cache.layers):
            k, v = layer.k, layer.v
            assert k is not None and v is not None, "a decoding step follows a first pass"
            assert k.is_contiguous() and v.is_contiguous(), "the cache was not reserved"
            capacity = k.shape[2]
            assert capacity >= held + length, "the cache has no room"
            before = row % each * k.stride(0) * k.itemsize
            keys[place * rows + row] = k.data_ptr() + before
            values[place * rows + row] = v.data_ptr() + before
        places[row] = RowRequest(first, length, start, held, capacity, end or held + length)
        first += length
    return places, keys, values, blocks


def _block_pointers(cache: Cache) -> Any:
    if not isinstance(cache, PagedCache):
        return None
    return (c_void_p * len(cache.blocks))(*(block.data_ptr() for block in cache.blocks))


def settle(model: Model) -> None:
    """Move all large matrices of a model onto large pages now, before its first step.

    Worth it before a long text: it takes 0.2 to 2 seconds per gigabyte, and every step is faster
    from the first one on. Without it a generation moves them a part at a time, later. Nothing
    happens where the C decoder cannot run the model, or the system has no large pages. Raises
    NotBuilt where the decoder is not there.
    """
    if unsupported(model) is None:
        decoder = NativeDecoder(library(), model, length=1, threads=1)
        while decoder.settle():
            pass
        decoder.close()


def _close(made: ctypes.CDLL, handle: int, process: int, described: Described) -> None:
    if os.getpid() == process:  # a forked child has none of the threads
        made.pellucid_close(c_void_p(handle))
    described.let_go()
