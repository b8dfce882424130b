"""``pellucid diff``: where two implementations of one model part, and why."""

from __future__ import annotations

import argparse
import sys

from pellucid.cli.arguments import DTYPES, add_page_argument, add_shared, add_value
from pellucid.cli.output import console, print_json, progress_line
from pellucid.cli.types import count, token_rows
from pellucid.files import check_output, write_whole

EPILOG = """\
A and B stand as arguments, without -m. Each is one of these:
  a model      a folder, a GGUF file, owner/name on the Hub, or demo, demo-gpt2,
               stdlib, stdlib-gpt2, smollm2
  hf:FOLDER    a model folder, run by transformers
  a recording  a file of named tensors (.safetensors, .npz)
B may also be an OpenAI-compatible server (http://HOST:PORT) or a sampler's log
(.jsonl). Both are compared with A's arithmetic at higher precision: take as A
the one you trust.

exit status: 0 the same (identical, within rounding, or explained), 1 diverged,
2 an error"""

# Flags that are parameters of `pellucid.diff` under the same names.
_RUN = ("steps", "dtype_a", "dtype_b", "dialect_a", "dialect_b", "fused", "copies", "fast")


def diff_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid diff``."""
    parser.epilog = EPILOG
    parser.add_argument("a", nargs="?", metavar="A", help="the implementation that is trusted")
    parser.add_argument("b", nargs="?", metavar="B", help="the implementation to check")
    parser.add_argument("-m", dest="misplaced", metavar="MODEL", help=argparse.SUPPRESS)
    _add_run_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--all", action="store_true", help="list every tensor, also the equal ones")
    add_page_argument(group, "the report")
    add_shared(group, "--json", "--force")
    test = "put known faults into A and B, or two random models, and report which are found"
    group.add_argument("--self-test", action="store_true", help=test)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input")
    prompt = group.add_mutually_exclusive_group()
    text = "text to run both on (default: a short sentence)"
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help=text)
    rows = "token ids to run both on: 1,2,3, or several rows 1,2;3,4"
    add_value(prompt, "--tokens", "IDS", rows, kind=token_rows)
    steps = "after the prompt, also compare N decoding steps with the KV cache"
    server = "; of a server N sampled tokens, 32 unless given"
    add_value(group, "--steps", "N", steps, kind=count, default=0, otherwise=server)
    schemes = "transformers, meta, transformerlens, gguf, litgpt, vllm, or a YAML file"
    named = f"naming scheme of a recording's tensors: {schemes} (default: recognised by itself)"
    group.add_argument("--map", metavar="MAP", help=named)
    map_out = "write the name map that was found out for a recording of pellucid.record, as YAML"
    group.add_argument("--map-out", metavar="FILE", help=map_out)
    for side in "AB":
        group = parser.add_argument_group(f"how to run {side}, if it is a model")
        kind = f"data type that {side} computes in (default: that of its weights)"
        group.add_argument(f"--dtype-{side.lower()}", choices=DTYPES, help=kind)
        whose = (
            f"reference implementation whose rounding {side} follows: meta, hf, notebook "
            "(default: the one that wrote its files)"
        )
        group.add_argument(f"--dialect-{side.lower()}", metavar="NAME", help=whose)
    group.add_argument("--fused", action="store_true", help="run B's attention in one fused kernel")
    add_value(
        group, "--copies", "N", "run B on N copies of each row in one batch", kind=count, default=1
    )
    group.add_argument("--fast", action="store_true", help="with --steps: run B's decoding in C")


def diff(arguments: argparse.Namespace) -> int:
    """Compare and report; the exit status says whether the two are the same."""
    if arguments.misplaced is not None:
        raise ValueError("diff has two models, and no -m: pellucid diff A B")
    if arguments.self_test:
        return _self_test(arguments)
    if arguments.a is None or arguments.b is None:
        raise ValueError("give two models or trace files: pellucid diff A B")
    if arguments.html is not None:
        check_output(arguments.html, arguments.force, "--html")
    try:
        return _compare(arguments)
    except ValueError as error:
        said = str(error).replace("name_map=", "--map ").replace("a name_map", "a name map, --map")
        if "\n" not in said or arguments.traceback:
            raise ValueError(said) from error
        print(f"pellucid diff: {said}", file=sys.stderr)  # a YAML file, line by line
        return 2


def _compare(arguments: argparse.Namespace) -> int:
    from pellucid.diff import diff
    from pellucid.show.diff_maps import Maps
    from pellucid.show.diff_page import page
    from pellucid.show.diff_terminal import show

    maps = Maps() if arguments.html else None
    with progress_line() as progress:
        progress("reading A and B")
        report = diff(
            arguments.a,
            arguments.b,
            arguments.prompt if arguments.tokens is None else arguments.tokens,
            **{name: getattr(arguments, name) for name in _RUN},
            name_map=arguments.map,
            map_out=arguments.map_out,
            progress=progress,
            keep=None if maps is None else maps.keep,
        )
    if maps is not None:
        write_whole(arguments.html, page(report.to_json(), maps.pairs))
    if arguments.json:
        print_json(report.to_json())
    else:
        show(report.to_json(), console(), every=arguments.all)
        if maps is not None:
            console().print(f"page          {arguments.html}", markup=False)
    return report.exit_status


def _self_test(arguments: argparse.Namespace) -> int:
    from pellucid.diff.selftest.promises import keeps_promises, self_test, table_as_json
    from pellucid.show.self_test_terminal import print_table

    with progress_line() as progress:
        table = self_test([side for side in (arguments.a, arguments.b) if side], progress)
    if arguments.json:
        print_json(table_as_json(table))
    else:
        print_table(console(), table)
    return 0 if keeps_promises(table) else 1
