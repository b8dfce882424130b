"""Small training runs that several ranks and one process do alike, and what is kept of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import older_format
import torch
import torch.distributed as dist
from tiny import CONFIGS, LLAMA, random_model, random_tokens
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

from pellucid import checkpoints
from pellucid.models import Config, Model
from pellucid.train import Ranks, Schedule, TrainConfig, TrainState, next_token_objective, train
from pellucid.train.data.batches import IGNORED, Batch
from pellucid.train.parallel import checkpoint
from pellucid.train.parallel.layout import RankGrid
from pellucid.train.parallel.parallelize import parallelize
from pellucid.train.parallel.ranks import DistributedRanks

STEPS, ROWS = 4, 8
SHAPES: dict[str, Config] = {
    **CONFIGS,
    "llama-tied": replace(LLAMA, tied=True),
    "llama-4": replace(LLAMA, n_kv_heads=4),
}
LAYOUTS = {
    "alone": RankGrid(),
    "ddp": RankGrid(data=2),
    "fsdp": RankGrid(data=2, sharded=True),
    "tp": RankGrid(tensor=2),
    "fsdp4": RankGrid(data=4, sharded=True),
    "fsdp2tp2": RankGrid(data=2, tensor=2, sharded=True),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run: where it begins (a checkpoint of another run), and where it saves after two steps."""

    layout: str
    shape: str = "llama-gqa"
    recompute: bool = False
    compile: bool = False
    micro_batch: int = 1
    bfloat16: bool = False
    load: str = ""
    save: str = ""

    def __str__(self) -> str:
        given = [name for name, value in asdict(self).items() if value is True]
        given += [f"from-{self.load}"] if self.load else []
        return "-".join((self.layout, self.shape, *given))


class Rows:
    """Random rows, some targets of which do not count: not the same number on every rank."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def at(self, step: int) -> Batch:
        """Inputs and targets of `step`."""
        tokens = random_tokens(self.config, ROWS, 17, seed=step)
        targets = tokens[:, 1:].clone()
        targets[0, : 3 + step] = IGNORED
        return Batch(tokens[:, :-1], targets)


def run(job: Job, folder: Path) -> dict:
    """Train as `job` says: losses, norms, held-out losses, and the numbers that a rank holds."""
    config = SHAPES[job.shape]
    model: Model = random_model(config, torch.float32 if job.bfloat16 else torch.float64, "meta")
    if job.load:  # as a run that goes on does, before its model is spread
        weights = checkpoints.open_checkpoint(folder / job.load).weights
        model.load_state_dict({name: weights[name].clone() for name in weights})
    settings = TrainConfig(
        schedule=Schedule(peak=1e-2, final=1e-3, warmup=1, steps=STEPS),
        batch=ROWS,
        micro_batch=job.micro_batch,
        eval_every=2,
    )
    layout, ranks, objective = LAYOUTS[job.layout], None, next_token_objective
    graphs: list[GraphModule] = []
    if dist.is_initialized():
        ranks = DistributedRanks(layout, torch.device("cpu"))
        with patch.object(torch, "compile", partial(torch.compile, backend=_backend(graphs))):
            objective = parallelize(
                model,
                ranks,
                objective,
                recompute=job.recompute,
                compile=job.compile,
                bfloat16=job.bfloat16,
            )
    held = sum(_local(parameter).numel() for parameter in model.parameters())
    state = TrainState.begin(model, settings)
    if job.save:  # before the first step too, which must not change the next
        save(folder / f"{job.save}-begin", model, state, ranks)
        save_older(folder / f"{job.save}-older-begin", model, state, ranks)
    if job.load:
        state = TrainState.load(folder / job.load, model, settings, ranks)
    restored = bool(state.random)
    windows = random_tokens(config, 5, 17, seed=99)
    found: dict = {"job": asdict(job), "losses": [], "norms": [], "held_out": [], "held": held}
    steps = train(
        model, Rows(config), windows, settings, objective=objective, state=state, ranks=ranks
    )
    for progress in steps:
        found["losses"].append(progress.loss)
        found["norms"].append(progress.gradient_norm)
        if progress.held_out_loss is not None:
            found["held_out"].append(progress.held_out_loss)
        if job.save and progress.step == 2:
            save(folder / job.save, model, state, ranks)
            save_older(folder / f"{job.save}-older", model, state, ranks)
    found |= {"graphs": len(graphs), "restored": restored}
    found["weights"] = sum(_whole(p.detach()).abs().sum().item() for p in model.parameters())
    with torch.no_grad():
        found["logits"] = model(random_tokens(config, 1, 9)).abs().sum().item()
    return found


def save(folder: Path, model: Model, state: TrainState, ranks: DistributedRanks | None) -> None:
    """A checkpoint, by all ranks together or by the one there is."""

    def save_model(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        checkpoints.save(folder, model.config, weights)

    checkpoint.save(folder, model, state, ranks or Ranks(), save_model)


def save_older(
    folder: Path, model: Model, state: TrainState, ranks: DistributedRanks | None
) -> None:
    """A checkpoint as versions before wrote it."""
    save(folder, model, state, ranks)
    if ranks is None or ranks.process == 0:
        shutil.rmtree(folder / "training")
    if ranks is not None:
        dist.barrier()
    older_format.save(folder, model, state, ranks)


def _backend(graphs: list[GraphModule]) -> Callable[..., Any]:
    """The compiler up to the two graphs of forward and backward, without kernels; counted."""

    def backend(graph: GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        from torch._dynamo.backends.registry import lookup_backend

        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    return backend


def alone(shape: str, folder: Path, **fields: str) -> dict:
    """The same run in this process."""
    return run(Job(layout="alone", shape=shape, **fields), folder)


def write(found: list[dict], folder: Path) -> None:
    """What this rank found, for the test."""
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
