"""What goes wrong with weights on their way into a port: functions that break a healthy set.

Each takes the weights (canonical name -> tensor, a dictionary of its own) and the config, and
changes the dictionary; the tensors in it are never written to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
GROUP = 32  # columns that share a scale and a zero point


def _interleaved(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def not_permuted(weights: Weights, config: Any) -> None:
    """Meta's rows of q and k, neighbours paired, where RoPE turns halves."""
    for layer in range(config.n_layers):
        for letter in "qk":
            for kind in ("weight", "bias"):
                name = f"layers.{layer}.attn.{letter}_proj.{kind}"
                if name in weights:
                    weights[name] = _interleaved(weights[name], config.head_dim)


def norm_plus_one(weights: Weights, config: Any) -> None:
    """Gemma's convention, the weight kept as its distance from one, taken for this model's."""
    for name in list(weights):
        if name.endswith("mlp_norm.weight") and not name.startswith("layers.0."):
            weights[name] = weights[name] + 1


def middle_norms_exchanged(weights: Weights, config: Any) -> None:
    """The norm behind attention and the one before the MLP, by names that two families share."""
    for layer in range(config.n_layers):
        for kind in ("weight", "bias"):
            after, before = (f"layers.{layer}.{n}.{kind}" for n in ("attn_out_norm", "mlp_norm"))
            if after in weights:
                weights[after], weights[before] = weights[before], weights[after]


def without_norm_bias(weights: Weights, config: Any) -> None:
    """A LayerNorm whose bias was never loaded."""
    del weights["layers.1.attn_norm.bias"]


def without_qkv_bias(weights: Weights, config: Any) -> None:
    """Queries, keys and values whose biases were never loaded."""
    for layer in range(config.n_layers):
        for letter in "qkv":
            del weights[f"layers.{layer}.attn.{letter}_proj.bias"]


def square_transposed(weights: Weights, config: Any) -> None:
    """GPT-2 stores (in, out); the square c_proj fits either way round and nothing complains."""
    name = "layers.1.attn.o_proj.weight"
    weights[name] = weights[name].T.contiguous()


def qkv_cut_by_head(weights: Weights, config: Any) -> None:
    """c_attn is q | k | v, cut here as if each head's q, k and v stood together."""
    for layer in range(config.n_layers):
        for kind in ("weight", "bias"):
            names = [f"layers.{layer}.attn.{letter}_proj.{kind}" for letter in "qkv"]
            joined = torch.cat([weights[name] for name in names])
            cut = joined.unflatten(0, (config.n_heads, 3, config.head_dim))
            for place, name in enumerate(names):
                weights[name] = cut[:, place].flatten(0, 1).contiguous()


def qkv_every_third_row(weights: Weights, config: Any) -> None:
    """c_attn is q | k | v, read here as if its rows took turns."""
    for layer in range(config.n_layers):
        for kind in ("weight", "bias"):
            names = [f"layers.{layer}.attn.{letter}_proj.{kind}" for letter in "qkv"]
            joined = torch.cat([weights[name] for name in names])
            for place, name in enumerate(names):
                weights[name] = joined[place::3].contiguous()


def gate_and_up_alternating(weights: Weights, config: Any) -> None:
    """gate | up in one matrix, read as if its rows took turns."""
    for layer in range(config.n_layers):
        names = [f"layers.{layer}.mlp.{which}_proj.weight" for which in ("gate", "up")]
        joined = torch.cat([weights[name] for name in names])
        for place, name in enumerate(names):
            weights[name] = joined[place::2].contiguous()


def output_columns_reordered(weights: Weights, config: Any) -> None:
    """The heads that the output projection of block 0 reads, moved by one."""
    name = "layers.0.attn.o_proj.weight"
    heads = weights[name].unflatten(1, (-1, config.head_dim))
    weights[name] = heads.roll(1, 1).flatten(1)


def embedding_rows_shifted(weights: Weights, config: Any) -> None:
    """Each token gets the row of the one before it."""
    weights["embed.weight"] = weights["embed.weight"].roll(1, 0)


def keys_permuted_by_query_heads(weights: Weights, config: Any) -> None:
    """Rows of k brought into the half-split order by the count of query heads."""
    for layer in range(config.n_layers):
        for kind in ("weight", "bias"):
            name = f"layers.{layer}.attn.k_proj.{kind}"
            if name in weights:
                pairs = _interleaved(weights[name], config.head_dim)
                heads = pairs.unflatten(0, (config.n_heads, -1, 2))
                weights[name] = heads.transpose(1, 2).flatten(0, 2)


def kv_heads_swapped(weights: Weights, config: Any) -> None:
    """The first two key/value heads of one block in each other's place."""
    for letter in "kv":
        name = f"layers.0.attn.{letter}_proj.weight"
        heads = list(weights[name].split(config.head_dim))
        heads[0], heads[1] = heads[1], heads[0]
        weights[name] = torch.cat(heads)


def _joined_on_rows(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, dim=1)).reshape(x.shape)


def output_shards(weights: Weights, config: Any) -> None:
    """wo is split over its columns; its two shards one below the other."""
    name = "layers.0.attn.o_proj.weight"
    weights[name] = _joined_on_rows(weights[name])


def down_shards(weights: Weights, config: Any) -> None:
    """w2 is split over its columns too."""
    name = "layers.1.mlp.down_proj.weight"
    weights[name] = _joined_on_rows(weights[name])


def embedding_shards(weights: Weights, config: Any) -> None:
    """Meta's older checkpoints split the token embedding over its columns."""
    weights["embed.weight"] = _joined_on_rows(weights["embed.weight"])


def gate_and_up_swapped(weights: Weights, config: Any) -> None:
    """w1 and w3 taken in the order of their numbers."""
    for layer in range(config.n_layers):
        gate, up = (f"layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        weights[gate], weights[up] = weights[up], weights[gate]


def layers_swapped(weights: Weights, config: Any) -> None:
    """Blocks 0 and 1 in each other's place."""
    for name in list(weights):
        if name.startswith("layers.0."):
            other = name.replace("layers.0.", "layers.1.")
            weights[name], weights[other] = weights[other], weights[name]


def of_another_layer(weights: Weights, config: Any) -> None:
    """One matrix of block 1 that is block 0's."""
    weights["layers.1.mlp.up_proj.weight"] = weights["layers.0.mlp.up_proj.weight"]


def _flipped(weights: Weights, name: str, bit: int) -> None:
    """One bit of one value, counted from the first bit of the exponent: -1 is of the mantissa."""
    x = weights[name].clone()
    integers = {2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
    lowest = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[x.dtype]
    flat = x.view(integers).flatten()
    place = int(x.abs().flatten().argsort()[-len(flat) // 10])  # a large one, not the largest
    flat[place] ^= 1 << (lowest + bit)
    weights[name] = flat.reshape(x.shape).view(x.dtype)


def exponent_bit(weights: Weights, config: Any) -> None:
    """One value four times or a quarter of what it was."""
    _flipped(weights, "layers.1.attn.v_proj.weight", 1)


def mantissa_bit(weights: Weights, config: Any) -> None:
    """One value changed by up to a half."""
    _flipped(weights, "layers.1.attn.v_proj.weight", -1)


def int4(weights: Weights, config: Any) -> None:
    """Every layer's down projection through int4, a scale and a zero point for each group.

    This breaks nothing: it is what the fault below needs on both sides.
    """
    for layer in range(config.n_layers):
        name = f"layers.{layer}.mlp.down_proj.weight"
        weights[name] = _through_int4(weights[name])


def zero_point(weights: Weights, config: Any) -> None:
    """The zero point of one group one level too high."""
    name = "layers.1.mlp.down_proj.weight"
    x = weights[name].clone()
    group = x[3, GROUP : 2 * GROUP].float()
    x[3, GROUP : 2 * GROUP] = group - (group.amax() - group.amin()) / 15
    weights[name] = x


def _through_int4(x: Tensor) -> Tensor:
    whole = x.shape[1] // GROUP * GROUP
    groups = x[:, :whole].float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low).clamp(min=1e-12) / 15
    rounded = ((groups - low) / step).round() * step + low
    return torch.cat((rounded.flatten(1).to(x.dtype), x[:, whole:]), 1)


def random_head(weights: Weights, config: Any) -> None:
    """A head that was never loaded: what the constructor drew."""
    shape = weights["embed.weight"].shape
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * shape[1] ** -0.5
    weights["unembed.weight"] = drawn.to(weights["embed.weight"].dtype)


def own_head(weights: Weights, config: Any) -> None:
    """A head besides the embedding; healthy, on both sides."""
    mixed = weights["embed.weight"].float()
    mixed = mixed + mixed.std() * torch.randn(
        mixed.shape, generator=torch.Generator().manual_seed(2)
    )
    weights.setdefault("unembed.weight", mixed.to(weights["embed.weight"].dtype))


def head_tied(weights: Weights, config: Any) -> None:
    """A head that was stored, and was not loaded."""
    del weights["unembed.weight"]


def with_qkv_bias(weights: Weights, config: Any) -> None:
    """Biases as Qwen's attention has them; healthy, on both sides."""
    random = torch.Generator().manual_seed(3)
    kept = weights["embed.weight"].dtype
    for layer in range(config.n_layers):
        for letter in "qkvo":
            stem = f"layers.{layer}.attn.{letter}_proj"
            if f"{stem}.bias" not in weights:
                size = len(weights[f"{stem}.weight"])
                weights[f"{stem}.bias"] = (torch.randn(size, generator=random) / 4).to(kept)


def massive_weight(weights: Weights, config: Any) -> None:
    """One weight as large as trained models have them in a few channels; healthy."""
    name = "layers.1.mlp.down_proj.weight"
    x = weights[name].clone()
    x[2, 4] = 98304.0
    weights[name] = x


def through_float16(weights: Weights, config: Any) -> None:
    """Saved in float16 on the way: what is above 65,504 becomes infinite."""
    name = "layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].half().to(weights[name].dtype)


def massive_channel(weights: Weights, config: Any) -> None:
    """A residual stream with one massive channel, as trained models have; healthy."""
    x = weights["embed.weight"].clone()
    x[:, 3] = 700.0
    weights["embed.weight"] = x


def vocabulary_padded(weights: Weights, config: Any) -> None:
    """Rows up to a multiple of 64 more than there are tokens; no fault."""
    for name in ("embed.weight", "unembed.weight"):
        if name in weights:
            x = weights[name]
            more = x.new_zeros(128 - len(x) % 64, x.shape[1])
            weights[name] = torch.cat((x, more))


def all_int8(weights: Weights, config: Any) -> None:
    """Every matrix through int8 by rows; no fault, a declared difference."""
    for name, x in weights.items():
        if x.ndim == 2 and "proj" in name:
            step = x.float().abs().amax(1, keepdim=True) / 127
            weights[name] = ((x.float() / step).round() * step).to(x.dtype)
