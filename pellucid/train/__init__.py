"""Training from raw text.

| module | holds |
|---|---|
| documents.py | documents from files and folders, the held-out split, the token stream |
| batches.py | windows of the token stream, shuffled anew in each epoch |
| start.py | the weights a run begins with |
| optim.py | AdamW, what it decays, the learning rate of each step |
| loop.py | loss, gradients, evaluation, and the loop as a generator of steps |

    batches = Batches(stream, context=256, batch=16, seed=0)
    for progress in train(model, batches, held_out, TrainConfig(schedule=schedule)):
        print(progress.step, progress.loss)
"""

from pellucid.train.batches import IGNORED, Batch, Batches, held_out_windows
from pellucid.train.documents import (
    Document,
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
    "IGNORED",
    "Batch",
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
