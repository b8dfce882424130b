"""What goes wrong in ports, as operations: each hypothesis computes a tensor the wrong way.

The table follows the root causes found again and again in public threads of new engines. A
hypothesis is a function of a `Replay` (inputs, weights, arithmetic) and the tensor's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest

from torch import Tensor

from pellucid import graph, names
from pellucid.diff.causes.anywhere import dropped, overflowed
from pellucid.diff.causes.attention import (
    joined,
    masked_scores,
    pattern,
    projected,
    scores,
    z,
)
from pellucid.diff.causes.hypothesis import (
    Hypothesis,
    is_norm,
    other_weights,
    parameters,
    sibling,
)
from pellucid.diff.causes.measured import measured_weights
from pellucid.diff.causes.misread import misread
from pellucid.diff.causes.norms import norm
from pellucid.diff.causes.positions import mask, pos_embed, positions, window_mask
from pellucid.diff.causes.rope import rope_table, rotated
from pellucid.diff.causes.stream import act, embed, embed_scaled, hidden, logits, residual
from pellucid.diff.replay.operations import leaf
from pellucid.diff.replay.replay import Replay
from pellucid.graph import inputs

__all__ = ["Hypothesis", "hypotheses", "parameters"]

MOST_UNSEEN = 12  # unobserved tensors before a diverged one that are looked into
_TOGETHER = {  # the same mistake is made in both
    "rope.cos": "rope.sin",
    "second_rope.cos": "second_rope.sin",
    "attn.q": "attn.k",
    "attn.q_normed": "attn.k_normed",
    "attn.q_rotated": "attn.k_rotated",
}

_TABLE: dict[str, Callable[[Replay, str, Tensor | None], Iterator[Hypothesis]]] = {
    "embed": embed,
    "embed_scaled": embed_scaled,
    "positions": positions,
    "pos_embed": pos_embed,
    "mask": mask,
    "window_mask": window_mask,
    "rope.cos": rope_table,
    "rope.sin": rope_table,
    "second_rope.cos": rope_table,
    "second_rope.sin": rope_table,
    "attn.q": projected,
    "attn.k": projected,
    "attn.v": projected,
    "attn.q_rotated": rotated,
    "attn.k_rotated": rotated,
    "attn.scores": scores,
    "attn.masked_scores": masked_scores,
    "attn.pattern": pattern,
    "attn.z": z,
    "attn.out": joined,
    "attn_out": joined,
    "resid_pre": residual,
    "resid_mid": residual,
    "resid_post": residual,
    "mlp.act": act,
    "mlp.hidden": hidden,
    "raw_logits": logits,
    "logits": logits,
}
# Products and norms whose weights can be solved for from their inputs and results.
_SOLVED = {
    "embed", "attn_norm", "mlp_norm", "final_norm", "attn.q", "attn.k", "attn.v", "attn_out",
    "mlp.pre", "mlp.gate", "mlp.up", "mlp.out", "mlp_out", "raw_logits", "logits",
}  # fmt: skip


def hypotheses(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    """Everything that is known to go wrong up to this tensor, cheap and likely ones first."""
    unseen = _unseen(replay, name)
    yield from _of_operation(replay, name, observed)
    yield from misread(replay, name, unseen)
    yield from other_weights(replay, name)
    yield from dropped(replay, name, observed)
    yield from overflowed(replay, name, observed)
    for source in unseen:
        before = list(_of(replay, source, None))
        what = leaf(source)
        partner = source.removesuffix(what) + _TOGETHER.get(what, what)
        yield from (_through({source: hypothesis}) for hypothesis in before)
        if partner != source and partner in unseen:
            beside = _of(replay, partner, None)
            for here, there in zip_longest(before, beside):
                if here and there and here.cause == there.cause:
                    yield _through({source: here, partner: there})
    if leaf(name) == "attn.z" and sibling(name, "attn.scores") in unseen:
        yield from _in_scores_too(replay, name)
    if leaf(name) in _SOLVED and not _normed(replay, name):
        yield from measured_weights(replay, name, observed)


def _in_scores_too(replay: Replay, name: str) -> Iterator[Hypothesis]:
    """Mistakes in keys and values alike, where z alone shows both."""
    scored = sibling(name, "attn.scores")
    for before in _of_operation(replay, scored, None):
        for own in _of_operation(replay, name, None):
            if before.cause != own.cause:
                continue

            def compute(
                replay: Replay, name: str, b: Hypothesis = before, o: Hypothesis = own
            ) -> Tensor:
                held = {**replay.observed, scored: b.compute(replay, scored)}
                return o.compute(Replay(held, replay.setting, replay.starts), name)

            yield Hypothesis(own.cause, f"{before.evidence}; {own.evidence}", compute)


def _of(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """What goes wrong in the operation of this very tensor, or in its weights."""
    yield from _of_operation(replay, name, observed)
    yield from other_weights(replay, name)


def _of_operation(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    what = leaf(name)
    if is_norm(replay.setting.config, name):
        yield from norm(replay, name, observed)
    elif what in _TABLE:
        yield from _TABLE[what](replay, name, observed)


def _normed(replay: Replay, name: str) -> bool:
    """What is added to the stream is the result of a norm or a factor, no product's."""
    return leaf(name) in ("attn_out", "mlp_out") and graph.has(
        replay.setting.config, leaf(name).replace("_", "."), names.layer_of(name) or 0
    )


def _unseen(replay: Replay, name: str) -> list[str]:
    """Computed tensors before `name` that were not observed, the nearest first."""
    found: list[str] = []
    edge = [name]
    while edge and len(found) < MOST_UNSEEN:
        edge = [
            source
            for later in edge
            for source in inputs(replay.setting.config, later)
            if source not in replay.observed and inputs(replay.setting.config, source)
        ]
        found += [source for source in edge if source not in found]
    return found[:MOST_UNSEEN]


def _through(wrong: dict[str, Hypothesis]) -> Hypothesis:
    """A mistake in tensors that were not observed, seen in one that follows from them."""
    first = next(iter(wrong))

    def compute(replay: Replay, name: str) -> Tensor:
        changed = {source: wrong[source].compute(replay, source) for source in wrong}
        held = {**replay.observed, **changed}
        return Replay(held, replay.setting, replay.starts).compute(name)

    evidence = f"{' and '.join(map(leaf, wrong))}: {wrong[first].evidence}"
    return Hypothesis(wrong[first].cause, evidence, compute)
