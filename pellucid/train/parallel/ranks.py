"""This process among others: joining them, its share of the rows, and sums over all.

torchrun starts the processes and tells each of them who it is, in its environment; without torchrun
a process is alone, and every sum is its own.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from pellucid.models import Model
from pellucid.train.parallel import ranks_launched
from pellucid.train.parallel.layout import RankGrid
from pellucid.train.ranks import Ranks
from pellucid.train.slices import Slice, whole

TIMEOUT = 600.0  # seconds to wait for another rank in a step
PATIENCE = timedelta(days=7)  # for the one that tokenises or writes for all


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The ranks that torchrun started, joined. `device` is this one's; the store is the job's.

    `rank` is this one's number among them, also when they have parted again.
    """

    rank: int
    device: torch.device
    patient: dist.ProcessGroup
    store: Store

    @property
    def first(self) -> bool:
        """Whether this is the one rank that prints, prepares and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every rank is here, however long the slowest prepares or writes."""
        dist.barrier(group=self.patient)

    def begun(self) -> None:
        """Note that the run's folder is this job's: ranks that are `restarted` go on in it."""
        self.store.set("begun", "")


def restarted() -> bool:
    """Whether torchrun started these ranks again, after an attempt that had `begun`."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return False
    store, _, _ = next(rendezvous("env://"))  # the same in all attempts
    return store.check(["begun"])


@contextmanager
def joined_ranks(device: str = "cpu", timeout: float = TIMEOUT) -> Iterator[Joined]:
    """Join the ranks that torchrun started; a single process is a group of one.

    device   "cpu" (gloo), or "cuda" (nccl), where each rank takes the card of its local number
    timeout  seconds that a rank waits for another before it gives up

    Raises ConnectionError, in one line, when another rank is lost on the way: torchrun then stops
    the others, and starts all of them again if it has ``--max-restarts``. Of all ranks that fail,
    with a ValueError or an OSError, the first raises it and the others leave with SystemExit, so
    that a cause is printed once.
    """
    if timeout <= 0:
        raise ValueError(f"ranks wait {timeout:g} seconds for each other: expected more than 0")
    limit = timedelta(seconds=timeout)
    store = None
    try:
        whole, store, rank, world = _meeting_place(limit)
        place = _place(device)
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(patient, dist.ProcessGroup), "this rank is a member of a group of all"
        yield Joined(rank=rank, device=place, patient=patient, store=whole)
    except (RuntimeError, ValueError, OSError) as error:
        lost = isinstance(error, RuntimeError)
        if lost and not is_lost(error):
            raise
        if ranks_launched() > 1:
            atexit.register(_leave)
        if not _first_to_fail(store):
            raise SystemExit(2) from None
        if not lost:
            raise
        raise ConnectionError(
            f"rank {os.environ.get('RANK', '0')} lost another rank and stops; the last checkpoint "
            f"is whole ({_reason(error)})"
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def _place(device: str) -> torch.device:
    """Where this rank computes."""
    asked = torch.device(device)
    if asked.type != "cuda":
        return asked
    if asked.index is not None:
        raise ValueError(f"device {device}: each rank takes the card of its local number, say cuda")
    number, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= cards:
        raise ValueError(f"device cuda: rank {number} of this machine finds {cards} cards on it")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _meeting_place(limit: timedelta) -> tuple[Store, Store, int, int]:
    """The job's store, where ranks find each other in it, the number of this one, and of all.

    torchrun keeps one store for all attempts: each gets names of its own in it, so that no rank
    waits for a rank of the attempt before.
    """
    if not ranks_launched():
        return HashStore(), HashStore(), 0, 1
    store, rank, world = next(rendezvous("env://", timeout=limit))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return store, PrefixStore(f"attempt {attempt}", store), rank, world


def _first_to_fail(store: Store | None) -> bool:
    """Whether no other rank has failed in this attempt; True as well where that cannot be known."""
    try:
        return store is None or store.add("failed", 1) == 1
    except RuntimeError:
        return True


def _leave() -> None:
    """Leave at the end without taking the group down: gloo may abort where ranks are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _reason(error: Exception) -> str:
    """The first sentence of an error of gloo or nccl, without the file it comes from."""
    sentence = str(error).splitlines()[0].split(". ")[0]
    return re.sub(r"^\[\S*\]\s*", "", sentence)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a rank did not answer; gloo has no type of its own for it."""
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        words in said
        for words in ("gloo/transport", "connection closed", "connection reset", "timed out")
    )


class DistributedRanks(Ranks):
    """The seams of the loop for ranks in a `layout`: rows go by data rank, sums over those.

    `rank` and `world` count data ranks: the tensor-parallel ranks of a group compute the same rows.
    """

    def __init__(self, layout: RankGrid, device: torch.device) -> None:
        if layout.ranks != dist.get_world_size():
            raise ValueError(
                f"{layout.data} × {layout.tensor} ranks are asked for, but "
                f"{dist.get_world_size()} were started"
            )
        self.layout = layout
        self.mesh: DeviceMesh = init_device_mesh(
            device.type, (layout.data, layout.tensor), mesh_dim_names=("data", "tensor")
        )
        self.rank = self.mesh.get_local_rank("data")
        self.world = layout.data
        self.process, self.processes = dist.get_rank(), dist.get_world_size()
        self.writes_rank = self.mesh.get_local_rank("tensor") == 0
        self.model: Model | None = None
        self.wrapped: DistributedDataParallel | None = None

    def sum(self, values: Tensor) -> Tensor:
        """`values` added over the data ranks."""
        total = values.clone()
        dist.all_reduce(total, group=self.mesh.get_group("data"))
        return total

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Gradients stay with their rank until the `last` pass."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif self.wrapped is not None and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def gradient_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """Euclidean norm of the whole gradient, wherever its parts are.

        What several ranks hold alike is counted once: each of them adds its share of the square.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device_type)
        for parameter in parameters:
            if parameter.grad is not None:
                part, copies = _part(parameter.grad)
                squares += part.double().square().sum() / copies
        dist.all_reduce(squares)
        return squares.sqrt()

    def reshard(self, model: Model) -> None:
        """Let go of whole parameters that a forward pass left gathered: back to slices of them."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def slice_of(self, tensor: Tensor) -> Slice:
        """What this process has of a parameter, or of a tensor that is spread like one."""
        if not isinstance(tensor, DTensor):
            return whole(tensor)._replace(writes=self.process == 0)
        mesh, placements = tensor.device_mesh, tensor.placements
        local = tensor.to_local()
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        assert tuple(local.shape) == tuple(shape), f"{local.shape} of {tensor.shape}, not {shape}"
        place = mesh.get_coordinate()
        assert place is not None, "this process is on the mesh of its parameters"
        axes = zip(placements, place, strict=True)
        writes = all(number == 0 for axis, number in axes if axis.is_replicate())
        return Slice(local, tuple(offset), tuple(tensor.shape), writes)

    def gathered(self, found: Any) -> list[Any]:
        """What each process found, in their order; all of them call this together."""
        everyone: list[Any] = [None] * self.processes
        dist.all_gather_object(everyone, found)
        return everyone


def _part(gradient: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a gradient, and how many ranks hold the same."""
    if not isinstance(gradient, DTensor):
        return gradient, dist.get_world_size()
    axes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
    parts = prod(ranks for placement, ranks in axes if not placement.is_replicate())
    return gradient.to_local(), dist.get_world_size() // parts
