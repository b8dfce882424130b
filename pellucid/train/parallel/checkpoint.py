"""Checkpoints of several ranks: a whole model, and a training state that any number reads again.

Each rank writes the slices it has of the weights beside the model's folder; the first puts the
model together, one tensor at a time: no process ever holds all of it. The state stays in slices.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from pellucid.models import Model
from pellucid.train.ranks import Ranks
from pellucid.train.slices import Slices, joined_index
from pellucid.train.state import FOLDER, TrainState, write_together

SaveModel = Callable[[Path, Mapping[str, Tensor]], None]


def save(
    folder: Path,
    model: Model,
    state: TrainState,
    ranks: Ranks,
    save_model: SaveModel,
    settings: Path | None = None,
) -> None:
    """All ranks together: the model in `folder`, and in it the state, as `TrainState.save`.

    `folder` is the same for every rank and must not be there yet; it is whole when the first
    returns. Raises OSError, on all ranks and in one line, where one of them cannot write its part.
    """
    aside = folder.with_name(f"{folder.name}.training")
    written = state.write_tensors(aside, model, ranks)
    save_weights(folder, model, ranks, save_model)
    if ranks.process == 0:
        (aside / FOLDER).rename(folder / FOLDER)
        aside.rmdir()
        state.write_facts(folder, model, written, data_ranks=ranks.world, settings=settings)


def save_weights(folder: Path, model: Model, ranks: Ranks, save_model: SaveModel) -> None:
    """All ranks together: the model in `folder`, as `save_model` writes it on the first.

    save_model  is given `folder` and the whole weights by name, each read when it is asked for
    """
    aside = folder.with_name(f"{folder.name}.weights")
    ranks.reshard(model)
    held = {name: ranks.slice_of(parameter) for name, parameter in model.named_parameters()}
    written = write_together(aside, held, ranks)
    if ranks.process == 0:
        save_model(folder, Slices.in_folder(aside, joined_index(written)))
        shutil.rmtree(aside)
