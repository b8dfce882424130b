"""``pellucid bench``: how fast, against this machine's own limits and in turns with peers."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.cli.common import console, print_json

if TYPE_CHECKING:
    from pellucid.bench.rounds import Plan
    from pellucid.models import Config

_RESULTS = Path("benchmarks/results")


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, with what, how often, and where the numbers go."""
    parser.add_argument(
        "--shape",
        default="gpt2-124m",
        help="gpt2-124m (default), llama-3.2-1b, llama-3-8b, stories15m, any name `pellucid info` "
        "knows, a model or a config.json; weights are random",
    )
    parser.add_argument(
        "--engines",
        action="append",
        metavar="GLOB",
        help="which, as globs over their names, separated by commas: 'pellucid/*,llama.cpp/bf16' "
        "(default: what is installed)",
    )
    parser.add_argument("--list", action="store_true", help="name the engines and stop")
    parser.add_argument(
        "--prepare", action="store_true", help="write the files the engines read, and stop"
    )
    parser.add_argument("--baseline", metavar="NAME", help="divide by this engine (default: first)")
    parser.add_argument("--rounds", type=int, metavar="N", help="fresh beginnings (default 2)")
    parser.add_argument("--loads", type=int, metavar="N", help="timed fresh starts (default 1)")
    parser.add_argument(
        "--measures", metavar="NAME,…", help="decode, prefill, batched (default: all three)"
    )
    parser.add_argument("--quick", action="store_true", help="one short round, for a first look")
    parser.add_argument("--threads", type=int, default=0, help="default: the cores that are free")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PATH",
        help="another interpreter in which peers may be installed (repeatable)",
    )
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="of all engines together (default: 70%% of free)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=_work_folder(),
        metavar="DIR",
        help="where the random models are kept from run to run, a folder that nobody else can "
        "write (default %(default)s)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object, raw turns included")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures")
    group.add_argument(
        "--save", metavar="NAME", help=f"write the JSON to {_RESULTS}/NAME.json (or to a path)"
    )
    group.add_argument("--show", type=Path, metavar="FILE.json", help="print a saved run again")


def _work_folder() -> Path:
    """A folder of this user's in the temporary one, which is not emptied within a session."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return Path(tempfile.gettempdir()) / f"pellucid-bench-{user}"


def bench(arguments: argparse.Namespace) -> int:
    """Measure, print, save and draw; 1 where no engine could be measured."""
    if arguments.list:
        _print_names()
        return 0
    result = _read(arguments.show) if arguments.show else _measure(arguments)
    if arguments.prepare:
        print(arguments.work)
        for name, why in result["skipped"].items():
            print(f"left out: {name}: {why}")
        return 0
    if arguments.save:
        _save(result, arguments.save)
    if arguments.plot:
        from pellucid.bench.plot import draw

        draw(result).savefig(arguments.plot, dpi=150)
    if arguments.json:
        print_json(result)
    else:
        from pellucid.show.bench_terminal import report

        report(console(), result)
    return 0 if result["summary"]["engines"] else 1


def _print_names() -> None:
    from pellucid.bench.engines import specs

    for name in specs():
        print(name)


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a saved bench ({error})") from None
    if not isinstance(result, dict) or "turns" not in result:
        raise ValueError(f"{path}: not a saved bench (no turns in it)")
    return result


def _save(result: dict[str, Any], name: str) -> None:
    path = Path(name) if name.endswith(".json") else _RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _plan(arguments: argparse.Namespace) -> Plan:
    from pellucid.bench.rounds import QUICK, Plan

    given = {name: getattr(arguments, name) for name in ("rounds", "loads", "threads")}
    stated: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.measures:
        stated["measures"] = tuple(arguments.measures.split(","))
    return replace(QUICK if arguments.quick else Plan(), **stated)


def _config(source: str) -> tuple[str, Config]:
    from pellucid.bench.shapes import SHAPES
    from pellucid.cli.info import find_config

    return (source, SHAPES[source]) if source in SHAPES else (source, find_config(source)[1])


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from pellucid.bench import candidates, limits, machine
    from pellucid.bench.rounds import Rounds
    from pellucid.bench.shapes import model_home
    from pellucid.bench.summary import summarise
    from pellucid.language_model import free_memory
    from pellucid.ownership import own_folder

    title, config = _config(arguments.shape)
    globs = [glob for given in arguments.engines or [] for glob in given.split(",")]
    chosen = candidates.choose(globs or candidates.DEFAULT)
    if arguments.baseline and arguments.baseline not in [spec.name for spec in chosen]:
        raise ValueError(f"baseline {arguments.baseline!r} is not among the engines measured")
    runnable, skipped = candidates.available(chosen, arguments.peer_python)
    budget = arguments.memory * 1e9 if arguments.memory else 0.7 * free_memory(torch.device("cpu"))
    described = machine.describe()
    progress = console(stderr=True)
    with progress.status("the machine") as status:
        rounds = Rounds(
            config,
            runnable,
            _plan(arguments),
            own_folder(model_home(arguments.work, title, config)),
            int(budget),
            status.update if sys.stderr.isatty() else lambda text: None,
        )
        try:
            rounds.write_files() if arguments.prepare else rounds.run()
        except KeyboardInterrupt:
            progress.print("stopped: what has been measured follows")
    record = rounds.record
    if not globs:  # nobody asked for the peers that are not installed
        skipped = {name: why for name, why in skipped.items() if name.startswith("pellucid/")}
    record["skipped"] = {**skipped, **record["skipped"]}
    flops = limits.prefill_flops(config, rounds.plan.prefill)
    return {
        "shape": {"name": title, "family": config.family, "config": _stated(config)},
        "machine": described,
        **record,
        "prefill_flops": flops,
        "summary": summarise(record, flops, arguments.baseline),
    }


def _stated(config: Config) -> dict[str, Any]:
    """The config's fields, without the family, which stands beside them."""
    from pellucid.models.description import describe

    return {name: value for name, value in describe(config).items() if name != "family"}
