"""How the port of the self-test is written: matters of taste, and the mistakes that ports make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Port:
    """The first group is a matter of taste, the rest are mistakes.

    misreads        what the port takes the config for: the features of another model
    without_biases  products whose bias is not added: "q_proj", "unembed"
    decoding_window  tokens more than the window's that decoding steps see
    """

    summation: Literal["kernel", "permuted", "split"] = "kernel"
    merged: bool = False  # one product for q, k and v
    fused: bool = False  # scaled_dot_product_attention: of attention's insides only z is seen
    first_position: int = 0  # RoPE sees only differences

    misreads: Callable[[Any], Any] | None = None
    without_biases: tuple[str, ...] = ()
    hooked: bool = False  # writes down only what hooks on modules see: z as the output reads it
    pairs: Literal["halves", "neighbours", "mixed", "mixed back"] = "halves"
    rotates: Literal["both", "q", "values too"] = "both"
    exchanged: bool = False  # queries read as keys, keys as queries
    cache: Literal["right", "keys turned again", "last token lost", "values of layer 0"] = "right"
    restarts: bool = False  # positions of decoding steps begin at 0 again
    turned: Literal["first", "last"] = "first"  # components, where only some are turned
    direction: int = 1
    exponent: Literal["2i/D", "i/D"] = "2i/D"
    frequency_dtype: torch.dtype = torch.float32
    position_dtype: torch.dtype = torch.float32
    cached_position: int = 0  # added to the positions of decoding steps
    counts_padding: Literal["never", "decoding", "always"] = "never"  # in the positions
    sees_padding: bool = False
    mask: Literal["causal", "wide", "narrow", "top-left", "none"] = "causal"
    masks: Literal["scores", "pattern", "scores with 0"] = "scores"  # what the mask is applied to
    decoding_window: int = 0
    scale: Literal["1/sqrt D", "none", "1/sqrt C", "1/D"] = "1/sqrt D"
    scaled_by_layer: bool = False  # divided by the layer's number, counted from 1
    heads: Literal["repeated", "tiled"] = "repeated"
    joined: Literal["by token", "by head"] = "by token"
    softmax_dtype: torch.dtype = torch.float32
    sinks: Literal["cut", "kept"] = "cut"  # the column of what looks at nothing
    norm: Literal["right", "with mean", "without mean", "unbiased"] = "right"
    eps: float | None = None  # written into the code
    norm_dtype: torch.dtype | None = None  # None: float32, cast before the weight
    square_dtype: torch.dtype | None = None
    first_head_norm: bool = False  # the norm weight of the first head for all of them
    branch: Literal["gate", "up"] = "gate"
    activation: Literal["right", "erf", "sigmoid", "relu"] = "right"
    residual: Literal["stream", "normed"] = "stream"
    parallel: bool = False  # the MLP's residual starts before attention
    final_norm: bool = True
    caps: Literal["logits", "what the head reads"] = "logits"
    embed_scale: bool = False  # times the root of the width
    dropout: Literal["off", "embedding", "attention"] = "off"
