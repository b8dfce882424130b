"""``torchrun … -m pellucid train``: the same run on several ranks, the first of which speaks."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pellucid import checkpoints
from pellucid.cli import USER_ERRORS
from pellucid.cli.training_run import CONFIG, Run, Stop
from pellucid.cli.training_setup import bfloat16, clear
from pellucid.train import TrainState, run_folder
from pellucid.train.objective import Objective
from pellucid.train.parallel import checkpoint
from pellucid.train.parallel.layout import Layout
from pellucid.train.parallel.parallelize import parallelize
from pellucid.train.parallel.ranks import DistributedRanks, Joined, restarted
from pellucid.train.step_log import Write
from pellucid.train.watch import Watch


def layout(settings: Namespace, ranks: int) -> Layout:
    """How `ranks` share the work, as the settings say.

    ValueError where they do not divide, or the rows of a batch among them.
    """
    tensor = ranks if settings.parallel == "tp" else settings.tensor
    if tensor < 1 or ranks % tensor:
        raise ValueError(f"--tensor {tensor}: expected a divisor of {ranks}, the number of ranks")
    found = Layout(
        data=ranks // tensor,
        tensor=tensor,
        sharded=settings.parallel == "fsdp" and ranks > tensor,
    )
    if settings.trace_every and (found.sharded or found.tensor > 1):
        raise ValueError(
            f"--trace-every: with --parallel {settings.parallel} no rank has a whole parameter; "
            "watch a run with --parallel ddp"
        )
    if settings.order == "dataloader" and found.data > 1:
        raise ValueError(
            "--order dataloader draws from the random numbers of dropout, which are others on each "
            "of several data ranks: train in this order alone, or with --order seeded"
        )
    if settings.rank_timeout <= 0:
        raise ValueError(f"--rank-timeout {settings.rank_timeout:g}: expected more than 0 seconds")
    if settings.batch % found.data:
        raise ValueError(
            f"a batch of {settings.batch} rows does not divide among {found.data} ranks: "
            f"choose a multiple of {found.data}"
        )
    return found


def go_on_if_restarted(arguments: Namespace) -> None:
    """Where torchrun started all ranks again after one was lost: on from the last checkpoint."""
    if restarted():
        arguments.resume = run_folder.step_of(arguments.out / run_folder.LAST) is not None
        arguments.overwrite = True  # what there is, is of the attempt before


@contextmanager
def quiet_unless_first() -> Iterator[None]:
    """What every rank would complain about, the first does."""
    try:
        yield
    except USER_ERRORS:
        if os.environ["RANK"] == "0":
            raise
        raise SystemExit(2) from None


def on_ranks(
    settings: Namespace,
    out: Path,
    joined: Joined,
    prepare: Callable[[], Run],
    *,
    resume: bool,
) -> RanksRun:
    """`prepare` in turn, for what the first finds or makes the others only read; then `spread`."""
    shared = layout(settings, dist.get_world_size())
    run = prepare() if joined.first else None
    joined.wait()
    run = run or prepare()
    if joined.first and not resume:
        clear(out)
    if joined.first:
        joined.begun()
    whole = spread(run, shared, joined, resume=resume)
    if not resume:
        whole.begin()
    return whole


def spread(run: Run, layout: Layout, joined: Joined, *, resume: bool) -> RanksRun:
    """`run` on all ranks: its model spread, its state read if it goes on; it is used up."""
    model, settings = run.model, run.settings
    ranks = DistributedRanks(layout, joined.device)
    if not layout.sharded and layout.tensor == 1:
        model.to(joined.device)  # what is cut goes there in parts
    narrow = run.config.bfloat16
    through = parallelize(
        model,
        ranks,
        run.objective,
        recompute=settings.recompute,
        compile=settings.compile,
        bfloat16=narrow,
    )
    config = replace(run.config, compile=False, bfloat16=narrow and not layout.sharded)
    kept = {field.name: getattr(run, field.name) for field in fields(run)}
    state = TrainState.begin(model, config)
    if resume:
        with run_folder.reading_last(run.out) as last:
            state = TrainState.load(last, model, config, ranks)
    kept |= {"config": config, "state": state}
    kept["quiet"] = run.quiet or not joined.first
    whole = RanksRun(**kept, joined=joined, ranks=ranks, through=through)
    if resume:
        whole.restore()
    # For dropout: ranks with other rows draw other numbers. A state that has its own puts it back.
    torch.manual_seed(settings.seed + 1_000_003 * ranks.rank + whole.step)
    return whole


@dataclass(kw_only=True)
class RanksRun(Run):
    """A run of which every rank has a part. All of them take each step and each save together;
    only the first shows anything, and writes what one can write."""

    joined: Joined
    ranks: DistributedRanks
    through: Objective

    def begin(self) -> None:
        """Write the settings and the model as it begins."""
        if self.joined.first:
            self._write_settings()
        self.joined.wait()
        self.save()

    def fit(self, stop: Stop) -> None:
        """As for one process; files beside the checkpoints are the first rank's."""
        if not self.joined.first:
            self.settings = Namespace(**vars(self.settings) | {"tensorboard": False, "plot": False})
        super().fit(stop)

    @property
    def bfloat16(self) -> bool:
        """FSDP2 casts by itself, whatever `config` says of autocast."""
        return bfloat16(self.settings.precision, self.joined.device)

    def _measure(self) -> None:
        super()._measure()
        shared = f"--parallel {self.settings.parallel}"
        if self.settings.tensor > 1:
            shared += f" --tensor {self.settings.tensor}"
        self.display.say(f"{dist.get_world_size()} ranks on {self.joined.device.type}, {shared}")
        self.display.peak *= dist.get_world_size()

    @property
    def objective(self) -> Objective:
        """The model's part of the step goes through what `parallelize` made of it."""
        return self.through

    def _ranks(self) -> DistributedRanks:
        return self.ranks

    def _watch(self) -> Watch | None:
        return super()._watch() if self.joined.first else None

    def _stops(self, stop: Stop) -> bool:
        """Whether any rank was asked to stop: all of them stop after the same step."""
        asked = torch.tensor(float(stop.asked), device=self.ranks.mesh.device_type)
        dist.all_reduce(asked)
        return bool(asked)

    def _log(self) -> AbstractContextManager[Write]:
        return super()._log() if self.joined.first else nullcontext(lambda progress, more: None)

    def _publish(self, name: str, write: Callable[[Path], None]) -> None:
        """The first rank makes the folder and moves it to its place; all write into it."""
        if self.joined.first:

            def together(folder: Path) -> None:
                dist.broadcast_object_list([str(folder)])
                write(folder)

            run_folder.publish(self.out, name, self.step, together)
        else:
            told: list[Any] = [None]
            dist.broadcast_object_list(told)
            with run_folder.saving(self.out, self.step):
                write(Path(told[0]))
        self.joined.wait()

    def _write_last(self, folder: Path) -> None:
        save = self._save_model(torch.float32)
        checkpoint.save(folder, self.model, self.state, self.ranks, save, self.out / CONFIG)

    def _write_best(self, folder: Path) -> None:
        save = self._save_model(getattr(torch, self.settings.dtype))
        checkpoint.save_weights(folder, self.model, self.ranks, save)

    def _save_model(self, dtype: torch.dtype) -> checkpoint.SaveModel:
        def save(folder: Path, weights: Mapping[str, Tensor]) -> None:
            config, tokenizer = self.model.config, self.tokenizer_folder
            checkpoints.save(folder, config, weights, tokenizer_from=tokenizer, dtype=dtype)

        return save
