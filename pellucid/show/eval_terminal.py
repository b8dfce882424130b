"""What ``pellucid eval`` prints: a model's scores on text, and on labelled texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pellucid.show.training_terminal import class_lines


def text_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A report of `pellucid.evaluate.text_report`, a line for each number."""
    texts = "1 text" if report["texts"] == 1 else f"{report['texts']:,} texts"
    yield (
        f"{report['model']} on {texts}, context {report['context']:,}, stride {report['stride']:,}"
    )
    rows = {
        "tokens": f"{report['tokens']:,}",
        "bytes": f"{report['bytes']:,}",
        "loss": f"{report['loss']:.4f} nats per token",
        "perplexity": f"{report['perplexity']:.4g}",
        "bits per byte": f"{report['bits_per_byte']:.4f}",
        "time": f"{report['seconds']:.1f} s, {report['tokens_per_second']:,.0f} tokens/s",
    }
    if "against" in report:
        other = report["against"]
        rows |= {
            "against": f"{other['model']}, over windows side by side",
            "KL mean": f"{other['kl_mean']:.3g} nats per token",
            "KL max": f"{other['kl_max']:.3g} nats",
            "same likeliest": f"{other['top1']:.2%} of the tokens",
            "perplexities": f"{other['perplexity_a']:.4g}, {other['perplexity_b']:.4g}",
        }
    for name, value in rows.items():
        yield f"{name:<16}{value}"


def label_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A report of `pellucid.evaluate.labels`: the accuracy and a line for each label."""
    yield f"{report['model']} on {report['count']:,} labelled texts"
    yield from class_lines(report)


def exam_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The exam of `pellucid.evaluate.world`, a line for each facet."""
    yield ""
    yield f"{'exam, asked for nowhere in training':<36}questions  right  rather than the other"
    for facet, marks in report["exam"].items():
        preferred = "" if marks["preferred"] is None else f"{marks['preferred']:>7.1%}"
        yield f"{facet:<36}{marks['questions']:>9}{marks['right']:>7.1%}{preferred}"
