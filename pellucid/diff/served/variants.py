"""The same weights in another model: RoPE, window, constants, quantised weights, a quantised cache.

Each variant is computed whole: its ln p of the same tokens is held against what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pellucid.diff.causes.rope import rope_variants
from pellucid.diff.selftest.quantisers import FORMATS
from pellucid.diff.served.scores import Hidden, Through, build, hidden_by, hidden_in_steps
from pellucid.edits import Edit
from pellucid.models import Config, Layer, Model, RopeConfig
from pellucid.models.quantised import Format, quantise

_CONTEXTS = (4096, 8192)
_FACTORS = (2.0, 4.0, 8.0, 32.0)
_FORMULAE = {name: through for name, through in FORMATS.items()
             if name not in ("bfloat16", "float16") and not name.startswith("GPTQ")}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model to compute ln p with, and how its stream is made, where that is not its forward."""

    cause: str
    evidence: str
    model: Callable[[], Model]
    hidden: Callable[[Model], Hidden] | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
    """A's model as data: its config, its weights in float32, whose rounding."""

    config: Config
    weights: Mapping[str, Tensor]
    dialect: str

    def built(self, config: Config | None = None, **options: Any) -> Model:
        """A's weights in a model of this config."""
        return build(config or self.config, self.weights, self.dialect, **options)


def computed_in(base: Base) -> Iterator[Variant]:
    """16 bits: no fault, but what explains a gap best."""
    for dtype in (torch.bfloat16, torch.float16):
        said = str(dtype).removeprefix("torch.")
        for dialect in dict.fromkeys((base.dialect, "hf", "meta")):

            def made(dtype: torch.dtype = dtype, dialect: str = dialect) -> Model:
                return build(base.config, base.weights, dialect, dtype)

            yield Variant(cause=f"computed in {said}", evidence=f"dialect {dialect}", model=made)


def of_config(base: Base) -> Iterator[Variant]:
    """Another RoPE, window or constant."""
    for changed, cause, evidence in (*_ropes(base.config), *_windows(base.config),
                                     *_constants(base.config)):  # fmt: skip
        yield Variant(
            cause=cause, evidence=evidence, model=lambda config=changed: base.built(config)
        )


def _ropes(config: Config) -> Iterator[tuple[Config, str, str]]:
    for name in ("rope", "second_rope"):
        rope = getattr(config, name)
        if rope is None:
            continue
        of = "" if name == "rope" else "second RoPE: "
        tried = [*rope_variants(config, rope), *_scalings(config, rope)]
        for changed, cause, evidence in tried:
            yield replace(config, **{name: changed}), cause, of + evidence


def _scalings(config: Config, rope: RopeConfig) -> Iterator[tuple[RopeConfig, str, str]]:
    """Scaling that A does not have, and another original context of the one that it has."""
    contexts = dict.fromkeys((config.context_length, *_CONTEXTS))
    if rope.type == "default":
        for factor in _FACTORS:
            yield (replace(rope, type="linear", factor=factor), "RoPE scaling added",
                   f"linear, factor {factor:g}")  # fmt: skip
            for kind in ("yarn", "llama3", "dynamic"):
                for original in contexts:
                    changed = replace(rope, type=kind, factor=factor, original_context=original)
                    said = f"{kind}, factor {factor:g}, original context {original}"
                    yield changed, "RoPE scaling added", said
    elif rope.original_context:
        for original in contexts:
            if original != rope.original_context:
                said = f"{original} instead of {rope.original_context}"
                yield replace(rope, original_context=original), "RoPE original context", said


def _windows(config: Config) -> Iterator[tuple[Config, str, str]]:
    """Without the window that A has, or with one that is one off."""
    if config.has_windows:
        plain = tuple(layer._replace(window=False) for layer in config.kinds)
        yield replace(config, layers=plain), "sliding window missing", "every token sees all"
        for width in (config.window - 1, config.window + 1):
            if width > 0:
                said = f"{width} instead of {config.window} tokens"
                yield replace(config, window=width), "sliding window", said


def windowed(base: Base, width: int) -> Variant:
    """Each token sees the last `width` only, itself included."""
    layers = tuple(Layer(window=True, rope=kind.rope) for kind in base.config.kinds)
    changed = replace(base.config, window=width, layers=layers)
    said = f"each token sees the last {width}"
    return Variant(cause="context truncated", evidence=said, model=lambda: base.built(changed))


def _constants(config: Config) -> Iterator[tuple[Config, str, str]]:
    for eps in (1e-5, 1e-6, 1e-8, 1e-12):
        if eps != config.norm_eps:
            said = f"{eps:g} instead of {config.norm_eps:g}"
            yield replace(config, norm_eps=eps), "norm eps", said
    for name, value, said in (
        ("score_cap", 0.0, "scores are not cut"),
        ("logit_cap", 0.0, "logits are not cut"),
        ("embed_scale", 1.0, "embeddings are not scaled"),
        ("logit_scale", 1.0, "logits are not scaled"),
        ("score_scale", 1.0, "scores are not scaled"),
    ):
        if getattr(config, name) != value:
            yield replace(config, **{name: value}), name.replace("_", " "), said
    gelu = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "gelu_new": "gelu"}.get(config.activation)
    if gelu:
        yield replace(config, activation=gelu), "GELU form", f"{gelu} for {config.activation}"


def of_weights(base: Base) -> Iterator[tuple[Variant, Variant | None]]:
    """RoPE's pairs in q and k; matrices through the formats in which weights are published.

    Second, where a format may have been used for embedding and head too, the same with these.
    """
    if base.config.rope is not None:
        for said, there in (("side by side", True), ("half apart", False)):

            def paired(name: str, x: Tensor, there: bool = there) -> Tensor:
                return _paired(base, name, x, there)

            evidence = f"rows of q and k as for pairs {said}"
            yield _with_weights(base, "RoPE pairing", evidence, paired), None
    for bits in (8, 6, 4):
        yield (
            Variant(
                cause="quantised weights",
                evidence=f"int{bits} as `pellucid convert` writes it",
                model=lambda bits=bits: quantise(base.built(), Format(bits=bits)),
            ),
            None,
        )
    for name, through in _FORMULAE.items():
        both = []
        for head in (False, True):
            where = "embedding and head too" if head else "in the layers"

            def quantised(name: str, x: Tensor, f: Through = through, head: bool = head) -> Tensor:
                return _through(f, head, name, x)

            both.append(_with_weights(base, "quantised weights", f"{name}, {where}", quantised))
        yield both[0], both[1]


def _with_weights(
    base: Base, cause: str, evidence: str, change: Callable[[str, Tensor], Tensor]
) -> Variant:
    def made() -> Model:
        weights = {name: change(name, x) for name, x in base.weights.items()}
        return build(base.config, weights, base.dialect)

    return Variant(cause=cause, evidence=evidence, model=made)


def _through(through: Through, head: bool, name: str, x: Tensor) -> Tensor:
    inside = name.startswith("layers.") or (head and not name.startswith("pos_embed"))
    if x.ndim != 2 or not inside or (x.shape[1] % 64 and x.shape[1] % 32):
        return x
    return through(x)


def _paired(base: Base, name: str, x: Tensor, there: bool) -> Tensor:
    """Rows of q and k, each head's (D), moved from halves to neighbours or back."""
    if not any(f"attn.{part}_proj." in name for part in "qk"):
        return x
    shape = (-1, 2, base.config.head_dim // 2) if there else (-1, base.config.head_dim // 2, 2)
    return x.unflatten(0, shape).transpose(1, 2).flatten(0, 2).contiguous()


def of_cache(base: Base) -> Iterator[Variant]:
    """Keys and values through a coarser type, as they stand in the cache."""
    for name, through in _CACHES.items():
        edit = _edits(base.config, through)

        def always(model: Model, edit: dict[str, Edit] = edit) -> Hidden:
            return hidden_by(model, edit)

        def steps(model: Model, edit: dict[str, Edit] = edit, f: Through = through) -> Hidden:
            return hidden_in_steps(model, edit, f)

        for said, hidden in (("", always), (", the prompt read before", steps)):
            yield Variant(
                cause="quantised cache",
                evidence=f"keys and values in {name}{said}",
                model=base.built,
                hidden=hidden,
            )


def _edits(config: Config, through: Through) -> dict[str, Edit]:
    """Edits of what attention reads: keys as they stand in the cache, and values."""
    edits: dict[str, Edit] = {}
    for layer, kind in enumerate(config.kinds):
        last = "attn.k_normed" if config.qk_norm and config.qk_norm_last else "attn.k_rotated"
        if not kind.rope and last == "attn.k_rotated":
            last = "attn.k_normed" if config.qk_norm else "attn.k"
        edits |= {f"layers.{layer}.{last}": through, f"layers.{layer}.attn.v": through}
    return edits


def _float8(dtype: torch.dtype) -> Through:
    most = torch.finfo(dtype).max
    return lambda x: x.clamp(-most, most).to(dtype).to(x.dtype)


def _whole_numbers(bits: int, group: int) -> Through:
    """Signed levels under one scale for `group` neighbours of a head's components, 0: for all."""

    def through(x: Tensor) -> Tensor:
        size = group if group and x.shape[-1] % group == 0 else x.shape[-1]
        parts = x.unflatten(-1, (-1, size))
        step = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
        return ((parts / step).round() * step).flatten(-2)

    return through


def _ggml(name: str) -> Through:
    def through(x: Tensor) -> Tensor:
        return FORMATS[name](x.reshape(-1, x.shape[-1]).float()).view(x.shape)

    return lambda x: through(x) if x.shape[-1] % 32 == 0 else x


_CACHES: dict[str, Through] = {
    "float8 e4m3": _float8(torch.float8_e4m3fn),
    "float8 e5m2": _float8(torch.float8_e5m2),
    "int8, a scale for each head": _whole_numbers(8, 0),
    "Q8_0": _ggml("Q8_0"),
    "Q4_0": _ggml("Q4_0"),
    "int4, a scale for each head": _whole_numbers(4, 0),
}
