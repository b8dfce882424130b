"""Real checkpoints in both layouts: open, account for everything, load, save.

A floor-3 package: it knows the models, and nothing above it.
"""

from pellucid.checkpoints.convert import Conversion, convert
from pellucid.checkpoints.formats.quantised import save_quantised
from pellucid.checkpoints.hub import fetch, resolve
from pellucid.checkpoints.load import Checkpoint, load_model, open_checkpoint
from pellucid.checkpoints.save import save
from pellucid.checkpoints.streaming import WeightsInOrder, is_streamed, stream_model
from pellucid.checkpoints.weights import Weights, parameter_shapes

__all__ = [
    "Checkpoint",
    "Conversion",
    "Weights",
    "WeightsInOrder",
    "convert",
    "fetch",
    "is_streamed",
    "load_model",
    "open_checkpoint",
    "parameter_shapes",
    "resolve",
    "save",
    "save_quantised",
    "stream_model",
]
