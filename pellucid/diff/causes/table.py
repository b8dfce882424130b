"""What goes wrong in ports, as operations: each hypothesis computes a tensor the wrong way.

The table follows the root causes found again and again in public threads of new engines. A
hypothesis is a function of a `Replay` (inputs, weights, arithmetic) and the tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from torch import Tensor

from pellucid.diff.causes.anywhere import dropped, overflowed
from pellucid.diff.causes.attention import attn_out, masked_scores, pattern, scores, z
from pellucid.diff.causes.hypothesis import Hypothesis, other_weights, parameters
from pellucid.diff.causes.measured import measured_weights
from pellucid.diff.causes.positions import mask, positions
from pellucid.diff.causes.rope import rope_table, rotated
from pellucid.diff.causes.stream import act, embed, hidden, logits, norm, residual
from pellucid.diff.replay.operations import leaf
from pellucid.diff.replay.replay import Replay
from pellucid.graph import inputs

__all__ = ["Hypothesis", "hypotheses", "parameters"]

MOST_UNSEEN = 8  # unobserved tensors before a diverged one that are looked into
_TOGETHER = {  # the same mistake is made in both
    "rope.cos": "rope.sin",
    "attn.q": "attn.k",
    "attn.q_rotated": "attn.k_rotated",
}


def hypotheses(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    """Everything that is known to go wrong up to this tensor, cheap and likely ones first."""
    yield from _of(replay, name, observed)
    yield from dropped(replay, name, observed)
    yield from overflowed(replay, name, observed)
    unseen = _unseen(replay, name)
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
    yield from measured_weights(replay, name, observed)


def _of(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """What goes wrong in the operation of this very tensor."""
    what = leaf(name)
    table = {
        "embed": embed,
        "positions": positions,
        "mask": mask,
        "rope.cos": rope_table,
        "rope.sin": rope_table,
        "attn_norm": norm,
        "mlp_norm": norm,
        "final_norm": norm,
        "attn.q_rotated": rotated,
        "attn.k_rotated": rotated,
        "attn.scores": scores,
        "attn.masked_scores": masked_scores,
        "attn.pattern": pattern,
        "attn.z": z,
        "attn_out": attn_out,
        "resid_pre": residual,
        "resid_mid": residual,
        "resid_post": residual,
        "mlp.act": act,
        "mlp.hidden": hidden,
        "logits": logits,
    }
    if what in table:
        yield from table[what](replay, name, observed)
    yield from other_weights(replay, name)


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
