"""``torchrun … -m pellucid train``: the same run on several ranks; the first one prints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from pellucid.models import Model
from pellucid.train import run_folder
from pellucid.train.listener import Listener
from pellucid.train.parallel import checkpoint
from pellucid.train.parallel.layout import RankGrid
from pellucid.train.parallel.parallelize import parallelize
from pellucid.train.parallel.ranks import DistributedRanks, Joined, joined_ranks, restarted
from pellucid.train.prepare import bfloat16, clear, go_on, make_room, prepare
from pellucid.train.pretraining import Pretraining
from pellucid.train.run import Crew, stopping
from pellucid.train.settings import TrainSettings
from pellucid.train.state import TrainState


def layout(settings: TrainSettings, ranks: int) -> RankGrid:
    """How `ranks` share the work, as the settings say.

    ValueError where they do not divide, or the rows of a batch among them.
    """
    tensor = ranks if settings.parallel == "tp" else settings.tensor
    if tensor < 1 or ranks % tensor:
        raise ValueError(f"--tensor {tensor}: expected a divisor of {ranks}, the number of ranks")
    found = RankGrid(
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


def after_restart(out: Path, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """Whether to resume and to overwrite: as said, or as it is due after a rank was lost.

    Where torchrun started all ranks again, they go on from the last checkpoint there is, and what
    is in the folder is of the attempt before.
    """
    if not restarted():
        return resume, overwrite
    return run_folder.step_of(out / run_folder.LAST) is not None, True


def train_on_ranks(
    settings: TrainSettings, out: Path, listener: Listener, *, resume: bool, overwrite: bool
) -> Pretraining:
    """One of the processes that torchrun started: all of them train the model of `settings`.

    Each of them has its part of it afterwards; `Pretraining.crew.first` says which one wrote.
    """
    with (
        joined_ranks(settings.device, settings.rank_timeout) as together,
        run_folder.locked(out) if together.first else nullcontext(),
        TemporaryDirectory() as folder,
    ):
        if together.first and not resume:
            make_room(settings, out, overwrite)
        listener = listener if together.first else Listener()

        def prepared() -> Pretraining:
            """In turn: what the first finds or makes, the others only read."""
            return (go_on if resume else prepare)(settings, out, Path(folder), listener)

        run = prepared() if together.first else None
        together.wait()
        run = run or prepared()
        if together.first and not resume:
            clear(out)
        if together.first:
            together.begun()
        run = spread(run, layout(settings, dist.get_world_size()), together, resume=resume)
        if not resume:
            run.begin()
        with stopping() as stop:
            run.fit(stop)
        return run


def spread(run: Pretraining, layout: RankGrid, together: Joined, *, resume: bool) -> Pretraining:
    """Shard `run` over all ranks, and read its state if it goes on; do not use `run` afterwards."""
    model, settings = run.model, run.settings
    ranks = DistributedRanks(layout, together.device)
    if not layout.sharded and layout.tensor == 1:
        model.to(together.device)  # what is cut goes there in parts
    narrow = run.config.bfloat16
    objective = parallelize(
        model,
        ranks,
        run.objective,
        recompute=settings.recompute,
        compile=settings.compile,
        bfloat16=narrow,
    )
    config = replace(run.config, compile=False, bfloat16=narrow and not layout.sharded)
    state = TrainState.begin(model, config)
    if resume:
        with run_folder.reading_last(run.folder) as last:
            state = TrainState.load(last, model, config, ranks)
    whole = replace(
        run,
        config=config,
        state=state,
        objective=objective,
        crew=RankCrew(settings, together, ranks),
        bfloat16=bfloat16(settings.precision, together.device),
    )
    if resume:
        whole.restore()
    # For dropout: ranks with other rows draw other numbers. A state that has its own puts it back.
    torch.manual_seed(settings.seed + 1_000_003 * ranks.rank + whole.step)
    return whole


class RankCrew(Crew):
    """The ranks of a run. All of them take each step and each save together; only the first shows
    anything, and writes what one can."""

    def __init__(self, settings: TrainSettings, together: Joined, ranks: DistributedRanks) -> None:
        self.settings, self.together, self._ranks = settings, together, ranks
        self._first, self._processes = together.first, ranks.processes  # also when ranks have left

    @property
    def ranks(self) -> DistributedRanks:
        """This one's part in each step."""
        return self._ranks

    @property
    def first(self) -> bool:
        """Whether this is the one that shows and writes what one can."""
        return self._first

    @property
    def processes(self) -> int:
        """How many there are."""
        return self._processes

    @property
    def about(self) -> str:
        """The ranks and how they share the work, in a line."""
        shared = f"--parallel {self.settings.parallel}"
        if self.settings.tensor > 1:
            shared += f" --tensor {self.settings.tensor}"
        return f"{self.processes} ranks on {self.together.device.type}, {shared}"

    def wait(self) -> None:
        """Go on when all of them are here."""
        self.together.wait()

    def stops(self, asked: bool) -> bool:
        """Whether any rank was asked to stop: all of them stop after the same step."""
        found = torch.tensor(float(asked), device=self.ranks.mesh.device_type)
        dist.all_reduce(found)
        return bool(found)

    def publish(self, run: Path, name: str, step: int, write: Callable[[Path], None]) -> None:
        """The first rank makes the folder and moves it to its place; all write into it."""
        if self.first:

            def write_together(folder: Path) -> None:
                dist.broadcast_object_list([str(folder)])
                write(folder)

            run_folder.publish(run, name, step, write_together)
        else:
            told: list[Any] = [None]
            dist.broadcast_object_list(told)
            with run_folder.saving(run, step):
                write(Path(told[0]))
        self.wait()

    def write_weights(self, folder: Path, model: Model, save_model: checkpoint.SaveModel) -> None:
        """Have `save_model` write the whole weights into `folder`, on the first rank."""
        checkpoint.save_weights(folder, model, self.ranks, save_model)

    def write_checkpoint(
        self,
        folder: Path,
        model: Model,
        state: TrainState,
        save_model: checkpoint.SaveModel,
        settings: Path,
    ) -> None:
        """The model in `folder`, and in it the state to go on from, in slices."""
        checkpoint.save(folder, model, state, self.ranks, save_model, settings)
