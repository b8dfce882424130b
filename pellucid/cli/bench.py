"""``pellucid bench``: how fast, against this machine's own limits and in turns with peers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pellucid.bench.work import work_folder
from pellucid.cli.arguments import add_shared, add_value
from pellucid.cli.output import console, print_json, progress_line
from pellucid.cli.types import words


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, with what, how often, and where the numbers go."""
    parser.add_argument(
        "--shape",
        default="gpt2-124m",
        help="shape of the model to measure, with random weights: gpt2-124m, llama-3.2-1b, "
        "llama-3-8b, stories15m, a shape that `pellucid info` takes, a model folder or a "
        "config.json (default: gpt2-124m)",
    )
    parser.add_argument(
        "--engines",
        action="extend",
        type=words,
        default=[],
        metavar="GLOB",
        help="engines to measure: globs separated by commas, 'pellucid/*,llama.cpp/bf16' "
        "(default: the main ones that are installed; --list names all)",
    )
    parser.add_argument("--list", action="store_true", help="print all engines' names, and stop")
    parser.add_argument(
        "--prepare", action="store_true", help="write the engines' model files, and stop"
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PATH",
        help="also look for engines in the Python interpreter at PATH (repeatable)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=work_folder(),
        metavar="DIR",
        help="folder to keep model files in, which only you can write (default: %(default)s)",
    )
    _add_plan_arguments(parser.add_argument_group("measurement"))
    group = parser.add_argument_group("output")
    add_shared(group, "--json")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the results")
    group.add_argument(
        "--save", metavar="NAME", help="also write JSON to benchmarks/results/NAME.json (or a path)"
    )
    group.add_argument(
        "--show", type=Path, metavar="FILE.json", help="print a saved run, without measuring"
    )


def _add_plan_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--baseline", metavar="NAME", help="engine to compare others with (default: the first)"
    )
    add_value(group, "--rounds", "N", "measure all of it N times", otherwise="2")
    add_value(group, "--loads", "N", "time the loading N times", otherwise="1")
    group.add_argument(
        "--measures",
        type=words,
        metavar="NAME,…",
        help="what to measure (default: decode,prefill,batched)",
    )
    group.add_argument("--quick", action="store_true", help="measure one short round only")
    all_free = "one for each core that is free"
    add_value(group, "--threads", "N", "threads of every engine", otherwise=all_free)
    memory = "memory that all engines together may take"
    add_value(group, "--memory", "GB", memory, kind=float, otherwise="70%% of what is free")


def bench(arguments: argparse.Namespace) -> int:
    """Measure, print, save and draw; 1 where no engine could be measured."""
    if arguments.list:
        from pellucid.bench.engines import specs

        print("\n".join(specs()))
        return 0
    from pellucid.bench.session import read_result, save_result

    result = read_result(arguments.show) if arguments.show else _measure(arguments)
    if arguments.prepare:
        print(arguments.work)
        for name, why in result["skipped"].items():
            print(f"left out: {name}: {why}")
        return 0
    if arguments.save:
        save_result(result, arguments.save)
    if arguments.plot:
        from pellucid.bench.plot import draw

        draw(result).savefig(arguments.plot, dpi=150)
    if arguments.json:
        print_json(result)
    else:
        from pellucid.show.bench_terminal import report

        report(console(), result)
    return 0 if result["summary"]["engines"] else 1


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from pellucid.bench.rounds import bench_plan
    from pellucid.bench.session import run_bench

    asked = {name: getattr(arguments, name) for name in ("rounds", "loads", "threads", "measures")}
    with progress_line() as progress:
        result = run_bench(
            arguments.shape,
            engines=arguments.engines,
            plan=bench_plan(quick=arguments.quick, **asked),
            baseline=arguments.baseline,
            peer_pythons=arguments.peer_python,
            memory_bytes=int(arguments.memory * 1e9) if arguments.memory else None,
            work=arguments.work,
            prepare=arguments.prepare,
            progress=progress,
        )
    if "interrupted" in result:
        print("stopped: what has been measured follows", file=sys.stderr)
    return result
