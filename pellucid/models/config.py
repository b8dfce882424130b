"""What a decoder is made of, as data: sizes, and the choices in which families differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pellucid.models.rope_scaling import RopeConfig

Activation = Literal["silu", "gelu_new", "gelu_tanh", "gelu", "relu2"]


class Layer(NamedTuple):
    """In what a layer may differ from its neighbours.

    window  it sees the last `ModelConfig.window` tokens, not all
    rope    which RoPE turns its queries and keys: "rope", "second_rope", or "" for none (NoPE)
    """

    window: bool = False
    rope: Literal["rope", "second_rope", ""] = "rope"


_MOST_ELEMENTS = 2**60  # of 8 bytes each, which PyTorch counts in 64 bits


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder; the defaults are Llama 3 8B's.

    family        the ``model_type`` it came from: a label, no code depends on it
    rounding      whose casts the dialects follow in 16 bits (`numerics`)
    norm          rms: Zhang & Sennrich, 2019; layer: LayerNorm, Ba et al., 2016
    norm_weight, norm_bias, norm_offset
                  whether norms have a weight and a bias; they multiply by 1 + weight (Gemma)
    norm_places   where a block normalises: before attention and MLP (Llama), after (OLMo 2), both
    qk_norm       queries and keys are normalised: each head (Qwen 3), each head with a weight of
                  its own and no bias (Command R+), all heads together (OLMo 2)
    qk_norm_last  after RoPE instead of before (Hunyuan)
    biases        which products have one: of "qkv", "o", "mlp", "head"
    qkv_clip      queries, keys and values are cut to ± this (OLMo); 0: not
    rope          None: learned positions instead (GPT-2)
    second_rope   of the layers whose `Layer.rope` says so (Gemma 3's window layers)
    window        tokens that a layer with a window sees, the token itself included
    layers        the kinds of layers in turn, repeated to `n_layers`; (): all alike
    query_growth  queries are multiplied by 1 + this · ln(1 + ⌊position / original context⌋)
                  (Ministral 3); 0: not
    score_scale   factor on q · k; 0: 1/√D
    score_cap, logit_cap
                  c · tanh(x / c) on scores and logits (Gemma 2); 0: none
    sinks         each head may look at nothing: one more logit in its softmax (gpt-oss)
    parallel      attention and MLP read the same normed stream (Cohere, Phi)
    gated         act(gate) × up (SwiGLU, GeGLU); else act(up)
    activation    gelu: by erf; gelu_tanh, gelu_new: by tanh, in one kernel or, where the dialect
                  composes it, an operation at a time, as GPT-2 first did (transformers' words)
    embed_scale, residual_scale, logit_scale
                  factors on embeddings (Gemma: √C), on what is added to the stream, on logits
    embed_norm    the embedding is normalised (nanochat)
    """

    family: str = "llama"
    rounding: str = "llama"
    vocab_size: int = 128256
    context_length: int = 8192
    width: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    hidden_width: int = 14336
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_weight: bool = True
    norm_bias: bool = False
    norm_offset: bool = False
    norm_places: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["", "head", "each", "whole"] = ""
    qk_norm_last: bool = False
    biases: tuple[str, ...] = ()
    qkv_clip: float = 0.0
    rope: RopeConfig | None = field(default_factory=lambda: RopeConfig(theta=500000.0))
    second_rope: RopeConfig | None = None
    window: int = 0
    layers: tuple[Layer, ...] = ()
    query_growth: float = 0.0
    score_scale: float = 0.0
    score_cap: float = 0.0
    logit_cap: float = 0.0
    sinks: bool = False
    parallel: bool = False
    gated: bool = True
    activation: Activation = "silu"
    embed_scale: float = 1.0
    embed_norm: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tied: bool = False
    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    resid_dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context_length", "width", "n_layers", "n_heads", "n_kv_heads")
        for name in (*sizes, "head_dim", "hidden_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        places = self.context_length if self.rope is None else 1  # learned, a row each
        rows = max(self.vocab_size, self.n_heads * self.head_dim, self.hidden_width, places)
        if rows * self.width >= _MOST_ELEMENTS:
            raise ValueError(
                f"a matrix of {rows} rows and width {self.width}: no tensor can be this large"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly"
            )
        for name in ("embed_dropout", "attn_dropout", "resid_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a share, 0 to 1")
        if self.qk_norm == "each" and self.norm != "layer":
            raise ValueError(
                f"qk_norm is 'each' and norm is {self.norm!r}: heads with a weight of their own "
                "are normalised by LayerNorm"
            )
        self._check_layers()

    def _check_layers(self) -> None:
        for name in ("rope", "second_rope"):
            rope = getattr(self, name)
            turned = self.rotary_width(rope) if rope else 0
            if rope and len(rope.short_factor) not in (0, turned // 2):
                raise ValueError(
                    f"{name} has {len(rope.short_factor)} factors and turns {turned // 2} pairs"
                )
            if turned % 2:
                some = "" if turned == self.head_dim else f", of which {name} turns {turned}"
                raise ValueError(
                    f"head_dim is {self.head_dim}{some}: RoPE turns pairs, it must be even"
                )
        for layer in self.layers:
            if layer.window and self.window < 1:
                raise ValueError(f"window is {self.window}: expected 1 or more tokens")
            if layer.rope and getattr(self, layer.rope) is None:
                raise ValueError(f"a layer is turned by {layer.rope}, which is not given")
        if self.query_growth and not (self.rope and self.rope.original_context):
            raise ValueError(
                f"query_growth is {self.query_growth}: it counts in original contexts, and RoPE "
                "has none"
            )

    def rotary_width(self, rope: RopeConfig) -> int:
        """How many of a head's D components a RoPE turns; the rest stay as they are."""
        return int(self.head_dim * rope.share)

    def layer(self, index: int) -> Layer:
        """The kind of a layer."""
        if not self.layers:
            return Layer(rope="rope" if self.rope else "")
        return self.layers[index % len(self.layers)]

    @property
    def kinds(self) -> tuple[Layer, ...]:
        """The kind of each of the `n_layers` layers."""
        return tuple(map(self.layer, range(self.n_layers)))

    @property
    def has_windows(self) -> bool:
        """Whether some layer sees a window only."""
        return any(layer.window for layer in self.kinds)


def LlamaConfig(
    *, attention_bias: bool = False, mlp_bias: bool = False, **sizes: Any
) -> ModelConfig:
    """A Llama's config; the defaults are Llama 3 8B's. Keywords are `ModelConfig`'s."""
    biases = (*(("qkv", "o") if attention_bias else ()), *(("mlp",) if mlp_bias else ()))
    keywords: dict[str, Any] = {"biases": biases, **sizes}
    return ModelConfig(**keywords)


def GPTConfig(
    *,
    width: int = 768,
    n_heads: int = 12,
    hidden_width: int = 0,
    qkv_bias: bool = True,
    gelu: Literal["tanh", "erf"] = "tanh",
    **sizes: Any,
) -> ModelConfig:
    """A GPT-2's config; the defaults are the 124M model's. Keywords are `ModelConfig`'s.

    ``GPTConfig(qkv_bias=False, tied=False)`` is the model of "Build an LLM from scratch".
    `gelu` is "tanh", the original's approximation, or "erf", the exact form of some descendants;
    `hidden_width` 0 is four times the width.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads is {n_heads}: expected 1 or more")
    if width % n_heads:
        raise ValueError(f"width {width} does not divide into {n_heads} heads")
    if gelu not in ("tanh", "erf"):
        raise ValueError(f"unknown gelu {gelu!r}: expected 'tanh' or 'erf'")
    shape: dict[str, Any] = {
        "vocab_size": 50257,
        "context_length": 1024,
        "n_layers": 12,
        "tied": True,
    }
    features: dict[str, Any] = {
        "family": "gpt2",
        "rounding": "gpt2",
        "norm": "layer",
        "norm_bias": True,
        "rope": None,
        "gated": False,
        "activation": "gelu_new" if gelu == "tanh" else "gelu",
        "biases": (*(("qkv",) if qkv_bias else ()), "o", "mlp"),
        "width": width,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": max(width // n_heads, 1) if width > 0 else 1,
        "hidden_width": hidden_width or 4 * width,
    }
    return ModelConfig(**{**features, **shape, **sizes})
