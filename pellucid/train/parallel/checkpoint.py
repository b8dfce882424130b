"""Checkpoints of several ranks, each of which writes what it has, read again by any number of them.

    sharded/
      __0_0.distcp, __1_0.distcp …  a rank's slices of weights and of AdamW's two means
      .metadata                     which slice of which tensor lies where
      facts.json                    step, tokens, seconds, best loss …, checksums of the files

The files are torch.distributed.checkpoint's. Whoever reads asks for the slices it needs, so a run
may go on with more ranks, fewer, one, or in another layout; `Consolidated` reads whole tensors.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as read_slices
from torch.distributed.checkpoint.state_dict_saver import save as write_slices

from pellucid.models import Model
from pellucid.train.parallel import SHARDED
from pellucid.train.parallel.ranks import is_lost
from pellucid.train.ranks import Ranks
from pellucid.train.state import TrainState, digest

FACTS = "facts.json"
_FACTS = ("step", "tokens", "seconds", "best_loss", "evaluations_since_best", "extra")
_WEIGHTS = "model."
_DAMAGE = (CheckpointException, UnpicklingError, EOFError, RuntimeError, KeyError)


def save(folder: str | Path, model: Model, state: TrainState, ranks: Ranks | None = None) -> None:
    """Write ``folder/sharded``, all ranks together; the folder is the same for every rank.

    ``folder/sharded`` must not be there yet; it is whole when this returns. `ranks` counts the data
    ranks, which draw numbers of their own; None: this process is alone. Raises OSError, in one
    line, where it cannot be written.
    """
    inside, ranks = Path(folder) / SHARDED, ranks or Ranks()
    content: dict[str, Any] = {"model": get_model_state_dict(model)}
    content["random"] = {f"{ranks.rank}.{kind}": held for kind, held in _random_numbers().items()}
    if state.optimizer.state:  # else asking for it would make AdamW believe in a first step
        content["optimizer"] = get_optimizer_state_dict(model, state.optimizer)
    try:
        with _alone_is_meant():
            write_slices(content, checkpoint_id=inside, no_dist=_alone())
    except (CheckpointException, RuntimeError) as error:
        if is_lost(error):
            raise RuntimeError(_said(error)) from error
        raise OSError(f"{inside.name}: {_said(error)} (is the disk full?)") from None
    sums = _checksums(inside)
    if _alone() or dist.get_rank() == 0:
        facts = {name: getattr(state, name) for name in _FACTS}
        facts |= {"data_ranks": ranks.world, "best_loss": _finite(state.best_loss), "sha256": sums}
        (inside / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if not _alone():
        dist.barrier()


def load(folder: str | Path, model: Model, state: TrainState, ranks: Ranks | None = None) -> None:
    """Read ``folder/sharded`` into `model` and `state`, each rank what it has of them.

    Random numbers go on where they were if there are as many data ranks as then; else they stay as
    they are. Raises ValueError or OSError, in one line, for a checkpoint that is missing,
    damaged or of another model.
    """
    inside, ranks = Path(folder) / SHARDED, ranks or Ranks()
    facts, metadata = _facts(inside), _metadata(inside)
    _check(inside, model, metadata)
    _check_files(inside, facts["sha256"])
    content: dict[str, Any] = {"model": get_model_state_dict(model)}
    if any(key.startswith("optimizer.") for key in metadata.state_dict_metadata):
        content["optimizer"] = get_optimizer_state_dict(model, state.optimizer)
    if facts["data_ranks"] == ranks.world:
        content["random"] = {
            f"{ranks.rank}.{kind}": numbers
            for kind, numbers in _random_numbers().items()
            if f"random.{ranks.rank}.{kind}" in metadata.state_dict_metadata
        }
    _read(content, inside, alone=_alone())
    set_model_state_dict(model, content["model"])
    if "optimizer" in content:
        set_optimizer_state_dict(model, state.optimizer, content["optimizer"])
    for name in _FACTS:
        setattr(state, name, facts[name])
    state.best_loss = math.inf if facts["best_loss"] is None else facts["best_loss"]
    if "random" in content:
        state.random = {name.split(".", 1)[1]: held for name, held in content["random"].items()}


def whole_optimizer(model: Model, state: TrainState) -> dict[str, Any]:
    """The optimiser's numbers by parameter name, of a model that is not spread (yet)."""
    return get_optimizer_state_dict(model, state.optimizer) if state.optimizer.state else {}


def take_over(
    optimizer: dict[str, Any], there: TrainState, model: Model, state: TrainState
) -> None:
    """Go on, spread over ranks, where one process stopped: `there`, and its `whole_optimizer`."""
    options = StateDictOptions(full_state_dict=True)
    if optimizer:
        set_optimizer_state_dict(model, state.optimizer, optimizer, options=options)
    for name in _FACTS:
        setattr(state, name, getattr(there, name))


class Consolidated(Mapping[str, Tensor]):
    """The weights in ``folder/sharded`` as whole tensors, each read at the moment of access.

    parameter name -> tensor, what `checkpoints.save` takes; no other rank is needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.inside = Path(folder) / SHARDED
        self._stored = {
            key.removeprefix(_WEIGHTS): stored
            for key, stored in _metadata(self.inside).state_dict_metadata.items()
            if key.startswith(_WEIGHTS) and isinstance(stored, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        _read({_WEIGHTS + name: tensor}, self.inside, alone=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _random_numbers() -> dict[str, Tensor]:
    """Of the processor and of the card in use, by kind: another rank may get another card."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _read(content: dict[str, Any], inside: Path, *, alone: bool) -> None:
    """Fill the tensors of `content` with what is stored of them."""
    with _alone_is_meant():
        try:
            read_slices(content, checkpoint_id=inside, no_dist=alone)
        except _DAMAGE as error:
            if is_lost(error):
                raise RuntimeError(_said(error)) from error
            raise ValueError(f"{inside} is damaged: {_said(error)}") from None


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _facts(inside: Path) -> dict[str, Any]:
    path = inside / FACTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{inside}: no checkpoint of several ranks ({FACTS}) to resume from"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in (*_FACTS, "data_ranks", "sha256") if name not in facts]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if missing:
        raise ValueError(f"{path} is damaged: it does not say {missing[0]}")
    return facts


def _metadata(inside: Path) -> Metadata:
    try:
        return FileSystemReader(inside).read_metadata()
    except FileNotFoundError:
        raise FileNotFoundError(f"{inside}: no .metadata of a checkpoint in it") from None
    except _DAMAGE as error:
        raise ValueError(f"{inside}/.metadata is damaged: {_said(error)}") from None


def _check(inside: Path, model: Model, metadata: Metadata) -> None:
    stored = metadata.state_dict_metadata
    for name, parameter in model.named_parameters():
        found = stored.get(_WEIGHTS + name)
        size = tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
        if size != tuple(parameter.shape):
            raise ValueError(
                f"{inside} has {name} {size or 'not at all'}, the model {tuple(parameter.shape)}"
            )


def _checksums(inside: Path) -> dict[str, str]:
    """Of every rank's files, by name; each rank reads its own."""
    rank = 0 if _alone() else dist.get_rank()
    own = {file.name: digest(file) for file in inside.glob(f"__{rank}_*.distcp")}
    everyone: list[Any] = [own]
    if not _alone():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    return {name: found for sums in everyone for name, found in sorted(sums.items())}


def _check_files(inside: Path, sums: Mapping[str, str]) -> None:
    """ValueError for a file that is not what was written; each rank reads its share of them."""
    rank, world = (0, 1) if _alone() else (dist.get_rank(), dist.get_world_size())
    for name in sorted(sums)[rank::world]:
        if not (inside / name).is_file():
            raise FileNotFoundError(f"{inside / name} is missing from this checkpoint")
        if digest(inside / name) != sums[name]:
            raise ValueError(f"{inside / name} is damaged: it is not what was written (checksum)")


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _said(error: BaseException) -> str:
    """The first line of an error; of several ranks' errors, the first line of the first."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
