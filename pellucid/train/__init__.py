"""Training from raw text.

| module | holds |
|---|---|
| data.py | documents, the held-out split, the token stream, batches |
| start.py | the weights a run begins with |
| optim.py | AdamW, what it decays, the learning rate of each step |
| loop.py | loss, gradients, evaluation, and the loop as a generator of steps |

    batches = Batches(stream, context=256, batch=16, seed=0)
    for progress in train(model, batches, held_out, TrainConfig(schedule=schedule)):
        print(progress.step, progress.loss)
"""

from pellucid.train.data import (
    Batches,
    Document,
    held_out_windows,
    hold_out,
    read_documents,
    stdlib_documents,
    token_stream,
)
from pellucid.train.loop import (
    Progress,
    TrainConfig,
    TrainingDiverged,
    bits_per_byte,
    evaluate,
    train,
)
from pellucid.train.optim import Schedule, adamw, parameter_groups
from pellucid.train.start import begin

__all__ = [
    "Batches",
    "Document",
    "Progress",
    "Schedule",
    "TrainConfig",
    "TrainingDiverged",
    "adamw",
    "begin",
    "bits_per_byte",
    "evaluate",
    "held_out_windows",
    "hold_out",
    "parameter_groups",
    "read_documents",
    "stdlib_documents",
    "token_stream",
    "train",
]
