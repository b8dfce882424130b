"""``pellucid eval``: how well a model predicts text, how far another is from it, tasks, labels."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from pellucid.cli.arguments import add_model_arguments, add_shared, add_value, load_model
from pellucid.cli.output import print_report, progress_bar


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, in which windows."""
    _add_source_arguments(parser.add_argument_group("what to evaluate on"))
    add_model_arguments(parser)
    group = parser.add_argument_group("windows")
    longest = "its context length, at most 2048"
    add_value(group, "--context", "N", "tokens that the model sees at once", otherwise=longest)
    half = "half of --context"
    add_value(group, "--stride", "N", "tokens by which the window moves", otherwise=half)
    add_value(group, "--batch", "N", "windows computed at once", default=8)
    add_shared(parser.add_argument_group("output"), "--json")


def _add_source_arguments(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="perplexity on text: text files, files of JSON lines, or folders of both",
    )
    source.add_argument(
        "--stdlib",
        action="store_true",
        help="perplexity on the 1/40 of Python's standard library that `train --stdlib` leaves out",
    )
    source.add_argument(
        "--world",
        action="store_true",
        help="perplexity and an exam on the small English world that `train --world` trains on",
    )
    source.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-evaluation-harness, which must be installed",
    )
    source.add_argument(
        "--labels",
        metavar="FILE",
        help="accuracy on texts with labels (CSV or JSON lines), of a model fine-tuned to classify",
    )
    group.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="with --text: key of the text in a record of JSON lines (default: text)",
    )
    group.add_argument(
        "--separator",
        metavar="TEXT",
        help="with --text: text between two documents of a text file (default: none: a file is "
        "one document)",
    )
    group.add_argument(
        "--task-path", metavar="DIR", help="with --tasks: a folder with task files of your own"
    )
    only = "evaluate only the first N texts, or the first N examples of each task"
    add_value(group, "--limit", "N", only, otherwise="all")
    group.add_argument(
        "--against",
        metavar="MODEL",
        help="with --text or --stdlib: also compare predictions with those of MODEL",
    )


def eval(arguments: argparse.Namespace) -> None:
    """Print the scores."""
    if arguments.batch < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise ValueError("--batch and --limit: expected 1 or more")
    kind = _on_tasks if arguments.tasks else _on_labels if arguments.labels else _on_text
    kind = _on_world if arguments.world else kind
    report, lines = kind(arguments)
    print_report(report, lines, as_json=arguments.json)


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Arguments that are parameters of a call under the same names."""
    return {name: getattr(arguments, name) for name in names}


def _on_text(arguments: argparse.Namespace) -> tuple[dict[str, Any], Iterable[str]]:
    from pellucid.evaluate.text_report import read_texts, stdlib_texts, text_report
    from pellucid.show.eval_terminal import text_lines
    from pellucid.train import TextFormat

    if arguments.stdlib:
        texts = stdlib_texts(arguments.limit)
    else:
        layout = TextFormat(text_key=arguments.text_key, separator=arguments.separator)
        texts = read_texts(arguments.text, layout=layout, limit=arguments.limit)
    lm, other = load_model(arguments), None
    if arguments.against:
        arguments.model, arguments.adapter = arguments.against, None
        other = load_model(arguments)
    with progress_bar("tokens", quiet=arguments.json) as progress:
        windows = _given(arguments, "context", "stride", "batch")
        report = text_report(lm, texts, against=other, progress=progress, **windows)
    return report, text_lines(report)


def _on_world(arguments: argparse.Namespace) -> tuple[dict[str, Any], Iterable[str]]:
    from pellucid.evaluate.world import world_report
    from pellucid.show.eval_terminal import exam_lines, text_lines

    windows = _given(arguments, "limit", "context", "stride", "batch")
    with progress_bar("tokens", quiet=arguments.json) as progress:
        report = world_report(load_model(arguments), progress=progress, **windows)
    return report, [*text_lines(report), *exam_lines(report)]


def _on_labels(arguments: argparse.Namespace) -> tuple[dict[str, Any], Iterable[str]]:
    from pellucid.evaluate.labels import label_report
    from pellucid.show.eval_terminal import label_lines

    lm = load_model(arguments)
    report = label_report(lm, arguments.labels, **_given(arguments, "limit", "context"))
    return report, label_lines(report)


def _on_tasks(arguments: argparse.Namespace) -> tuple[dict[str, Any], Iterable[str]]:
    """Results of lm-evaluation-harness, and its own table of them."""
    from pellucid.evaluate.harness import results_table, run_tasks

    lm = load_model(arguments)
    options = _given(arguments, "context", "batch", "limit", "task_path")
    results = run_tasks(lm, arguments.tasks, **options)
    return {"model": lm.name, "results": results["results"]}, [results_table(results)]
