"""Fine-tuning: a trained model learns something more.

| module | holds |
|---|---|
| freeze.py | which parameters are trained at all |
| records.py | files of examples: JSON, JSON lines, CSV |
| rows.py | examples in rows, packed or padded; what is cut is counted |
| instructions.py | conversations of which only the answers are learnt |
| classify.py, classes.py | a head on the last token; how well it tells classes apart |
| pairs.py, preferences.py | preference data, and direct preference optimisation (DPO) |

`pellucid.train.train` drives all of it: each kind of data has an object with ``at(step)`` and an
objective.
"""
