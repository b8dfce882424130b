"""Two and four processes against one: losses, gradients, weights, and going on with fewer or more.

Float64, so that what differs is a bug: rounding is at 1e-15.
"""

from __future__ import annotations

import re
import resource
import shutil
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from jobs import LAYOUTS, SHAPES, Job, alone
from launch import ranks
from tiny import random_model

from pellucid import checkpoints
from pellucid.checkpoints.files import SafetensorsFile
from pellucid.train import Schedule, TrainConfig, TrainState
from pellucid.train.parallel.layout import local_shapes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Ranks, and what they do one after the other; a later launch reads what an earlier one saved.
LAUNCHES = [
    (
        2,
        [
            Job(layout="ddp", shape="llama-gqa", micro_batch=2),
            Job(layout="ddp", shape="gpt2", recompute=True),
            Job(layout="fsdp", shape="llama-tied", micro_batch=2, save="two"),
            Job(layout="tp", shape="llama-tied", micro_batch=8, load="two"),
            Job(layout="tp", shape="llama-tied", micro_batch=8, recompute=True),
            Job(layout="tp", shape="llama-gqa"),
            Job(layout="tp", shape="gpt2", load="one", recompute=True),
            Job(layout="ddp", shape="gpt2", load="one"),
            Job(layout="fsdp", shape="llama-gqa", recompute=True, bfloat16=True),
        ],
    ),
    (
        4,
        [
            Job(layout="fsdp2tp2", shape="gpt2", recompute=True, save="four"),
            Job(layout="fsdp4", shape="llama-gqa", micro_batch=2),
            Job(layout="fsdp4", shape="llama-tied", micro_batch=2, load="two"),
            Job(layout="fsdp4", shape="llama-tied", micro_batch=2, load="two-older"),
        ],
    ),
    (
        2,
        [
            Job(layout="fsdp", shape="gpt2", load="four"),
            Job(layout="tp", shape="gpt2", load="four-older"),
            Job(layout="fsdp", shape="llama-gqa", micro_batch=2, recompute=True, compile=True),
        ],
    ),
]
SAVED = {
    "one": 1,
    "two": 2,
    "four": 2,
    "one-older": 1,
    "two-older": 2,
    "four-older": 2,
}  # how many data ranks saved it
JOBS = [
    pytest.param(launch, place, job, id=f"{count}-{job}")
    for launch, (count, jobs) in enumerate(LAUNCHES)
    for place, job in enumerate(jobs)
]


class Found(NamedTuple):
    """What the runs left: of one process by shape; by launch, of each rank of each job."""

    folder: Path
    alone: dict[str, dict]
    launches: list[list[list[dict]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    folder = tmp_path_factory.mktemp("ranks")
    one = {shape: alone(shape, folder) for shape in ("gpt2", "llama-gqa", "llama-tied")}
    alone("gpt2", folder, save="one")
    return Found(folder, one, [ranks(count, jobs, folder) for count, jobs in LAUNCHES])


@pytest.mark.parametrize(("launch", "place", "job"), JOBS)
def test_ranks_compute_what_one_process_does(found: Found, launch, place, job):
    of_job = [rank[place] for rank in found.launches[launch]]
    one = found.alone[job.shape]
    after = 2 if job.load else 0  # a resumed run has the rest of the steps
    if job.bfloat16:  # 4 steps of rounding at 2^-8
        assert of_job[0]["losses"] == pytest.approx(one["losses"], rel=1e-2)
        assert of_job[0]["norms"] == pytest.approx(one["norms"], rel=5e-2)
        return
    for rank in of_job:
        assert rank["losses"] == pytest.approx(one["losses"][after:], rel=1e-11)
        assert rank["norms"] == pytest.approx(one["norms"][after:], rel=1e-11)
        assert rank["held_out"] == pytest.approx(one["held_out"][after // 2 :], rel=1e-11)
        assert rank["weights"] == pytest.approx(one["weights"], rel=1e-11)
        assert rank["logits"] == pytest.approx(one["logits"], rel=1e-11)
        # Where rows are split as before; ranks that share rows must not draw other numbers.
        assert rank["restored"] == (LAYOUTS[job.layout].data == SAVED.get(job.load))
        assert rank["graphs"] == job.compile  # one graph serves all blocks, and evaluation has none


@pytest.mark.parametrize(("launch", "place", "job"), JOBS)
def test_a_rank_holds_what_the_plan_says(found: Found, launch, place, job):
    first = found.launches[launch][0][place]
    model = random_model(SHAPES[job.shape])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    planned = local_shapes(shapes, LAYOUTS[job.layout])
    assert first["held"] == sum(map(prod, planned.values()))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("two", "llama-tied"),
        ("four", "gpt2"),
        ("two-older", "llama-tied"),
        ("four-older", "gpt2"),
    ],
)
def test_one_process_goes_on_where_several_stopped(found: Found, name, shape):
    resumed, one = alone(shape, found.folder, load=name), found.alone[shape]
    assert resumed["losses"] == pytest.approx(one["losses"][2:], rel=1e-11)
    assert resumed["weights"] == pytest.approx(one["weights"], rel=1e-11)


@pytest.mark.parametrize("kind", ["begin", "older-begin"])
def test_several_ranks_files_become_one_model(found: Found, kind):
    read = checkpoints.load_model(checkpoints.open_checkpoint(found.folder / f"four-{kind}"))
    begun = random_model(SHAPES["gpt2"])
    for name, parameter in begun.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter), name


def test_a_slice_is_stored_once(found: Found):
    """Ranks that hold the same write it once: the files are as large as the two means."""
    for name, shape, data_ranks in (("two", "llama-tied", 2), ("four", "gpt2", 2)):
        inside = found.folder / name / "training"
        files = [SafetensorsFile(file) for file in sorted(inside.glob("*.safetensors"))]
        sizes = [(key, prod(file.entries[key].shape)) for file in files for key in file.entries]
        values = sum(p.numel() for p in random_model(SHAPES[shape]).parameters())
        assert sum(size for key, size in sizes if key.startswith("exp_avg")) == 2 * values
        assert sum(key.startswith("random") for key, _ in sizes) == data_ranks


def test_of_those_who_lost_a_rank_one_says_so_in_one_line(found: Found):
    (said,) = (found.folder / "lost-of-4.txt").read_text().splitlines()
    assert re.match(
        r"rank \d lost another rank and stops; the last checkpoint is whole \(\w[^/]*\)$", said
    )


def test_a_full_disk_is_one_line(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="^state.safetensors: ") as told:
            alone("gpt2", tmp_path, save="full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(told.value)


def test_damaged_and_foreign_checkpoints_are_refused(found: Found):
    def go_on(shape: str, name: str) -> None:
        alone(shape, found.folder, load=name)

    config = TrainConfig(schedule=Schedule(peak=1.0, final=1.0, warmup=0, steps=1))
    with pytest.raises(ValueError, match="its training state has .*, this model not"):
        TrainState.load(found.folder / "four", random_model(SHAPES["llama-gqa"]), config)
    damaged = found.folder / "damaged"
    shutil.copytree(found.folder / "four", damaged)
    file = damaged / "training" / "state-00002-of-00004.safetensors"
    bytes_ = bytearray(file.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    file.write_bytes(bytes_)
    with pytest.raises(ValueError, match=f"{file.name} is damaged: it is not what was written"):
        go_on("gpt2", "damaged")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name} is missing from this checkpoint"):
        go_on("gpt2", "damaged")


def test_damaged_checkpoints_of_versions_before_are_refused(found: Found):
    def go_on(name: str) -> None:
        alone("gpt2", found.folder, load=name)

    damaged = found.folder / "older-damaged"
    shutil.copytree(found.folder / "four-older", damaged)
    inside = damaged / "sharded"
    bytes_ = bytearray((inside / "__1_0.distcp").read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    (inside / "__1_0.distcp").write_bytes(bytes_)
    with pytest.raises(ValueError, match="__1_0.distcp is damaged: it is not what was written"):
        go_on("older-damaged")
    (inside / "__1_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match="__1_0.distcp is missing from this checkpoint"):
        go_on("older-damaged")
    (inside / ".metadata").write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        go_on("older-damaged")
    (inside / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.metadata"):
        go_on("older-damaged")
    (inside / "facts.json").write_text('{"sha256": {}}')
    shutil.copy(found.folder / "four-older" / "sharded" / ".metadata", inside)
    with pytest.raises(ValueError, match="does not say step"):
        go_on("older-damaged")
