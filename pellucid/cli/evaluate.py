"""``pellucid eval``: how well a model predicts text, how far another is from it, tasks, labels."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from pellucid.cli.common import add_model_arguments, console, load_model, print_json, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from pellucid.evaluate import EncodedText
    from pellucid.language_model import LanguageModel
    from pellucid.train import Document

LONGEST_DEFAULT = 2048  # tokens: a context of 131,072 is seldom meant, and costs its square


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, in which windows."""
    parser.add_argument("given", nargs="?", metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("what to evaluate on")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", nargs="+", metavar="PATH", help="text files, JSON lines, folders of them"
    )
    source.add_argument(
        "--stdlib",
        action="store_true",
        help="the fortieth of this Python's standard library that train --stdlib holds out",
    )
    source.add_argument("--tasks", nargs="+", metavar="TASK", help="of lm-evaluation-harness")
    source.add_argument(
        "--labels", metavar="FILE", help="texts and labels, for a model fine-tuned to classify"
    )
    group.add_argument("--text-key", default="text", metavar="KEY", help="of JSON lines (text)")
    group.add_argument("--task-path", metavar="DIR", help="where task files of your own are")
    group.add_argument("--limit", type=int, metavar="N", help="the first N texts, or task examples")
    add_model_arguments(parser)
    group = parser.add_argument_group("windows")
    group.add_argument(
        "--context", type=int, metavar="N", help="tokens in view (the model's, 2048 at most)"
    )
    group.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (half of the context)"
    )
    group.add_argument("--batch", type=int, default=8, metavar="N", help="windows in a pass (8)")
    parser.add_argument("--against", metavar="MODEL", help="also compare with this model")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def eval(arguments: argparse.Namespace) -> None:
    """Print the scores."""
    arguments.model = arguments.given or arguments.model
    if arguments.batch < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise ValueError("--batch and --limit: expected 1 or more")
    if arguments.tasks:
        _tasks(arguments)
        return
    if arguments.labels:
        from pellucid.cli.evaluate_labels import evaluate_labels

        evaluate_labels(arguments)
        return
    documents = _documents(arguments)
    lm = load_model(arguments)
    longest = min(lm.config.context_length, LONGEST_DEFAULT)
    context = longest if arguments.context is None else arguments.context
    stride = max(1, context // 2) if arguments.stride is None else arguments.stride
    found = _score(arguments, lm, documents, context, stride)
    if arguments.against:
        found["against"] = _compare(arguments, lm, documents, context)
    if arguments.json:
        print_json(found)
    else:
        _print(found)


def _documents(arguments: argparse.Namespace) -> list[Document]:
    from pellucid.train import Layout, hold_out, read_documents, stdlib_documents

    if arguments.stdlib:
        _, documents = hold_out(stdlib_documents())
    else:
        documents = read_documents(arguments.text, Layout(text_key=arguments.text_key))
    if not documents:
        raise ValueError(f"no text in {' '.join(arguments.text)}: expected files with text in them")
    return documents[: arguments.limit]


def _score(
    arguments: argparse.Namespace,
    lm: LanguageModel,
    documents: list[Document],
    context: int,
    stride: int,
) -> dict[str, Any]:
    from pellucid.evaluate import evaluate_texts

    texts = _encoded(lm, documents)
    began = time.perf_counter()
    with progress_bar("tokens", quiet=arguments.json) as report:
        score = evaluate_texts(
            lm.model, texts, context=context, stride=stride, batch=arguments.batch, report=report
        )
    seconds = time.perf_counter() - began
    return {
        "model": lm.name,
        "texts": len(texts),
        "tokens": score.tokens,
        "bytes": score.text_bytes,
        "context": context,
        "stride": stride,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "seconds": seconds,
        "tokens_per_second": score.tokens / seconds,
    }


def _encoded(lm: LanguageModel, documents: list[Document]) -> list[EncodedText]:
    from pellucid.evaluate import encode_texts

    return encode_texts(lm.tokenizer, (document.text for document in documents))


def _compare(
    arguments: argparse.Namespace, lm: LanguageModel, documents: list[Document], context: int
) -> dict[str, Any]:
    """Both models over windows side by side."""
    from pellucid.evaluate import compare_models

    arguments.model, arguments.adapter = arguments.against, None
    other = load_model(arguments)
    context = min(context, other.config.context_length)
    if other.tokenizer.encode(documents[0].text) != lm.tokenizer.encode(documents[0].text):
        raise ValueError(f"{other.name} has another tokenizer than {lm.name}: nothing to compare")
    windows = _windows([text.ids for text in _encoded(lm, documents)], context)
    return {"model": other.name, **compare_models(lm.model, other.model, windows, batch=4)}


def _windows(texts: list[list[int]], context: int) -> Tensor:
    """All texts as one line, cut into windows (N, context + 1); the rest is left out."""
    from itertools import chain

    import torch

    from pellucid.train import held_out_windows

    return held_out_windows(torch.tensor(list(chain.from_iterable(texts))), context)


def _print(found: dict[str, Any]) -> None:
    texts = "1 text" if found["texts"] == 1 else f"{found['texts']:,} texts"
    windows = f"context {found['context']:,}, stride {found['stride']:,}"
    lines = {
        "tokens": f"{found['tokens']:,}",
        "bytes": f"{found['bytes']:,}",
        "loss": f"{found['loss']:.4f} nats per token",
        "perplexity": f"{found['perplexity']:.4g}",
        "bits per byte": f"{found['bits_per_byte']:.4f}",
        "time": f"{found['seconds']:.1f} s, {found['tokens_per_second']:,.0f} tokens/s",
    }
    if "against" in found:
        other = found["against"]
        lines |= {
            "against": f"{other['model']}, over windows side by side",
            "KL mean": f"{other['kl_mean']:.3g} nats per token",
            "KL max": f"{other['kl_max']:.3g} nats",
            "same likeliest": f"{other['top1']:.2%} of the tokens",
            "perplexities": f"{other['perplexity_a']:.4g}, {other['perplexity_b']:.4g}",
        }
    out = console()
    out.print(f"{found['model']} on {texts}, {windows}", markup=False)
    for name, value in lines.items():
        out.print(f"{name:<16}{value}", markup=False)


def _tasks(arguments: argparse.Namespace) -> None:
    """Run tasks of lm-evaluation-harness and print its own table, or its results as JSON."""
    from pellucid.evaluate.harness import results_table, run_tasks

    lm = load_model(arguments)
    results = run_tasks(
        lm,
        arguments.tasks,
        context=arguments.context,
        batch=arguments.batch,
        limit=arguments.limit,
        task_path=arguments.task_path,
    )
    if arguments.json:
        print_json({"model": lm.name, "results": results["results"]})
    else:
        console().print(results_table(results), markup=False)
