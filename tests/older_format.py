"""Training states as the versions before wrote them, so that tests can read them again."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as write_slices

from pellucid.models import Model
from pellucid.train import Ranks, TrainState
from pellucid.train.slices import digest

FACTS = ("step", "tokens", "seconds", "best_loss", "evaluations_since_best", "extra")


def save(folder: Path, model: Model, state: TrainState, ranks: Ranks | None = None) -> None:
    """``folder/sharded``, all ranks together: files of torch.distributed.checkpoint."""
    inside, ranks = folder / "sharded", ranks or Ranks()
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    content: dict[str, Any] = {"model": get_model_state_dict(model)}
    content["random"] = {f"{ranks.rank}.cpu": torch.get_rng_state()}
    if state.optimizer.state:
        content["optimizer"] = get_optimizer_state_dict(model, state.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_slices(content, checkpoint_id=inside, no_dist=alone)
    if ranks.process == 0:
        note_facts(inside, state, ranks.world)
    if not alone:
        dist.barrier()


def note_facts(inside: Path, state: TrainState, data_ranks: int = 1) -> None:
    """``facts.json``, with checksums of the files that are there now."""
    facts = {name: getattr(state, name) for name in FACTS} | {"data_ranks": data_ranks}
    facts["best_loss"] = state.best_loss if math.isfinite(state.best_loss) else None
    facts["sha256"] = {file.name: digest(file) for file in sorted(inside.glob("__*.distcp"))}
    (inside / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
