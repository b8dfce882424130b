"""Faults of the weights: how they were stored, converted, joined, cut or broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.diff.selftest import damage
from pellucid.diff.selftest.fault import Fault, every, fault, head, product, turned


def _square(config: Any) -> bool:
    return config.n_heads * config.head_dim == config.width


def _qkv_biases(config: Any) -> bool:
    return "qkv" in config.biases


def _first_of_block(config: Any) -> str:
    """The first tensor of a block that is computed from a weight."""
    before = config.norm_places != "after" and config.norm_weight
    return "layers.0.attn_norm" if before else "layers.0.attn.q"


def _up(config: Any) -> str:
    return "layers.1.mlp.up" if config.gated else "layers.1.mlp.pre"


WEIGHTS: tuple[Fault, ...] = (
    fault(
        "q and k not permuted",
        "layers.0.attn.q",
        "q/k not permuted",
        static="q/k not permuted",
        weights=damage.not_permuted,
        applies=turned,
    ),
    fault(
        "q, k, v biases dropped",
        "layers.0.attn.q",
        "missing bias",
        static="missing bias",
        weights=damage.without_qkv_bias,
        applies=_qkv_biases,
    ),
    fault(
        "q, k, v biases dropped (Qwen)",
        "layers.0.attn.q",
        "missing bias",
        static="missing bias",
        with_config=lambda c: replace(c, biases=("qkv", "o", *c.biases)),
        with_weights=damage.with_qkv_bias,
        weights=damage.without_qkv_bias,
        applies=lambda c: not _qkv_biases(c),
    ),
    fault(
        "square output projection transposed",
        product("attn", 1),
        "transposed weight",
        static="transposed weight",
        applies=_square,
        weights=damage.square_transposed,
    ),
    fault(
        "fused qkv cut head by head",
        "layers.0.attn.q",
        "fused qkv split wrongly",
        static="fused qkv split wrongly",
        weights=damage.qkv_cut_by_head,
        applies=every(_qkv_biases, lambda c: c.n_heads == c.n_kv_heads),
    ),
    fault(
        "kv heads swapped",
        "layers.0.attn.k",
        "heads reordered",
        static="heads reordered",
        weights=damage.kv_heads_swapped,
        applies=lambda c: c.n_kv_heads > 1 and not _qkv_biases(c),
    ),
    fault(
        "output projection shards joined on rows",
        product("attn", 0),
        "shards joined wrongly",
        static="shards joined wrongly",
        weights=damage.output_shards,
    ),
    fault(
        "down projection shards joined on rows",
        product("mlp", 1),
        "shards joined wrongly",
        static="shards joined wrongly",
        weights=damage.down_shards,
    ),
    fault(
        "token embedding shards joined on rows",
        "embed",
        "shards joined wrongly",
        static="shards joined wrongly",
        weights=damage.embedding_shards,
    ),
    fault(
        "w1 and w3 swapped",
        "layers.0.mlp.gate",
        "swapped weights",
        static="swapped weights",
        weights=damage.gate_and_up_swapped,
        applies=lambda c: c.gated,
    ),
    fault(
        "two layers swapped",
        _first_of_block,
        "tensor of another layer",
        static="tensor of another layer",
        weights=damage.layers_swapped,
        applies=lambda c: c.n_layers > 1,
    ),
    fault(
        "one tensor of another layer",
        _up,
        "tensor of another layer",
        static="tensor of another layer",
        weights=damage.of_another_layer,
    ),
    fault(
        "one exponent bit flipped",
        "layers.1.attn.v",
        "one bit flipped",
        static="one bit flipped",
        weights=damage.exponent_bit,
        applies=lambda c: not c.qkv_clip,  # a clip hides by how much a value is off
    ),
    fault(
        "one mantissa bit flipped",
        "layers.1.attn.v",
        "one bit flipped",
        static="one bit flipped",
        weights=damage.mantissa_bit,
        applies=lambda c: not c.qkv_clip,  # a clip hides by how much a value is off
    ),
    fault(
        "int4 group with a wrong zero point",
        product("mlp", 1),
        "quantised group with a wrong zero point",
        static="quantised group with a wrong zero point",
        with_weights=damage.int4,
        weights=damage.zero_point,
        applies=lambda c: c.hidden_width >= 2 * damage.GROUP,
    ),
    fault(
        "weight overflows float16",
        product("mlp", 1),
        "float16 overflow",
        static="float16 overflow",
        with_weights=damage.massive_weight,
        weights=damage.through_float16,
        not_in=("float16",),
    ),
    fault(
        "tied head untied and random",
        head,
        "unrelated weights",
        static="head untied",
        applies=lambda c: c.tied,
        weights=damage.random_head,
        rows="many",
    ),
    fault(
        "own head random",
        head,
        "unrelated weights",
        static="unrelated weights",
        with_config=lambda c: replace(c, tied=False),
        with_weights=damage.own_head,
        weights=damage.random_head,
        rows="many",
    ),
    fault(
        "own head tied to the embedding",
        head,
        "head tied",
        static="head tied",
        with_config=lambda c: replace(c, tied=False),
        with_weights=damage.own_head,
        weights=damage.head_tied,
        applies=lambda c: "head" not in c.biases,
    ),
)
