"""Two and four processes against one: losses, gradients, weights, and going on with fewer or more.

Float64, so that what differs is a bug: rounding is at 1e-15.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from jobs import LAYOUTS, SHAPES, Job, alone
from launch import ranks
from tiny import random_model

from pellucid import checkpoints
from pellucid.train.parallel.checkpoint import Consolidated
from pellucid.train.parallel.layout import local_shapes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FOUR = [
    Job(layout="fsdp2tp2", shape="gpt2", recompute=True, save="four"),
    Job(layout="fsdp4", shape="llama-gqa", micro_batch=2),
]
TWO = [
    Job(layout="ddp", shape="llama-gqa", micro_batch=2),
    Job(layout="ddp", shape="gpt2", recompute=True),
    Job(layout="fsdp", shape="llama-tied", micro_batch=2, save="two"),
    Job(layout="tp", shape="llama-tied", micro_batch=8, recompute=True),
    Job(layout="tp", shape="llama-gqa"),
    Job(layout="fsdp", shape="gpt2", load="four"),
    Job(layout="tp", shape="gpt2", load="one", recompute=True),
    Job(layout="ddp", shape="gpt2", load="one"),
    Job(layout="fsdp", shape="llama-gqa", recompute=True, bfloat16=True),
]


class Found(NamedTuple):
    """What the runs left: of one process by shape, and of each rank of each job."""

    folder: Path
    alone: dict[str, dict]
    four: list[list[dict]]
    two: list[list[dict]]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    folder = tmp_path_factory.mktemp("ranks")
    one = {shape: alone(shape, folder) for shape in ("gpt2", "llama-gqa", "llama-tied")}
    alone("gpt2", folder, save="one")
    return Found(folder, one, ranks(4, FOUR, folder), ranks(2, TWO, folder))


def by_job(jobs: list[Job], count: int):
    return [pytest.param(count, i, id=f"{count}-{j.layout}-{j.shape}") for i, j in enumerate(jobs)]


@pytest.mark.parametrize(("count", "place"), by_job(FOUR, 4) + by_job(TWO, 2))
def test_ranks_compute_what_one_process_does(found: Found, count, place):
    everyone = found.four if count == 4 else found.two
    of_job = [rank[place] for rank in everyone]
    job = (FOUR if count == 4 else TWO)[place]
    one = found.alone[job.shape]
    after = 2 if job.load else 0  # a resumed run has the rest of the steps
    if job.bfloat16:
        assert of_job[0]["losses"] == pytest.approx(one["losses"], rel=1e-2)
        assert of_job[0]["norms"] == pytest.approx(
            one["norms"], rel=5e-2
        )  # 4 steps of rounding at 2^-8
        return
    for rank in of_job:
        assert rank["losses"] == pytest.approx(one["losses"][after:], rel=1e-11)
        assert rank["norms"] == pytest.approx(one["norms"][after:], rel=1e-11)
        assert rank["held_out"] == pytest.approx(one["held_out"][after // 2 :], rel=1e-11)
        assert rank["weights"] == pytest.approx(one["weights"], rel=1e-11)
        assert rank["logits"] == pytest.approx(one["logits"], rel=1e-11)


@pytest.mark.parametrize(("count", "place"), by_job(FOUR, 4) + by_job(TWO, 2))
def test_a_rank_holds_what_the_plan_says(found: Found, count, place):
    job = (FOUR if count == 4 else TWO)[place]
    first = (found.four if count == 4 else found.two)[0][place]
    model = random_model(SHAPES[job.shape])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    planned = local_shapes(shapes, LAYOUTS[job.layout])
    assert first["held"] == sum(map(prod, planned.values()))


@pytest.mark.parametrize(("name", "shape"), [("two", "llama-tied"), ("four", "gpt2")])
def test_one_process_goes_on_where_several_stopped(found: Found, name, shape):
    resumed, one = alone(shape, found.folder, load=name), found.alone[shape]
    assert resumed["losses"] == pytest.approx(one["losses"][2:], rel=1e-11)
    assert resumed["weights"] == pytest.approx(one["weights"], rel=1e-11)


def test_several_ranks_files_become_one_model(found: Found, tmp_path):
    config = SHAPES["gpt2"]
    weights = Consolidated(found.folder / "four-begin")
    checkpoints.save(tmp_path / "model", config, weights)
    read = checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / "model"))
    begun = random_model(config)
    for name, parameter in begun.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter), name


def test_a_rank_that_is_lost_is_named_in_one_line(found: Found):
    said = (found.folder / "lost0.txt").read_text()
    assert said.startswith("rank 0 lost another rank and stops; the last checkpoint is whole")
    assert "\n" not in said


def test_damaged_and_foreign_checkpoints_are_refused(found: Found, tmp_path):
    def go_on(shape: str, name: str) -> None:
        alone(shape, found.folder, load=name)

    with pytest.raises(ValueError, match=r"has embed.weight \(97, 36\).*|the model"):
        go_on("llama-gqa", "four")
    with pytest.raises(FileNotFoundError, match="no checkpoint of several ranks"):
        go_on("gpt2", "nowhere")
    damaged = found.folder / "damaged" / "sharded"
    damaged.mkdir(parents=True)
    for file in (found.folder / "four" / "sharded").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "__0_0.distcp").write_bytes(b"not what was written")
    with pytest.raises(ValueError, match="damaged"):
        go_on("gpt2", "damaged")
    (damaged / "facts.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say step"):
        go_on("gpt2", "damaged")
