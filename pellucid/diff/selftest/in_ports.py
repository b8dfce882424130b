"""Faults that public ports had and the other lists do not: caches, masks, scales, row orders.

And those of attention once more, seen only as hooks on modules see a model: what the projections
give, what the output projection reads, and nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from pellucid import graph
from pellucid.diff.selftest import damage
from pellucid.diff.selftest.fault import Fault, every, fault, learned, plain_scores, turned
from pellucid.diff.selftest.port import Port
from pellucid.models.config import Layer
from pellucid.models.rope import RopeConfig, frequencies

WINDOW = 8


def _all_heads_own(config: Any) -> bool:
    return config.n_heads == config.n_kv_heads


def _no_windows(config: Any) -> bool:
    return not config.has_windows


def _plain(config: Any) -> bool:
    return not config.qk_norm and plain_scores(config)


def _rope(**fields: Any) -> Callable[[Any], Any]:
    return lambda config: replace(config, rope=replace(config.rope, **fields))


def _near_context(**fields: Any) -> Callable[[Any], Any]:
    return _rope(type="llama3", factor=8.0, original_context=64, theta=5e5, **fields)


def _only_rope(config: Any) -> bool:
    """Every layer has the one RoPE, of all components."""
    return {kind.rope for kind in config.kinds} == {"rope"} and config.rope.share == 1


CACHE = (
    fault(
        "cached keys rotated again",
        "step.1.layers.0.attn.scores",
        "cached keys rotated again",
        port=Port(cache="keys turned again"),
        steps=2,
        applies=every(turned, lambda c: not c.qk_norm_last),
    ),
    fault(
        "last cached token lost",
        "step.1.layers.0.attn.scores",
        "last cached token lost",
        port=Port(cache="last token lost"),
        steps=2,
        applies=_no_windows,
    ),
    fault(
        "values of layer 0 in the cache of all",
        "step.1.layers.1.attn.z",
        "cached values of another layer",
        port=Port(cache="values of layer 0"),
        steps=2,
        applies=lambda c: c.n_layers > 1,
    ),
    fault(
        "positions restart in decoding",
        "step.1.positions",
        "positions restart",
        port=Port(restarts=True),
        steps=2,
    ),
    fault(
        "positions restart in decoding, positions not seen",
        lambda c: "step.1.pos_embed" if learned(c) else "step.1.rope.cos",
        "positions restart",
        port=Port(restarts=True),
        steps=2,
        hides=("positions",),
        applies=lambda c: learned(c) or turned(c),
    ),
    fault(
        "positions from 1",
        "positions",
        "positions off by one",
        port=Port(first_position=1),
        applies=learned,
    ),
    fault(
        "left padding without positions, positions not seen",
        "pos_embed",
        "left padding without positions",
        port=Port(counts_padding="always"),
        rows="padded",
        hides=("positions",),
        applies=learned,
    ),
)

SCORES = (
    fault(
        "q and k exchanged",
        "layers.0.attn.scores",
        "q and k exchanged",
        port=Port(exchanged=True),
        applies=_all_heads_own,
    ),
    fault(
        "scores divided by the layer's number",
        "layers.1.attn.scores",
        "attention scale",
        port=Port(scaled_by_layer=True),
        applies=lambda c: c.n_layers > 1,
    ),
    fault(
        "mask after the softmax",
        "layers.0.attn.masked_scores",
        "mask after the softmax",
        port=Port(masks="pattern"),
        applies=_plain,
    ),
    fault(
        "hidden scores set to 0",
        "layers.0.attn.masked_scores",
        "masked with 0",
        port=Port(masks="scores with 0"),
    ),
    fault(
        "values rotated too",
        "layers.0.attn.z",
        "values rotated too",
        port=Port(rotates="values too"),
        applies=turned,
    ),
    fault(
        "sliding window in B alone",
        "layers.0.attn.masked_scores",
        "sliding window in B",
        port=Port(
            misreads=lambda c: replace(
                c,
                window=WINDOW,
                layers=tuple(Layer(window=True, rope=kind.rope) for kind in c.kinds),
            )
        ),
        applies=_no_windows,
    ),
    fault(
        "neighbours turned with tables for halves",
        "layers.0.attn.q_rotated",
        "RoPE pairing",
        port=Port(pairs="mixed back"),
        applies=turned,
    ),
)

SCALING = (
    fault(
        "RoPE theta and scaling wrong together",
        "rope.cos",
        "RoPE theta and scaling",
        static="RoPE theta",
        with_config=_rope(type="llama3", factor=8.0, original_context=32, theta=5e5),
        config=lambda c: replace(c, rope=RopeConfig(theta=1e4, share=c.rope.share)),
        applies=every(turned, _only_rope),
    ),
    fault(
        "linear scaling in B alone",
        "rope.cos",
        "RoPE scaling type",
        static="RoPE scaling type",
        with_config=lambda c: replace(c, rope=RopeConfig(theta=1e4)),
        config=lambda c: replace(c, rope=RopeConfig(theta=1e4, type="linear", factor=4.0)),
        applies=every(turned, _only_rope),
    ),
    fault(
        "yarn in B alone",
        "rope.cos",
        "RoPE scaling type",
        static="RoPE scaling type",
        with_config=lambda c: replace(c, rope=RopeConfig(theta=1e4)),
        config=lambda c: replace(
            c, rope=RopeConfig(theta=1e4, type="yarn", factor=4.0, original_context=2048)
        ),
        applies=every(turned, _only_rope),
    ),
    fault(
        "another original context",
        "rope.cos",
        "RoPE original context",
        static="RoPE original context",
        with_config=_rope(type="llama3", factor=8.0, original_context=4096, theta=5e5),
        config=_rope(type="llama3", factor=8.0, original_context=8192, theta=5e5),
        applies=every(turned, _only_rope),
        rows="long",
    ),
    fault(
        "another high_freq_factor",
        "rope.cos",
        "RoPE high_freq_factor",
        static="RoPE high_freq_factor",
        with_config=_near_context(),
        config=_near_context(high_freq_factor=2.0),
        applies=every(
            turned,
            _only_rope,
            # few components may have no frequency between the two bounds
            lambda c: (
                not frequencies(_near_context()(c).rope, c.head_dim).equal(
                    frequencies(_near_context(high_freq_factor=2.0)(c).rope, c.head_dim)
                )
            ),
        ),
    ),
)

ROWS = (
    fault(
        "every third row of the joined q, k and v",
        "layers.0.attn.q",
        "fused qkv split wrongly",
        static="fused qkv split wrongly",
        weights=damage.qkv_every_third_row,
        applies=every(_all_heads_own, lambda c: "qkv" in c.biases),
    ),
    fault(
        "rows of gate and up taking turns",
        "layers.0.mlp.gate",
        "gate and up split wrongly",
        static="gate and up split wrongly",
        weights=damage.gate_and_up_alternating,
        applies=lambda c: c.gated,
    ),
    fault(
        "columns of the output projection reordered",
        lambda c: "layers.0.attn.out" if graph.has(c, "attn.out", 0) else "layers.0.attn_out",
        "reordered columns",
        static="reordered columns",
        weights=damage.output_columns_reordered,
    ),
    fault(
        "embedding rows shifted by one",
        "embed",
        "embedding rows shifted",
        static="embedding rows shifted",
        weights=damage.embedding_rows_shifted,
    ),
    fault(
        "k permuted with the query heads' count",
        "layers.0.attn.k",
        "q/k permuted with the wrong head count",
        static="q/k permuted with the wrong head count",
        weights=damage.keys_permuted_by_query_heads,
        applies=every(
            turned,
            lambda c: c.n_kv_heads < c.n_heads and not c.head_dim % 4,
            lambda c: not c.n_kv_heads * c.head_dim % (2 * c.n_heads),  # such rows can be cut so
        ),
    ),
)

# A function called between gate and up is no module: hooks see what the last product reads.
ACTIVATIONS = tuple(
    fault(
        f"{word}, hooks only",
        "layers.0.mlp.hidden",
        "activation",
        applies=lambda c, right=right: c.gated and c.activation.startswith(right),
        port=Port(misreads=lambda c, other=other: replace(c, activation=other), hooked=True),
        hides=("mlp.act",),
    )
    for word, right, other in (
        ("GELU for SiLU", "silu", "gelu_tanh"),
        ("SiLU for GELU", "gelu", "silu"),
    )
)

PORTS: tuple[Fault, ...] = (*CACHE, *SCORES, *SCALING, *ROWS, *ACTIVATIONS)


def hooked(faults: Sequence[Fault]) -> Iterator[Fault]:
    """The faults of attention's inside, in a program that is seen by hooks on its modules."""
    for each in faults:
        if each.name in _INSIDE:
            port = replace(each.port, hooked=True)
            first = _seen_by_hooks(each)
            yield replace(each, name=f"{each.name}, hooks only", port=port, first=first, hides=())


def _seen_by_hooks(each: Fault) -> Callable[[Any], str]:
    """The first tensor that is wrong and that hooks see."""

    def name(config: Any) -> str:
        first = each.first_of(config)
        step = "step.1." if first.startswith("step.1.") else ""
        plain = first.removeprefix("step.1.")
        if plain == "positions" and learned(config):
            return f"{step}pos_embed"
        layer = plain.split(".")[1] if plain.startswith("layers.") else "0"
        return f"{step}layers.{layer}.attn.z"

    return name


_INSIDE = {
    "GQA heads tiled",
    "scores not scaled",
    "scores scaled by D",
    "mask one too wide",
    "mask one too narrow",
    "mask missing",
    "top-left mask with a cache",
    "heads joined without moving them",
    "RoPE turns neighbours, not halves",
    "rotate_half with tables for neighbours",
    "neighbours turned with tables for halves",
    "keys not rotated",
    "RoPE theta 100 times",
    "llama3 scaling missing",
    "linear factor ignored",
    *(each.name for each in (*CACHE, *SCORES, *SCALING) if "not seen" not in each.name),
}
