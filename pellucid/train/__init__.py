"""Training from raw text. ``pellucid.train(data=["book.txt"], out="run")`` is a whole run.

| module | holds |
|---|---|
| data/documents.py | documents from files and folders, the validation split, the token stream |
| data/spans.py, shards.py | text of any size, tokenised once into files that are memory-mapped |
| data/token_source.py | where batches take tokens from: a tensor, or those files |
| data/batches.py, shuffle.py | windows of the tokens, shuffled anew in each epoch |
| data/recipe_batches.py | the batch orders of other trainers |
| initial_weights.py | the weights a run begins with |
| optim.py | AdamW, what it decays, the learning rate of each step |
| objective.py, cross_entropy.py | the loss, without ever holding all logits |
| entry.py | a whole run as one call |
| settings.py, fields.py, presets/ | every setting, as TOML and as flags; recipes |
| prepare.py, run.py, pretraining.py | what a run needs; the run itself |
| listener.py | what a run reports while it goes on |
| run_folder.py | whole checkpoints, whatever happens |
| events.py, loss_plot.py, utilisation.py | TensorBoard files, a picture, how busy the machine is |
| config.py, loop.py | gradients, clipping, and the loop as a generator of steps |
| state.py, slices.py | what a run needs, beyond the weights, to go on bit for bit |
| older_state.py | the same as versions before wrote it, read without running anything in it |
| evaluation.py | loss on validation text, bits per byte |
| lean_products.py | bfloat16 products that keep no copy of a weight |
| watch.py, watch_plot.py | what chosen tensors do over a run |
| precision.py, ranks.py | where and how it computes; the seam for many processes |
| parallel/ | those processes: DDP, FSDP2, tensor parallelism, sharded checkpoints |
| footprint.py, plan.py, plan_report.py | what a run takes before it starts: memory and time |

    batches = Batches(stream, context=256, batch=16, seed=0)
    for progress in train(model, batches, held_out, TrainConfig(schedule=schedule)):
        print(progress.step, progress.loss)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pellucid.callable_module import make_callable

# Module -> names, resolved on first use, so that settings and ``--help`` do not wait for torch.
_NAMES = {
    "data.batches": "Batch Batches IGNORED held_out_windows",
    "config": "TrainConfig",
    "data.documents": "Document TextFormat hold_out read_documents stdlib_documents "
    "stream_documents token_stream",
    "entry": "train_model",
    "evaluation": "bits_per_byte evaluate",
    "initial_weights": "begin new_model",
    "listener": "Listener",
    "loop": "Progress TrainingDiverged train",
    "objective": "Objective next_token_objective plain_next_token_objective",
    "optim": "Schedule adamw parameter_groups",
    "pretraining": "Pretraining",
    "ranks": "Ranks",
    "data.recipe_batches": "LoaderBatches RandomBatches",
    "settings": "TrainSettings",
    "data.shards": "Corpus open_corpus tokenise",
    "state": "TrainState",
    "data.token_source": "TokenFiles TokenSource TokenTensor",
}
_LAZY = {name: module for module, names in _NAMES.items() for name in names.split()}

if TYPE_CHECKING:
    from pellucid.train.config import TrainConfig
    from pellucid.train.data.batches import IGNORED, Batch, Batches, held_out_windows
    from pellucid.train.data.documents import (
        Document,
        TextFormat,
        hold_out,
        read_documents,
        stdlib_documents,
        stream_documents,
        token_stream,
    )
    from pellucid.train.data.recipe_batches import LoaderBatches, RandomBatches
    from pellucid.train.data.shards import Corpus, open_corpus, tokenise
    from pellucid.train.data.token_source import TokenFiles, TokenSource, TokenTensor
    from pellucid.train.entry import train_model
    from pellucid.train.evaluation import bits_per_byte, evaluate
    from pellucid.train.initial_weights import begin, new_model
    from pellucid.train.listener import Listener
    from pellucid.train.loop import Progress, TrainingDiverged, train
    from pellucid.train.objective import (
        Objective,
        next_token_objective,
        plain_next_token_objective,
    )
    from pellucid.train.optim import Schedule, adamw, parameter_groups
    from pellucid.train.pretraining import Pretraining
    from pellucid.train.ranks import Ranks
    from pellucid.train.settings import TrainSettings
    from pellucid.train.state import TrainState

__all__ = [
    "IGNORED",
    "Batch",
    "Batches",
    "Corpus",
    "Document",
    "Listener",
    "LoaderBatches",
    "Objective",
    "Pretraining",
    "Progress",
    "RandomBatches",
    "Ranks",
    "Schedule",
    "TextFormat",
    "TokenFiles",
    "TokenSource",
    "TokenTensor",
    "TrainConfig",
    "TrainSettings",
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
    "train_model",
]


_OLDER = {"Layout": "TextFormat"}  # as earlier versions had it


def __getattr__(name: str) -> Any:
    name = _OLDER.get(name, name)
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


make_callable(__name__, lambda: import_module(f"{__name__}.entry").train_model)  # pellucid.train(…)
