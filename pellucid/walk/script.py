"""The whole walk, from the text to the next token, one named tensor at a time.

Read the parts from top to bottom. Each function is one step; its arguments are the values it needs,
found by their names: earlier steps, weights, fields of the config. There is no batch axis.

    T  tokens              C    width of the residual stream     V  vocabulary
    H  query heads         Hkv  key/value heads                  F  hidden width of the MLP
    D  width of one head   D/2  pairs that RoPE turns: pair i is components i and i + D/2

    tokens ── embed ──┬─ norm ─ attention ─ + ─┬─ norm ─ MLP ─ + ── … ── norm ── logits
                      └─────────────────────┘  └───────────────┘

A model takes the steps whose `when` holds for its config and the kind of the layer; where one is
left out, the value before it stands in for its value. The arithmetic is written out here once more,
apart from the models', so that either can bear witness against the other.
"""

from __future__ import annotations

from pellucid.walk import attention, embedding, mlp, unembedding
from pellucid.walk.steps import Script

SCRIPT = Script()
SCRIPT.include(embedding.script)
SCRIPT.include(attention.script)  # heads.py, rope.py; norms.py and finish.py around it
SCRIPT.include(mlp.script)
SCRIPT.include(unembedding.script)
