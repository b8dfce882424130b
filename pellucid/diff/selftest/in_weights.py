"""Faults of the weights: how they were stored, converted, joined, cut or broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.diff.selftest import damage
from pellucid.diff.selftest.fault import Fault, fault, gpt2, llama


def _square(config: Any) -> bool:
    return config.n_heads * config.head_dim == config.width


WEIGHTS: tuple[Fault, ...] = (
    llama(
        "q and k not permuted",
        "layers.0.attn.q",
        "q/k not permuted",
        static="q/k not permuted",
        weights=damage.not_permuted,
    ),
    gpt2(
        "q, k, v biases dropped",
        "layers.0.attn.q",
        "missing bias",
        static="missing bias",
        weights=damage.without_qkv_bias,
    ),
    llama(
        "q, k, v biases dropped (Qwen)",
        "layers.0.attn.q",
        "missing bias",
        static="missing bias",
        with_config=lambda c: replace(c, attention_bias=True),
        with_weights=damage.with_qkv_bias,
        weights=damage.without_qkv_bias,
    ),
    fault(
        "square output projection transposed",
        "layers.1.attn_out",
        "transposed weight",
        static="transposed weight",
        applies=_square,
        weights=damage.square_transposed,
    ),
    gpt2(
        "fused qkv cut head by head",
        "layers.0.attn.q",
        "fused qkv split wrongly",
        static="fused qkv split wrongly",
        weights=damage.qkv_cut_by_head,
    ),
    llama(
        "kv heads swapped",
        "layers.0.attn.k",
        "heads reordered",
        static="heads reordered",
        applies=lambda c: c.n_kv_heads > 1,
        weights=damage.kv_heads_swapped,
    ),
    fault(
        "output projection shards joined on rows",
        "layers.0.attn_out",
        "shards joined wrongly",
        static="shards joined wrongly",
        weights=damage.output_shards,
    ),
    fault(
        "down projection shards joined on rows",
        "layers.1.mlp_out",
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
    llama(
        "w1 and w3 swapped",
        "layers.0.mlp.gate",
        "swapped weights",
        static="swapped weights",
        weights=damage.gate_and_up_swapped,
    ),
    fault(
        "two layers swapped",
        "layers.0.attn_norm",
        "tensor of another layer",
        static="tensor of another layer",
        weights=damage.layers_swapped,
    ),
    llama(
        "one tensor of another layer",
        "layers.1.mlp.up",
        "tensor of another layer",
        static="tensor of another layer",
        weights=damage.of_another_layer,
    ),
    gpt2(
        "one tensor of another layer",
        "layers.1.mlp.pre",
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
    ),
    fault(
        "one mantissa bit flipped",
        "layers.1.attn.v",
        "one bit flipped",
        static="one bit flipped",
        weights=damage.mantissa_bit,
    ),
    fault(
        "int4 group with a wrong zero point",
        "layers.1.mlp_out",
        "quantised group with a wrong zero point",
        static="quantised group with a wrong zero point",
        with_weights=damage.int4,
        weights=damage.zero_point,
    ),
    fault(
        "weight overflows float16",
        "layers.1.mlp_out",
        "float16 overflow",
        static="float16 overflow",
        with_weights=damage.massive_weight,
        weights=damage.through_float16,
    ),
    fault(
        "tied head untied and random",
        "logits",
        "unrelated weights",
        static="head untied",
        applies=lambda c: c.tied,
        weights=damage.random_head,
        rows="many",
    ),
    fault(
        "own head random",
        "logits",
        "unrelated weights",
        static="unrelated weights",
        with_config=lambda c: replace(c, tied=False),
        with_weights=damage.own_head,
        weights=damage.random_head,
        rows="many",
    ),
    fault(
        "own head tied to the embedding",
        "logits",
        "head tied",
        static="head tied",
        with_config=lambda c: replace(c, tied=False),
        with_weights=damage.own_head,
        weights=damage.head_tied,
    ),
)
