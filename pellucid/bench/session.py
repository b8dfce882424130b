"""A whole bench as one call: which engines, their turns, and the summary that is saved.

    result = run_bench("gpt2-124m", engines=["pellucid/*"], plan=QUICK)
    result["summary"]["engines"]

Importing this module imports PyTorch; workers, which may not have it, never do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pellucid.bench import candidates, limits, machine
from pellucid.bench.rounds import BenchPlan, Rounds
from pellucid.bench.shapes import SHAPES, model_home
from pellucid.bench.summary import summarise
from pellucid.bench.work import work_folder
from pellucid.checkpoints.model_report import find_config
from pellucid.devices import free_memory
from pellucid.files import read_json
from pellucid.models import Config
from pellucid.models.description import describe_fields
from pellucid.ownership import own_folder

RESULTS = Path("benchmarks/results")
_SHARE_OF_MEMORY = 0.7


def run_bench(
    shape: str = "gpt2-124m",
    *,
    engines: Sequence[str] = (),
    plan: BenchPlan | None = None,
    baseline: str | None = None,
    peer_pythons: Sequence[str] = (),
    memory_bytes: int | None = None,
    work: Path | None = None,
    prepare: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure engines in turns over one shape with random weights; the object that is saved.

    shape         a name of `SHAPES`, or what `find_config` takes
    engines       globs over their names; none: those that are installed
    baseline      engine to divide by; None: the first
    peer_pythons  other interpreters in which peers may be installed
    memory_bytes  of all engines together; None: 70 % of what is free
    work          a folder that only this user can write, where models' files are kept from run to
                  run; None: `work_folder()`
    prepare       only write the models' files
    progress      called with what is measured next

    Ctrl-C ends the measurements, and what has been measured is summarised. ValueError for a shape
    or an engine that is unknown.
    """
    title, config = find_shape(shape)
    chosen = candidates.choose(list(engines) or candidates.DEFAULT)
    if baseline and baseline not in [spec.name for spec in chosen]:
        raise ValueError(f"baseline {baseline!r} is not among the engines measured")
    runnable, skipped = candidates.available(chosen, peer_pythons)
    budget = memory_bytes or int(_SHARE_OF_MEMORY * free_memory(torch.device("cpu")))
    described = machine.describe()
    home = own_folder(model_home(work or work_folder(), title, config))
    rounds = Rounds(config, runnable, plan or BenchPlan(), home, budget, progress)
    interrupted = False
    try:
        rounds.write_files() if prepare else rounds.run()
    except KeyboardInterrupt:
        interrupted = True
    record = rounds.record
    if not engines:  # of peers that were not asked for by name, nothing is said
        skipped = {name: why for name, why in skipped.items() if name.startswith("pellucid/")}
    record["skipped"] = {**skipped, **record["skipped"]}
    flops = limits.prefill_flops(config, rounds.plan.prefill)
    about = {"name": title, "family": config.family, "config": describe_fields(config)}
    result = {
        "shape": about,
        "machine": described,
        **record,
        "prefill_flops": flops,
        "summary": summarise(record, flops, baseline),
    }
    return result | ({"interrupted": True} if interrupted else {})


def find_shape(source: str) -> tuple[str, Config]:
    """Title and config of a shape by name, or of a model or a config file."""
    return (source, SHAPES[source]) if source in SHAPES else (source, find_config(source)[1])


def read_result(path: Path) -> dict[str, Any]:
    """A result that `save_result` wrote; ValueError for another file."""
    result = read_json(path)
    if "turns" not in result:
        raise ValueError(f"{path}: not a saved bench (no turns in it)")
    return result


def save_result(result: dict[str, Any], name: str) -> Path:
    """Write a result to ``benchmarks/results/NAME.json``, or to a path that ends in .json."""
    path = Path(name) if name.endswith(".json") else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return path
