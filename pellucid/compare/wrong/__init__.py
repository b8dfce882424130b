"""What goes wrong in ports, as operations: each hypothesis computes a tensor the wrong way.

The table follows the root causes found again and again in public threads of new engines. A
hypothesis is a function of a `Replay` (inputs, weights, arithmetic) and the tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from pellucid.compare.ops import leaf
from pellucid.compare.replay import Replay
from pellucid.compare.wrong.attention import attn_out, masked_scores, pattern, scores, z
from pellucid.compare.wrong.base import Hypothesis, other_weights, parameters
from pellucid.compare.wrong.places import mask, positions, rope_table, rotated
from pellucid.compare.wrong.stream import act, embed, hidden, logits, norm, residual

__all__ = ["Hypothesis", "hypotheses", "parameters"]


def hypotheses(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    """Everything that is known to go wrong with this operation, cheap and likely ones first."""
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
    for parameter in parameters(replay.setting, name):
        yield from other_weights(replay, parameter)
