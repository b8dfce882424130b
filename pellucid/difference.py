"""`pellucid.diff`: a model, or a recording of one, against another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.compare import Report, Side, compare, from_model, from_trace
from pellucid.language_model import LanguageModel, Prompt, load
from pellucid.trace import Trace

if TYPE_CHECKING:
    from pellucid.compare.diff import Progress
    from pellucid.compare.judge import Keep

DEFAULT_PROMPT = "The quick brown fox jumps over the lazy dog. 1 2 3 4 5 6 7 8 9 10"


def diff(
    a: Any,
    b: Any,
    prompt: Prompt | Sequence[Sequence[int]] | None = None,
    *,
    steps: int = 0,
    progress: Progress = lambda stage: None,
    keep: Keep | None = None,
) -> Report:
    """Compare two implementations of one model, tensor by tensor.

    a, b    a LanguageModel, a transformers model, a Trace, a side made by hand, or a path: a model
            folder, a trace file (.safetensors, .npz), ``hf:PATH`` to run a folder in transformers
    prompt  text, token ids, or rows of token ids (padded on the left); None takes a short English
            sentence, or the tokens of a recording
    steps   also follow so many decoding steps with the KV cache
    keep    is given each judged tensor of B: name, R, what was observed

    R, the reference, is A's arithmetic at higher precision. ValueError where the two cannot be
    compared or nothing was.
    """
    sides = as_side(a, "A"), as_side(b, "B")
    recorded = any(side.recorded is not None for side in sides)
    if prompt is None and not recorded:
        prompt = DEFAULT_PROMPT
    return compare(*sides, as_rows(prompt), steps=steps, progress=progress, keep=keep)


def as_rows(prompt: Prompt | Sequence[Sequence[int]] | None) -> str | list[list[int]] | None:
    """Text as it is; token ids as one row; rows as rows."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    rows = [[item] if isinstance(item, int) else list(item) for item in prompt]
    if all(isinstance(item, int) for item in prompt):
        return [[token for row in rows for token in row]]
    return rows


def assert_same_model(a: Any, b: Any, prompt: Prompt | None = None, **options: Any) -> None:
    """For tests: AssertionError with the report's first lines where a and b diverge."""
    report = diff(a, b, prompt, **options)
    if report.verdict == "diverged":
        raise AssertionError(report.summary())


def as_side(source: Any, label: str) -> Side:
    """A side of a diff from whatever a user has in hand; ValueError for what is none."""
    if isinstance(source, Side):
        return source
    if isinstance(source, Trace):
        return from_trace(source, f"{label} (trace)")
    if isinstance(source, LanguageModel):
        return from_language_model(source)
    if isinstance(source, str | Path):
        return _from_path(str(source))
    raise ValueError(
        f"{label} is a {type(source).__name__}: expected a model, a trace, or a path to one"
    )


def from_language_model(lm: LanguageModel) -> Side:
    """A side that runs a loaded model with its own tokenizer."""
    return from_model(
        lm.model,
        lm.name,
        encode=lm.encode,
        bos_id=lm.tokenizer.bos_id,
        specials=lm.tokenizer.specials,
    )


def _from_path(source: str) -> Side:
    if source.endswith(".safetensors") and Path(source).is_file():
        return from_trace(Trace.load(source), source)
    return from_language_model(load(source))
