"""Training from raw text.

| module | holds |
|---|---|
| documents.py | documents from files and folders, the held-out split, the token stream |
| spans.py, shards.py | text of any size, tokenised once into files that are memory-mapped |
| token_source.py | where batches take tokens from: a tensor, or those files |
| batches.py, order.py | windows of the tokens, shuffled anew in each epoch |
| start.py | the weights a run begins with |
| optim.py | AdamW, what it decays, the learning rate of each step |
| objective.py, cross_entropy.py | the loss, without ever holding all logits |
| recipe_batches.py | the batch orders of other trainers |
| settings.py, settings_table.py, presets/ | every setting, as TOML and as flags; recipes |
| run_folder.py | whole checkpoints, whatever happens |
| events.py, loss_plot.py, utilisation.py | TensorBoard files, a picture, how busy the machine is |
| loop.py | gradients, clipping, and the loop as a generator of steps |
| state.py | what a run needs, beyond the weights, to go on bit for bit |
| evaluation.py | loss on held-out text, bits per byte |
| lean_products.py | bfloat16 products that keep no copy of a weight |
| watch.py, watch_plot.py | what chosen tensors do over a run |
| precision.py, ranks.py | where and how it computes; the seam for many processes |
| parallel/ | those processes: DDP, FSDP2, tensor parallelism, sharded checkpoints |
| footprint.py, plan.py | what a run takes before it starts: memory and time |

    batches = Batches(stream, context=256, batch=16, seed=0)
    for progress in train(model, batches, held_out, TrainConfig(schedule=schedule)):
        print(progress.step, progress.loss)
"""

from pellucid.train.batches import IGNORED, Batch, Batches, held_out_windows
from pellucid.train.config import TrainConfig
from pellucid.train.documents import (
    Document,
    Layout,
    hold_out,
    read_documents,
    stdlib_documents,
    stream_documents,
    token_stream,
)
from pellucid.train.evaluation import bits_per_byte, evaluate
from pellucid.train.loop import Progress, TrainingDiverged, train
from pellucid.train.objective import (
    Objective,
    next_token_objective,
    plain_next_token_objective,
)
from pellucid.train.optim import Schedule, adamw, parameter_groups
from pellucid.train.ranks import Ranks
from pellucid.train.recipe_batches import LoaderBatches, RandomBatches
from pellucid.train.shards import Corpus, open_corpus, tokenise
from pellucid.train.start import begin, new_model
from pellucid.train.state import TrainState
from pellucid.train.token_source import TokenFiles, TokenSource, TokenTensor

__all__ = [
    "IGNORED",
    "Batch",
    "Batches",
    "Corpus",
    "Document",
    "Layout",
    "LoaderBatches",
    "Objective",
    "Progress",
    "RandomBatches",
    "Ranks",
    "Schedule",
    "TokenFiles",
    "TokenSource",
    "TokenTensor",
    "TrainConfig",
    "TrainState",
    "TrainingDiverged",
    "adamw",
    "begin",
    "bits_per_byte",
    "evaluate",
    "held_out_windows",
    "hold_out",
    "new_model",
    "next_token_objective",
    "open_corpus",
    "parameter_groups",
    "plain_next_token_objective",
    "read_documents",
    "stdlib_documents",
    "stream_documents",
    "token_stream",
    "tokenise",
    "train",
]
