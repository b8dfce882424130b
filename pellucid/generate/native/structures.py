"""The structures of ``decode.c``, filled in from a model: its tensors and its features."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.models import Model
from pellucid.models.parts import HeadNorms, LayerNorm, Norm, growth
from pellucid.models.quantised import QuantisedMatrix
from pellucid.models.rope import RotaryEmbedding

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_QUANTISED_KINDS = {8: 3, 6: 4, 4: 5}
_RMS, _RMS_WIDE, _LAYER = range(3)
_SILU, _GELU_TANH, _GELU_COMPOSED, _GELU_ERF, _RELU_SQUARED = range(5)


class MatrixC(Structure):
    """``Matrix``: a linear layer or an embedding, as it is stored."""

    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("row_scales", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("kind", c_int32),
        ("group", c_int32),
        ("exact", c_int32),
    )


class NormC(Structure):
    """``Norm``."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("kind", c_int32))


class RopeC(Structure):
    """``Rope``: the turns of every position, and those of long texts where they differ."""

    _fields_ = (
        *((name, c_void_p) for name in ("cos", "sin", "long_cos", "long_sin")),
        ("original", c_int64),
        ("width", c_int32),
    )


_NORMS = ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm")


class LayerC(Structure):
    """``Layer``."""

    _fields_ = (
        *((name, MatrixC) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, POINTER(NormC)) for name in (*_NORMS, "q_norm", "k_norm")),
        ("rope", POINTER(RopeC)),
        ("sinks", c_void_p),
        ("window", c_int64),
    )


_SIZES = ("n_layers", "width", "n_heads", "n_kv_heads", "head_dim", "hidden_width", "vocab_size")
_FLAGS = ("dtype", "activation", "rope_in_x")
_FLAGS += ("qk_norm_whole", "qk_norm_last", "qk_norm_each", "parallel")
_SCALARS = ("norm_eps", "qkv_clip", "score_scale", "score_cap")
_SCALES = ("embed_scale", "residual_scale", "logit_scale", "logit_cap")


class ModelC(Structure):
    """``Model``."""

    _fields_ = (
        *((name, c_int32) for name in (*_SIZES, *_FLAGS)),
        *((name, c_float) for name in (*_SCALARS, *_SCALES)),
        ("embed", MatrixC),
        ("unembed", MatrixC),
        ("pos_embed", c_void_p),
        ("query_growth", c_void_p),
        ("embed_norm", POINTER(NormC)),
        ("norm", POINTER(NormC)),
        ("layers", POINTER(LayerC)),
    )


class Described:
    """A model as the C side reads it, for texts of `length` tokens.

    given   what `decode.c` is handed
    layers  its layers
    held    matrix -> its numbers as the C side sees them
    """

    def __init__(self, model: Model, length: int) -> None:
        self._model, self._kept = model, []  # whatever the C side points to
        self.held: dict[nn.Module, Tensor] = {}
        self._positions = torch.arange(length)
        self._ropes = {name: self._rope(getattr(model, name)) for name in model.ropes}
        self.layers = (LayerC * model.config.n_layers)(
            *(self._layer(*pair) for pair in zip(model.layers, model.kinds, strict=True))
        )
        self.given = self._whole()

    @property
    def head(self) -> nn.Module:
        """The matrix that logits come from; a tied model's is the embedding."""
        return self._model.embed if self._model.unembed is None else self._model.unembed

    def places(self, module: nn.Module) -> list[MatrixC]:
        """The entries of the structures that describe a module's matrix."""
        found = [self.given.embed] if module is self._model.embed else []
        found += [self.given.unembed] if module is self.head else []
        for layer, described in zip(self._model.layers, self.layers, strict=True):
            for name, inner in _projections(layer):
                found += [getattr(described, name)] if inner is module else []
        return found

    def let_go(self) -> None:
        """Hold no tensors of the model any more; the C side must be done with them."""
        self._kept.clear()
        self.held.clear()

    def _whole(self) -> ModelC:
        model, config, dtype = self._model, self._model.config, self._model.dtype
        divided = 1 / torch.tensor(float(config.head_dim)).sqrt()  # in float32
        return ModelC(
            **{name: getattr(config, name) for name in _SIZES},
            **{name: getattr(config, name) for name in _SCALES},
            dtype=KINDS[dtype],
            activation=_activation(model),
            rope_in_x=model.dialect.rope == "x" and dtype != torch.float32,
            qk_norm_whole=config.qk_norm == "whole",
            qk_norm_last=config.qk_norm_last,
            qk_norm_each=config.qk_norm == "each",
            parallel=config.parallel,
            norm_eps=config.norm_eps,
            qkv_clip=_rounded(config.qkv_clip, dtype),
            score_scale=config.score_scale or divided.item(),
            score_cap=config.score_cap,
            embed=self._matrix(model.embed),
            unembed=self._matrix(self.head),
            pos_embed=self._floats(model.pos_embed.weight) if config.rope is None else None,
            query_growth=self._floats(self._growth()),
            embed_norm=self._norm(model.embed_norm if config.embed_norm else None),
            norm=self._norm(model.norm),
            layers=self.layers,
        )

    def _layer(self, layer: Any, kind: Any) -> LayerC:
        return LayerC(
            **{name: self._matrix(module) for name, module in _projections(layer)},
            **{name: self._norm(getattr(layer, name)) for name in _NORMS},
            q_norm=self._head_norm(layer.attn.q_norm),
            k_norm=self._head_norm(layer.attn.k_norm),
            rope=self._ropes.get(kind.rope),
            sinks=self._floats(layer.attn.sinks),
            window=self._model.config.window if kind.window else 0,
        )

    def _rope(self, module: RotaryEmbedding) -> Any:
        """Tables (length, width / 2); where they follow the length, short and long texts'."""
        positions, dtype, original = self._positions, self._model.dtype, len(self._positions)
        if module.rope.follows_length:
            original = min(original, module.rope.original_context or 1)
        short = module(positions[:original], dtype)
        long = module(positions, dtype) if original < len(positions) else (None, None)
        pointers = [self._floats(table) for table in (*short, *long)]
        return self._pointer(RopeC(*pointers, original=original, width=2 * short[0].shape[-1]))

    def _growth(self) -> Tensor | None:
        config, dtype = self._model.config, self._model.dtype
        return growth(config, self._positions, dtype) if config.query_growth else None

    def _head_norm(self, module: Norm | HeadNorms | None) -> Any:
        """The norm of queries or keys, or the array of those of each head."""
        if not isinstance(module, HeadNorms):
            return self._norm(module)
        weight = 1.0 + module.weight if module.offset else module.weight
        norms = [
            NormC(weight=self._floats(each), bias=self._floats(torch.zeros(len(each))), kind=_LAYER)
            for each in weight.unflatten(0, (-1, self._model.config.head_dim))
        ]
        self._kept.append(array := (NormC * len(norms))(*norms))
        return ctypes.cast(array, POINTER(NormC))

    def _norm(self, module: Norm | None) -> Any:
        """The norm with the weight it multiplies by: 1 + its own, or ones where it has none."""
        if module is None:
            return None
        layer, dtype = isinstance(module, LayerNorm), self._model.dtype
        width, weight = self._norm_width(module), module.weight
        if weight is None:
            weight = torch.ones(width)
        elif module.offset:  # a LayerNorm adds in the model's dtype, an RMSNorm in float32
            weight = 1.0 + (weight if layer else weight.float())
        bias = module.bias if isinstance(module, LayerNorm) else None
        wide = self._model.dialect.norm_product == "float32"
        return self._pointer(
            NormC(
                weight=self._floats(weight),
                bias=self._floats(torch.zeros(width, dtype=dtype) if bias is None else bias),
                kind=_LAYER if layer else _RMS_WIDE if wide else _RMS,
            )
        )

    def _norm_width(self, module: Norm) -> int:
        """Of the stream at most; a head's norm reads the first of as many ones and zeros."""
        config = self._model.config
        heads = config.n_heads * config.head_dim
        return max(config.width, heads) if module.weight is None else len(module.weight)

    def _matrix(self, module: nn.Module) -> MatrixC:
        described, self.held[module] = described_matrix(module)
        described.bias = self._floats(getattr(module, "bias", None))
        if isinstance(module, QuantisedMatrix):
            self._kept += [module.scales, *([module.row_scales] if module.offsets else [])]
        return described

    def _floats(self, tensor: Tensor | None) -> int | None:
        """Pointer to float32 numbers: the tensor's own, or a copy's."""
        if tensor is None:
            return None
        wide = tensor.detach().float().contiguous()
        self._kept.append(wide)
        return wide.data_ptr()

    def _pointer(self, structure: Structure) -> Any:
        self._kept.append(structure)
        return ctypes.pointer(structure)


def _activation(model: Model) -> int:
    form = model.config.activation
    if form == "gelu_new" and model.dialect.gelu == "composed":
        return _GELU_COMPOSED
    return {
        "silu": _SILU,
        "gelu_tanh": _GELU_TANH,
        "gelu_new": _GELU_TANH,
        "gelu": _GELU_ERF,
        "relu2": _RELU_SQUARED,
    }[form]


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()


def _projections(layer: Any) -> Iterator[tuple[str, nn.Module]]:
    """The matrices of a block, under the C side's names."""
    for name in ("q", "k", "v", "o"):
        yield name, getattr(layer.attn, f"{name}_proj")
    for name in ("gate", "up", "down"):
        if hasattr(layer.mlp, f"{name}_proj"):
            yield name, getattr(layer.mlp, f"{name}_proj")


def described_matrix(module: nn.Module) -> tuple[MatrixC, Tensor]:
    """A linear layer or embedding for the C side, without its bias; and the tensor it points to."""
    if isinstance(module, QuantisedMatrix):
        described = MatrixC(
            weights=module.packed.data_ptr(),
            scales=module.scales.data_ptr(),
            row_scales=module.row_scales.data_ptr() if module.offsets else None,
            rows=module.rows,
            columns=module.columns,
            kind=_QUANTISED_KINDS[module.bits],
            group=module.group,
            exact=module.dtype == torch.float32,
        )
        return described, module.packed.data
    weight = module.weight
    assert isinstance(weight, nn.Parameter), "a matrix has a weight"
    if not weight.is_contiguous():  # GPT-2's files hold matrices column by column
        weight.data = weight.data.contiguous()  # once: the model keeps this layout
    rows, columns = weight.shape
    kind = KINDS[weight.dtype]
    return MatrixC(weights=weight.data_ptr(), rows=rows, columns=columns, kind=kind), weight.data
